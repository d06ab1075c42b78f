"""Metrics, details and files of an evaluation against counts made by hand."""

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import evaluate
from tasks.classification import ClassificationTask
from tasks.classification_metrics import (
    ALEXNET_ERRORS,
    ClassificationEvaluator,
    SetEvaluator,
    corruption_errors,
)
from tasks.classification_report import check_predictions_file, write_predictions, write_report
from tasks.views import AveragedViews, averaged
from utils.amp import Amp
from utils.wrappers import unwrap

CLASSES = ["ant", "bee", "cat", "dog"]


def targets(labels, first=0):
    """Labels with the numbers of their images, as NumberedImages gives them."""
    return torch.stack([torch.tensor(labels), torch.arange(len(labels)) + first], dim=1)


def random_case(images=101, classes=10):
    return torch.randn(images, classes), torch.randint(classes, (images,))


def test_the_set_evaluator_gives_the_plain_metrics():
    logits, labels = random_case()
    plain, numbered = ClassificationEvaluator(10), SetEvaluator(10)
    plain.update(logits, (None, labels))
    numbered.update(logits, (None, targets(labels.tolist())))
    assert plain.compute() == numbered.compute()
    assert numbered.confusion is None
    assert numbered.predictions is None


def test_classes_outside_the_set_cannot_be_predicted():
    """ImageNet-A and -R: logits are restricted to the classes that occur, before the argmax."""
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 3.0, 2.0, 0.0]])  # class 0 is not in the set
    evaluator = SetEvaluator(4, subset=[1, 2], record=True)
    evaluator.update(logits, (None, targets([2, 2])))
    result = evaluator.compute()
    assert (result["acc1"], result["acc5"], result["images"]) == (50.0, 100.0, 2)
    expected = F.cross_entropy(logits[:, [1, 2]], torch.tensor([1, 1]))
    assert result["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert evaluator.predictions.classes.tolist() == [[2, 1], [1, 2]]
    assert evaluator.predictions.probabilities[0].tolist() == pytest.approx(
        [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]
    )


def test_a_class_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="has a class 4, the model only 4"):
        SetEvaluator(4, subset=[1, 4])


def test_any_of_several_right_labels_counts():
    """ReaL: a prediction is right if it is in the image's list."""
    logits = torch.tensor([[5.0, 4, 0, 0, 0, 0], [0.0, 1, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]])
    accepted = torch.tensor([[1, 0], [4, -1], [0, -1]])
    evaluator = SetEvaluator(6, accepted=accepted, report=True)
    evaluator.update(logits, (None, targets([1, 4, 0])))
    result = evaluator.compute()
    assert result["acc1"] == pytest.approx(100 / 3, abs=1e-6)
    assert result["acc5"] == pytest.approx(200 / 3, abs=1e-6)
    right = [logits[0, :2].logsumexp(0), logits[1, 4], logits[2, 0]]
    losses = [logits[row].logsumexp(0) - right[row] for row in range(3)]
    assert result["loss"] == pytest.approx(sum(losses).item() / 3, abs=1e-5)
    assert "ece" in result
    assert "mean_class_acc" not in result, "lists have no confusion matrix"


def literal_ece(probabilities, labels, bins=15):
    """Guo et al. 2017, Eq. 3, in loops."""
    confidence, prediction = probabilities.max(1)
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [i for i, c in enumerate(confidence.tolist()) if low < c <= high]
        if inside:
            accuracy = sum(int(prediction[i] == labels[i]) for i in inside) / len(inside)
            mean = sum(confidence[i].item() for i in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - mean)
    return 100 * total


def test_calibration_error_is_that_of_the_definition():
    logits, labels = random_case(301)
    evaluator = SetEvaluator(10, report=True)
    for first in (0, 128, 256):
        part = slice(first, first + 128)
        evaluator.update(logits[part], (None, targets(labels[part].tolist(), first)))
    result = evaluator.compute()
    assert result["ece"] == pytest.approx(literal_ece(logits.softmax(1), labels), abs=1e-4)
    certain = SetEvaluator(2, report=True)  # confidence 1: the last bin
    certain.update(torch.tensor([[100.0, 0.0], [100.0, 0.0]]), (None, targets([0, 1])))
    assert certain.compute()["ece"] == pytest.approx(50)


