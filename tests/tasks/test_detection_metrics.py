import contextlib
import copy
import importlib.util
import io
import json
import logging

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.detection_metrics import NAMES, CocoEvaluator, choose_evaluator
from tests.detections import CATEGORY_IDS, CLASSES, coco_content, run_lengths, samples
from tests.processes import free_port, run_on_processes

HAS_FASTER = importlib.util.find_spec("faster_coco_eval") is not None
BACKENDS = [
    "pycocotools",
    pytest.param("faster", marks=pytest.mark.skipif(not HAS_FASTER, reason="not installed")),
]


def evaluate(made, evaluator="pycocotools", num_classes=3, **options):
    scorer = CocoEvaluator(num_classes, evaluator=evaluator, **options)
    for output, target in made:
        scorer.update([output], (None, [target]))
    return scorer.compute(), scorer


def image(image_id, detections, objects, size=(100, 100)):
    """Detections are (box xyxy, score), objects (box xyxy, crowd); all of class 0."""
    output = dict(
        boxes=torch.tensor([box for box, _ in detections], dtype=torch.float32).view(-1, 4),
        scores=torch.tensor([score for _, score in detections]),
        labels=torch.zeros(len(detections), dtype=torch.int64),
    )
    annotations = [
        dict(
            id=1,
            category_id=0,
            bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]],
            area=(box[2] - box[0]) * (box[3] - box[1]),
            iscrowd=crowd,
        )
        for box, crowd in objects
    ]
    return output, dict(image_id=image_id, original_size=size, annotations=annotations)


@pytest.mark.parametrize("evaluator", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_twelve_numbers_are_those_of_pycocotools_on_the_written_files(
    tmp_path, evaluator, seed
):
    made = samples(seed=seed)
    metrics, scorer = evaluate(
        made, evaluator, classes=CLASSES, category_ids=CATEGORY_IDS, record=True
    )
    table, boxes, masks = scorer.write(tmp_path, suffix="_ema")
    names = [path.name for path in (table, boxes, masks)]
    assert names == ["classes_ema.csv", "results_bbox_ema.json", "results_segm_ema.json"]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(coco_content(made)))
    expected = {"images": 7}
    rows = {}
    for kind, path, prefix in (("bbox", boxes, ""), ("segm", masks, "mask_")):
        with contextlib.redirect_stdout(io.StringIO()):
            content = COCO(str(truth))
            theirs = COCOeval(content, content.loadRes(str(path)), kind)
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
        expected |= {prefix + name: 100 * v for name, v in zip(NAMES, theirs.stats, strict=True)}
        rows[prefix] = theirs.eval["precision"][:, :, :, 0, 2]
    assert metrics == pytest.approx(expected, abs=1e-6)
    # Numbers that say something: neither perfect nor zero, and masks of their own size.
    assert all(5 < metrics[name] < 95 for name in ("AP", "APs", "APm", "APl", "mask_AP"))
    assert metrics["APs"] != metrics["mask_APs"]
    header, *lines = [line.split(",") for line in table.read_text().splitlines()]
    own = ["AP", "AP50", "mask_AP", "mask_AP50"]
    assert header == ["label", "class", "category_id", "objects", *own]
    objects = [a for _, t in made for a in t["annotations"] if not a["iscrowd"]]
    for k, line in enumerate(lines):
        count = sum(a["category_id"] == k for a in objects)
        assert line[:4] == [str(k), CLASSES[k], str(CATEGORY_IDS[k]), str(count)]
        for name, value in zip(own, line[4:], strict=True):
            precision = rows[name[: -len(name.removeprefix("mask_"))]][:, :, k]
            precision = precision[:1] if name.endswith("50") else precision
            assert float(value) == pytest.approx(100 * precision.mean(), abs=1e-6)


@pytest.mark.skipif(not HAS_FASTER, reason="faster-coco-eval is not installed")
def test_both_packages_give_the_same_numbers():
    for seed in range(4):
        made = samples(5, seed=10 + seed)
        assert evaluate(made, "faster")[0] == evaluate(made, "pycocotools")[0]


@pytest.mark.parametrize("evaluator", BACKENDS)
def test_average_precision_is_the_one_computed_by_hand(evaluator):
    """Three objects; detections by score: right, wrong, right. One object is missed.

    Recall 1/3 at precision 1, recall 2/3 at precision 2/3: of the recalls 0, 0.01, ..., 1, 34 are at most
    1/3, and 33 more at most 2/3.
    """
    made = [
        image(1, [([0, 0, 10, 10], 0.9)], [([0, 0, 10, 10], 0), ([50, 50, 60, 60], 0)]),
        image(2, [([0, 0, 9, 9], 0.8), ([40, 40, 80, 80], 0.7)], [([40, 40, 80, 80], 0)]),
    ]
    metrics, _ = evaluate(made, evaluator, num_classes=1)
    expected = dict(AP=100 * (34 + 33 * 2 / 3) / 101, AR1=100 / 3, AR10=200 / 3, AR100=200 / 3)
    expected |= dict(AP50=expected["AP"], AP75=expected["AP"], images=2)
    # Among small ones, one of two is found, by the first detection; the only medium one by the only one.
    expected |= dict(APs=100 * 51 / 101, ARs=50, APm=100, ARm=100)
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert "APl" not in metrics
    assert "ARl" not in metrics


