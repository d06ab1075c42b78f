"""Metrics of segmentation against counts made by hand, on one, two and three processes."""

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.segmentation import SegmentationTask
from tasks.segmentation_metrics import SegmentationEvaluator
from tests.processes import free_port, run_on_processes

# Two images of 2x3 and 1x4 pixels, 3 classes. Counted by hand, label by prediction:
#            0  1  2      IoU                  accuracy
#        0   2  1  0      2 / (3 + 3 - 2)      2 / 3
#        1   1  1  0      1 / (2 + 3 - 1)      1 / 2
#        2   0  1  2      2 / (3 + 2 - 2)      2 / 3      of 8 pixels 5 are right, 2 do not count
MASKS = [torch.tensor([[0, 0, 0], [1, 1, 255]]), torch.tensor([[2, 2, 2, 255]])]
LABELS = [torch.tensor([[0, 0, 1], [0, 1, 2]]), torch.tensor([[1, 2, 2, 0]])]
IOUS, ACCURACIES = [50.0, 25.0, 200 / 3], [200 / 3, 50.0, 200 / 3]


def batch(masks, first=0):
    targets = [
        dict(mask=mask, image_id=first + i, file=f"{first + i}.png") for i, mask in enumerate(masks)
    ]
    return torch.zeros(len(masks), 3, 4, 4), targets


def evaluated(labels=LABELS, masks=MASKS, num_classes=3, **options):
    evaluator = SegmentationEvaluator(num_classes, **options)
    for number, (own, mask) in enumerate(zip(labels, masks, strict=True)):
        evaluator.update([own.to(torch.uint8)], batch([mask], number))
    return evaluator


def random_case(images=7, classes=6):
    generator = torch.Generator().manual_seed(3)
    sizes = [(11 + i, 17 - i) for i in range(images)]
    masks = [torch.randint(classes, size, generator=generator) for size in sizes]
    labels = [torch.randint(classes, size, generator=generator) for size in sizes]
    for mask in masks:
        mask[torch.rand(mask.shape, generator=generator) < 0.2] = 255
    return labels, masks


def test_a_table_of_three_classes_with_ignored_pixels():
    evaluator = evaluated()
    result = evaluator.compute()
    assert evaluator.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 1, 2]]
    assert evaluator.class_ious().tolist() == pytest.approx(IOUS)
    assert evaluator.class_accuracies().tolist() == pytest.approx(ACCURACIES)
    assert result == pytest.approx(
        dict(mIoU=sum(IOUS) / 3, mAcc=sum(ACCURACIES) / 3, aAcc=62.5, images=2, classes=3),
        abs=1e-6,
    )


def test_classes_that_occur_nowhere_are_left_out_of_the_means():
    """Class 3 is nowhere; class 4 is predicted only, which costs IoU and has no accuracy."""
    labels = [LABELS[0].clone(), LABELS[1]]
    labels[0][0, 2] = 4  # instead of class 1, where the label is 0
    evaluator = evaluated(labels, num_classes=5)
    result = evaluator.compute()
    ious = [50.0, 100 / 3, 200 / 3, np.nan, 0.0]
    assert evaluator.class_ious().tolist() == pytest.approx(ious, nan_ok=True)
    assert np.isnan(evaluator.class_accuracies()[3:]).all()
    assert result["mIoU"] == pytest.approx(sum([50, 100 / 3, 200 / 3, 0]) / 4, abs=1e-6)
    assert result["mAcc"] == pytest.approx(sum(ACCURACIES) / 3, abs=1e-6)
    assert result["classes"] == 4
    assert SegmentationTask(5).describe(result).endswith("(2 images, 4 of 5 classes)")


def test_the_matrix_is_that_of_torchmetrics():
    if not importlib.util.find_spec("torchmetrics"):
        pytest.skip("torchmetrics is not installed")
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    labels, masks = random_case()
    evaluator = evaluated(labels, masks, num_classes=6)
    evaluator.compute()
    expected = sum(
        multiclass_confusion_matrix(own, mask, 6, ignore_index=255)
        for own, mask in zip(labels, masks, strict=True)
    )
    assert evaluator.confusion.tolist() == expected.tolist()


def test_predictions_on_ignored_pixels_do_not_count():
    first = evaluated().compute()
    labels = [own.masked_fill(mask == 255, 1) for own, mask in zip(LABELS, MASKS, strict=True)]
    assert evaluated(labels).compute() == first
    labels = [own.masked_fill(mask == 255, 255) for own, mask in zip(LABELS, MASKS, strict=True)]
    assert evaluated(labels).compute() == first


def test_255_classes_are_kept_apart_from_the_ignored_pixels():
    labels = [torch.arange(255).view(5, 51)]
    masks = [labels[0].clone()]
    masks[0][4, 50] = 255
    result = evaluated(labels, masks, num_classes=255).compute()
    assert result["aAcc"] == 100
    assert result["mIoU"] == 100


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(ValueError, match="loaders of all processes are empty"):
        SegmentationEvaluator(3).compute()
    with pytest.raises(ValueError, match=r"labels of 1 pixels are neither 0 ... 1 nor 255"):
        evaluated([own.clamp(max=1) for own in LABELS], [MASKS[0], MASKS[1] - 1], 2).compute()
    with pytest.raises(FloatingPointError, match="logits of 2 pixels are nan"):
        evaluated([LABELS[0].masked_fill(LABELS[0] == 1, 255), LABELS[1]]).compute()
    with pytest.raises(ValueError, match="all 4 pixels of the masks are 255"):
        evaluated(LABELS[1:], [torch.full((1, 4), 255)]).compute()
    with pytest.raises(ValueError, match=r"0.png: the mask has \(2, 3\) pixels, and \(1, 4\)"):
        evaluated(LABELS[1:], MASKS[:1])
    with pytest.raises(ValueError, match="2 classes were given, and the model has 3"):
        SegmentationEvaluator(3, classes=["sky", "road"])
    with pytest.raises(ValueError, match="2 category_ids were given"):
        SegmentationEvaluator(3, category_ids=[1, 2])