def test_confusion_and_class_accuracies_are_counts():
    logits = torch.eye(4)[[0, 0, 1, 2, 1]]
    evaluator = SetEvaluator(4, report=True)
    evaluator.update(logits, (None, targets([0, 1, 1, 2, 2])))
    result = evaluator.compute()
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert evaluator.confusion.tolist() == expected
    assert evaluator.class_accuracies()[:3].tolist() == [100, 50, 50]
    assert math.isnan(evaluator.class_accuracies()[3])
    assert result["mean_class_acc"] == pytest.approx(200 / 3, abs=1e-6)


@pytest.mark.parametrize("world", [2, 3, 20])
def test_what_processes_gather_is_what_one_process_has(monkeypatch, world):
    """Predictions are exact and in order, with 20 processes for 13 batches, too."""
    logits, labels = random_case()
    pairs = targets(labels.tolist())
    batches = list(zip(logits.split(8), pairs.split(8), strict=True))

    def evaluated(part):
        evaluator = SetEvaluator(10, report=True, record=True)
        for output, target in part:
            evaluator.update(output, (None, target))
        return evaluator

    single = evaluated(batches)
    expected = single.compute()
    assert single.predictions.indices.tolist() == list(range(101))
    assert single.predictions.labels.tolist() == labels.tolist()
    assert single.predictions.classes[:, 0].tolist() == logits.argmax(1).tolist()

    shards = [evaluated(batches[rank::world]) for rank in range(world)]
    sums = [[s._sums, s._bins, s._confusion] for s in shards]
    sums = [[t for t in own if t is not None] for own in sums]
    totals = {
        2: sum(s._bins for s in shards),
        1: sum(s._confusion for s in shards),
        0: sum(s._sums for s in shards if s._sums is not None),
    }
    shares = [[torch.cat(c).numpy() for c in zip(*s._records, strict=True)] for s in shards]

    def reduced(tensor):
        if tensor.ndim == 2:
            return totals[2]
        return totals[0] if tensor.dtype == torch.float64 else totals[1]

    monkeypatch.setattr("tasks.classification_metrics.all_reduce_sum", reduced)
    monkeypatch.setattr("tasks.classification_metrics.all_gather_object", lambda own: shares)
    assert shards[0].compute() == expected
    assert torch.equal(shards[0].confusion, single.confusion)
    for name in ("indices", "labels", "classes", "probabilities"):
        assert np.array_equal(
            getattr(shards[0].predictions, name), getattr(single.predictions, name)
        )


def small_evaluator(record=True, report=False):
    evaluator = SetEvaluator(4, record=record, report=report)
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0], [4.0, 0.0, 1.0, 2.0]])
    evaluator.update(logits, (None, targets([3, 1])))
    evaluator.compute()
    return evaluator, logits


def test_predictions_as_csv(tmp_path):
    evaluator, logits = small_evaluator()
    path = tmp_path / "new" / "predictions.csv"
    write_predictions(path, evaluator.predictions, "image{}.png".format, CLASSES)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["sample"] for row in rows] == ["image0.png", "image1.png"]
    assert [(row["label"], row["class"]) for row in rows] == [("3", "dog"), ("1", "bee")]
    assert [row["top1_class"] for row in rows] == ["dog", "ant"]
    assert [rows[0][f"top{k}"] for k in (1, 2, 3, 4)] == ["3", "1", "2", "0"]
    probability = logits.softmax(1)[1, 0].item()
    assert float(rows[1]["top1_prob"]) == pytest.approx(probability, abs=1e-6)


def test_predictions_as_parquet_hold_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    evaluator, _ = small_evaluator()
    accepted = torch.tensor([[3, 2], [1, -1]])
    for name in ("p.csv", "p.parquet"):
        write_predictions(
            tmp_path / name, evaluator.predictions, "image{}.png".format, CLASSES, accepted
        )
    table = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert table["accepted"] == ["3 2", "1"]
    assert {name: [str(value) for value in column] for name, column in table.items()} == {
        name: [row[name] for row in rows] for name in rows[0]
    }


def test_a_file_of_another_kind_is_refused_and_a_missing_package_named(monkeypatch):
    with pytest.raises(ValueError, match=r"TEST.PREDICTIONS='p.json' must end in one of"):
        check_predictions_file("p.json")
    for name in ("confusion.csv", "per_class.csv"):
        with pytest.raises(ValueError, match=r"is a file that TEST\.REPORT writes"):
            check_predictions_file(name, report=True)
        check_predictions_file(name)
    check_predictions_file("p.csv")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        check_predictions_file("p.parquet")