@pytest.mark.parametrize("evaluator", BACKENDS)
def test_what_lies_in_a_crowd_is_neither_right_nor_wrong(evaluator):
    thing, crowd = [0, 0, 10, 10], [40, 40, 90, 90]
    found = [(thing, 0.5), ([42, 42, 60, 60], 0.9), ([60, 60, 80, 80], 0.8)]
    with_crowd = image(1, found, [(thing, 0), (crowd, 1)])
    without = image(1, found, [(thing, 0)])
    assert evaluate([with_crowd], evaluator, 1)[0]["AP"] == 100
    assert evaluate([without], evaluator, 1)[0]["AP"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("evaluator", BACKENDS)
def test_a_wrong_detection_in_an_image_without_objects_counts(evaluator):
    thing = [0, 0, 10, 10]
    one = image(1, [(thing, 0.5)], [(thing, 0)])
    assert evaluate([one], evaluator, 1)[0]["AP"] == 100
    metrics, _ = evaluate([one, image(2, [(thing, 0.9)], [])], evaluator, 1)
    assert (metrics["AP"], metrics["images"]) == (50, 2)


@pytest.mark.parametrize("evaluator", BACKENDS)
def test_of_one_class_in_one_image_a_hundred_detections_count(evaluator):
    thing = [0, 0, 10, 10]
    wrong = [([30, 30, 40, 40], 0.9)] * 99
    hundredth = image(1, [*wrong, (thing, 0.1)], [(thing, 0)])
    too_late = image(1, [*wrong, wrong[0], (thing, 0.1)], [(thing, 0)])
    assert evaluate([hundredth], evaluator, 1)[0]["AP"] == pytest.approx(1)
    assert evaluate([too_late], evaluator, 1)[0]["AP"] == 0


@pytest.mark.parametrize("evaluator", BACKENDS)
def test_perfect_masks_score_a_hundred(evaluator):
    made = []
    for output, target in samples(3):
        own = [a for a in target["annotations"] if not a["iscrowd"]]
        corners = torch.tensor([a["bbox"] for a in own]).view(-1, 4)
        corners[:, 2:] += corners[:, :2]
        masks = []
        for annotation in own:
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):  # a rectangle of whole pixels
                x, y, w, h = (int(v) for v in annotation["bbox"])
                mask = np.zeros(target["original_size"], bool)
                mask[y : y + h, x : x + w] = True
                segmentation = run_lengths(mask)
            masks.append(segmentation)
        output = dict(
            boxes=corners,
            scores=torch.linspace(0.2, 0.9, len(own)),
            labels=torch.tensor([a["category_id"] for a in own], dtype=torch.int64),
            masks=masks,
        )
        made.append((output, target))
    metrics, _ = evaluate(made, evaluator)
    assert metrics["images"] == 3
    assert all(metrics[key] == 100 for key in ("AP", "mask_AP", "mask_AP75", "mask_AR100"))


@pytest.mark.parametrize("evaluator", BACKENDS)
def test_without_any_detection_all_is_zero(evaluator):
    made = [image(1, [], [([0, 0, 10, 10], 0)]), image(2, [], [])]
    metrics, _ = evaluate(made, evaluator, 1)
    assert metrics == dict(AP=0, AP50=0, AP75=0, APs=0, AR1=0, AR10=0, AR100=0, ARs=0, images=2)


def test_nothing_to_score_is_an_error_unless_results_are_recorded(tmp_path):
    made = [image(1, [([0, 0, 10, 10], 0.5)], [([0, 0, 9, 9], 1)])]  # a crowd alone
    with pytest.raises(ValueError, match="none of 1 images has an annotation"):
        evaluate(made, num_classes=1)
    metrics, scorer = evaluate(made, num_classes=1, record=True)
    assert metrics == {"images": 1}
    table, results = scorer.write(tmp_path)
    assert table.read_text().splitlines()[1] == "0,0,0,0,,"
    assert json.loads(results.read_text()) == [
        dict(image_id=1, category_id=0, score=0.5, bbox=[0.0, 0.0, 10.0, 10.0])
    ]
    with pytest.raises(ValueError, match="loaders of all processes are empty"):
        evaluate([], num_classes=1)