def test_the_table_per_class(tmp_path):
    evaluator = evaluated(num_classes=4, classes=["sky", "road", "car", "tree"])
    evaluator.compute()
    paths = evaluator.write(tmp_path / "new", "_val")
    assert paths == [tmp_path / "new" / "classes_val.csv"]
    rows = list(csv.reader(paths[0].read_text().splitlines()))
    assert rows == [
        ["label", "class", "iou", "acc", "pixels", "predicted"],
        ["0", "sky", "50.0000", "66.6667", "3", "3"],
        ["1", "road", "25.0000", "50.0000", "2", "3"],
        ["2", "car", "66.6667", "66.6667", "3", "2"],
        ["3", "tree", "", "", "0", "0"],
    ]


def test_images_whose_labels_are_not_known_get_predictions_and_no_scores(tmp_path):
    (tmp_path / "labels" / "old").mkdir(parents=True)
    (tmp_path / "labels" / "old" / "7.png").write_bytes(b"of an earlier run")
    evaluator = evaluated(LABELS, [torch.full_like(mask, 255) for mask in MASKS], record=True)
    assert evaluator.compute() == dict(images=2)
    assert SegmentationTask(3).describe(dict(images=2)) == " * (2 images)"
    assert evaluator.write(tmp_path) == [tmp_path / "labels"]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["0.png", "1.png"]


def test_recorded_predictions_are_pictures_with_the_ids_of_the_data_set(tmp_path):
    evaluator = evaluated(record=True)
    evaluator.compute()
    assert evaluator.write(tmp_path) == [tmp_path / "classes.csv", tmp_path / "labels"]
    for number, labels in enumerate(LABELS):
        with Image.open(tmp_path / "labels" / f"{number}.png") as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), labels)
    for ids, kind in (([7, 24, 33], np.uint8), ([7, 24, 3000], np.uint16)):
        evaluator = evaluated(record=True, category_ids=ids)
        evaluator.compute()
        folder = evaluator.write(tmp_path, f"_{ids[-1]}")[1]
        with Image.open(folder / "0.png") as image:
            values = np.asarray(image)
        assert values.dtype == kind
        assert np.array_equal(values, np.array(ids)[LABELS[0]])


def test_image_ids_may_hold_folders_but_must_stay_below_the_results(tmp_path):
    for name, fine in (("aachen/aachen_000001", True), ("../outside", False), ("/etc/x", False)):
        evaluator = SegmentationEvaluator(3, record=True)
        images, targets = batch(MASKS[:1])
        targets[0]["image_id"] = name
        evaluator.update([LABELS[0].byte()], (images, targets))
        evaluator.compute()
        if fine:
            assert (evaluator.write(tmp_path)[1] / f"{name}.png").is_file()
        else:
            with pytest.raises(ValueError, match="is no name for a file"):
                evaluator.write(tmp_path / "other")


WORKER = """
import json, os, sys
from pathlib import Path
from tests.tasks.test_segmentation_metrics import batch, random_case
from tasks.segmentation import SegmentationTask
from tasks.segmentation_metrics import SegmentationEvaluator
from utils.distributed import cleanup, init_distributed

labels, masks = random_case()
for world_size, port in zip((3, 2), sys.argv[2:]):  # one start serves both
    os.environ.update(WORLD_SIZE=str(world_size), MASTER_PORT=port)
    if int(os.environ["RANK"]) >= world_size:
        break
    runtime = init_distributed("cpu")
    for images in (2, 7):
        evaluator = SegmentationEvaluator(6, record=True)
        for number in range(images)[runtime.rank :: world_size]:
            evaluator.update([labels[number].byte()], batch([masks[number]], number))
        print(json.dumps(evaluator.compute()))
    if runtime.is_main:
        evaluator.write(Path(sys.argv[1], str(world_size)))
    cleanup()
"""


def test_two_and_three_processes_get_what_one_has(tmp_path):
    """Of 7 images the last round is ragged; of 2 images one of three processes has none."""
    labels, masks = random_case()
    single = evaluated(labels, masks, num_classes=6, record=True)
    expected, two = single.compute(), evaluated(labels[:2], masks[:2], num_classes=6).compute()
    assert (expected["images"], two["images"]) == (7, 2)
    single.write(tmp_path / "1")
    ports = [str(free_port()) for _ in range(2)]
    outputs = run_on_processes(3, WORKER, str(tmp_path), *ports, timeout=240)
    for rank, output in enumerate(outputs):
        lines = [json.loads(line) for line in output.strip().splitlines()]
        assert lines == [two, expected] * (1 if rank == 2 else 2)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / count).rglob("*.*")}
        for count in "123"
    ]
    assert files[0] == files[1] == files[2]
    assert len(files[0]) == 8