def test_the_report_is_a_table_per_class_and_a_matrix(tmp_path):
    evaluator, _ = small_evaluator(report=True)
    write_report(tmp_path, "_a", evaluator, CLASSES)
    rows = list(csv.DictReader((tmp_path / "per_class_a.csv").read_text().splitlines()))
    assert [(row["class"], row["images"], row["acc1"]) for row in rows] == [
        ("ant", "0", ""),
        ("bee", "1", "0.0000"),
        ("cat", "0", ""),
        ("dog", "1", "100.0000"),
    ]
    matrix = list(csv.reader((tmp_path / "confusion_a.csv").read_text().splitlines()))
    assert matrix[0] == ["class", *CLASSES]
    assert matrix[2] == ["bee", "1", "0", "0", "0"]
    assert (tmp_path / "confusion_a.png").stat().st_size > 5000


def scores(acc1):
    return dict(acc1=acc1, acc5=acc1 + 1, loss=2.0, images=10)


def test_corruption_errors_are_means_over_severities_then_corruptions():
    parts = {"fog/1": scores(60.0), "fog/2": scores(40.0), "snow/1": scores(90.0)}
    result = corruption_errors(parts | {"spatter/1": scores(0.0)})  # not one of the 15
    assert result["mean_error"] == pytest.approx((50 + 10) / 2)
    assert result["acc1"] == pytest.approx(70)
    assert result["images"] == 40
    assert result["errors"]["fog"] == {"mean": 50.0, "1": 40.0, "2": 60.0}
    assert "mce" not in result, "normalised only where the benchmark is complete"


def test_alexnet_itself_has_a_mean_corruption_error_of_100():
    parts = {
        f"{name}/{severity}": scores(100 - error)
        for name, error in ALEXNET_ERRORS.items()
        for severity in range(1, 6)
    }
    result = corruption_errors(parts)
    assert result["mce"] == pytest.approx(100, abs=1e-5)
    assert result["mean_error"] == pytest.approx(np.mean(list(ALEXNET_ERRORS.values())), abs=1e-5)
    del parts["snow/3"]
    assert "mce" not in corruption_errors(parts)


class Brightness(torch.nn.Module):
    """Logits that depend on where the image is bright: the corner pixel, and the last one."""

    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0], x[:, 0, -1, -1], x[:, 0, 0, -1]], dim=1)


def test_views_average_probabilities():
    images = torch.rand(2, 3, 4, 6) * 5
    model = Brightness()
    assert averaged(model, "none", (4, 6)) is model
    flipped = averaged(model, "flip", (4, 6))
    assert unwrap(flipped) is model
    mean = (model(images).softmax(1) + model(images.flip(-1)).softmax(1)) / 2
    torch.testing.assert_close(flipped(images).softmax(1), mean)
    torch.testing.assert_close(flipped(images).exp(), mean)


def test_crops_are_the_corners_and_the_centre():
    images = torch.rand(2, 3, 6, 8) * 5
    model = Brightness()
    corners = [(0, 0), (0, 4), (2, 0), (2, 4), (1, 2)]  # of 4x4 in 6x8
    crops = [images[:, :, top : top + 4, left : left + 4] for top, left in corners]
    mean = sum(model(crop).softmax(1) for crop in crops) / 5
    torch.testing.assert_close(averaged(model, "five", (4, 4))(images).exp(), mean)
    mirrored = sum(model(crop.flip(-1)).softmax(1) for crop in crops) / 5
    torch.testing.assert_close(averaged(model, "ten", (4, 4))(images).exp(), (mean + mirrored) / 2)


def test_what_a_model_tells_of_images_is_left_out_with_views():
    """It would be that of the last view."""

    class Telling(Brightness):
        def image_values(self):
            return {"seen": torch.ones(2)}

    batches = [(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))]
    for kind, told in (("none", True), ("flip", False)):
        model = averaged(Telling(), kind, (4, 4))
        scores = evaluate(
            model, ClassificationTask(3), batches, device=torch.device("cpu"), amp=Amp()
        )
        assert ("seen_mean" in scores) is told


def test_views_of_certain_predictions_are_finite():
    """The logarithm of a probability that is 0 in float32 would spoil the loss."""
    model = AveragedViews(torch.nn.Flatten(), lambda x: (x, x))
    output = model(torch.tensor([[[[0.0]], [[500.0]]]]))
    assert output.isfinite().all()
    assert output[0].tolist() == pytest.approx([-500, 0])


def test_an_unknown_augmentation_is_named():
    with pytest.raises(ValueError, match=r"TEST.TTA='six' must be one of \['none', 'flip'"):
        averaged(Brightness(), "six", (4, 4))