def test_without_masks_there_are_no_numbers_of_masks_and_no_file_unasked(tmp_path):
    made = [({k: v for k, v in o.items() if k != "masks"}, t) for o, t in samples(3)]
    metrics, scorer = evaluate(made)
    assert not any(key.startswith("mask") for key in metrics)
    assert [path.name for path in scorer.write(tmp_path / "new")] == ["classes.csv"]


def test_masks_need_annotations_with_a_segmentation():
    (output, target), *_ = samples(1)
    target["annotations"][1]["segmentation"] = []
    with pytest.raises(ValueError, match="annotation of image 500 has no segmentation"):
        evaluate([(output, target)])


def test_detections_that_are_not_finite_are_an_error():
    output, target = image(1, [([0, 0, 10, 10], 0.5)], [([0, 0, 10, 10], 0)])
    with pytest.raises(FloatingPointError, match="1 of 1 images are nan or infinite"):
        evaluate([(output | dict(bad=2), target)], num_classes=1)


def test_images_with_names_for_ids_are_scored_as_those_with_numbers(tmp_path):
    made = samples(5)
    named = [(o, t | dict(image_id=f"train/{t['image_id']}")) for o, t in made]
    metrics, scorer = evaluate(named, record=True)
    assert metrics == evaluate(made)[0]
    results = json.loads(scorer.write(tmp_path)[1].read_text())
    assert {r["image_id"] for r in results} <= {t["image_id"] for _, t in named}


@pytest.mark.parametrize("evaluator", BACKENDS)
def test_evaluation_is_silent_and_leaves_the_annotations_as_they_are(evaluator, capfd, caplog):
    caplog.set_level(logging.INFO)
    made = samples(3)
    before = copy.deepcopy([target for _, target in made])
    evaluate(made, evaluator)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert [target for _, target in made] == before


def test_an_evaluator_that_is_unknown_or_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"EVALUATOR='fast' must be one of \['auto'"):
        choose_evaluator("fast")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_evaluator("auto") == choose_evaluator("pycocotools") == "pycocotools"
    with pytest.raises(ValueError, match="pip install faster-coco-eval"):
        choose_evaluator("faster")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert choose_evaluator("auto") == "faster"


def test_names_and_ids_must_be_as_many_as_the_classes():
    with pytest.raises(ValueError, match="2 classes for a model of 3"):
        CocoEvaluator(3, classes=["a", "b"])
    with pytest.raises(ValueError, match="1 category_ids for a model of 3"):
        CocoEvaluator(3, category_ids=[1])


WORKER = """
import json, os, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
from tasks.detection_metrics import CocoEvaluator
from tests.detections import samples
from utils.distributed import cleanup, init_distributed

def evaluate(made, padded, folder=None):
    scorer = CocoEvaluator(3, evaluator="pycocotools", record=True)
    count = len(made)
    if padded:  # as a sampler deals images out that gives all processes as many, by beginning anew
        count += -count % runtime.world_size
    share = [made[i % len(made)] for i in range(runtime.rank, count, runtime.world_size)]
    for start in range(0, len(share), 2):  # the last batch may have one image
        outputs, targets = zip(*share[start : start + 2])
        scorer.update(outputs, (None, targets))
    metrics = scorer.compute()
    if folder:
        metrics["files"] = [path.name for path in scorer.write(folder)]
    return metrics

made = samples()
for world_size, port in zip((3, 2, 1), sys.argv[2:]):  # one start serves all three
    os.environ.update(WORLD_SIZE=str(world_size), MASTER_PORT=port)
    if int(os.environ["RANK"]) >= world_size:
        break
    runtime = init_distributed("cpu")
    folder = Path(sys.argv[1], str(world_size))
    found = [evaluate(made, True, folder), evaluate(made, False), evaluate(made[:2], False)]
    try:
        CocoEvaluator(3).compute()
    except ValueError as error:
        found.append(str(error))
    print(json.dumps(found))
    cleanup()
"""


def test_one_two_and_three_processes_give_the_same_numbers_and_files(tmp_path):
    made = samples()
    expected, scorer = evaluate(made, record=True)
    first_two, _ = evaluate(made[:2], record=True)
    names = [path.name for path in scorer.write(tmp_path / "expected")]
    ports = [str(free_port()) for _ in range(3)]
    outputs = run_on_processes(3, WORKER, str(tmp_path), *ports, timeout=240)
    for rank, output in enumerate(outputs):
        lines = output.strip().splitlines()
        assert len(lines) == 3 - rank, output
        for line in lines:
            padded, whole, two, error = json.loads(line)
            assert padded.pop("files") == (names if rank == 0 else [])
            assert padded == whole == expected
            assert two == first_two, "of three processes one has no image"
            assert "loaders of all processes are empty" in error
    for world_size in ("1", "2", "3"):
        for name in names:
            written = (tmp_path / world_size / name).read_bytes()
            assert written == (tmp_path / "expected" / name).read_bytes()
