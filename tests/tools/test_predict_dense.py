"""Images of which nothing is known through detectors and segmenters: what evaluation finds in them."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import ExifTags, Image

import main as program
from models import CONFIG_DIR
from tasks.detection import DetectionTask
from tests.data.coco_files import write_coco
from tests.data.segmentation_files import write_pairs
from tools import predict_dense

SHORT = ["TRAIN.MAX_STEPS", "1", "DATA.BATCH_SIZE", "2", "DATA.NUM_WORKERS", "0"]
MASK_RCNN = [
    *("MODEL.HEAD.TYPE", "mask_rcnn", "MODEL.HEAD.MASK_RCNN.FPN_CHANNELS", "16"),
    *("MODEL.HEAD.MASK_RCNN.FC_DIM", "32", "MODEL.HEAD.MASK_RCNN.SCORE_THRESHOLD", "0.0"),
]


def trained(root, task, data):
    """Words of the command that trained a model of `task` -> these, and its checkpoint."""
    words = ["--cfg", str(CONFIG_DIR / "_base_" / f"smoke_{task}.yaml")]
    opts = ["--opts", "OUTPUT", str(root / "runs"), "DATA.DATA_PATH", str(root), *SHORT, *data]
    program.main([*words, *opts])
    (last,) = root.rglob("last.pth")
    return words, opts, str(last)


def test_a_detector_finds_what_evaluation_finds(tmp_path, capsys):
    content = write_coco(tmp_path)["val"]
    words, opts, last = trained(tmp_path, "det", ["DATA.DATASET", "coco", *MASK_RCNN])
    program.main([*words, "--eval", "--resume", last, *opts, "TEST.REPORT", "True"])
    (folder,) = {path.parent for path in tmp_path.rglob("results_bbox.json")}
    expected = json.loads((folder / "results_bbox.json").read_text())
    masks = json.loads((folder / "results_segm.json").read_text())
    files = [str(tmp_path / "val2017" / image["file_name"]) for image in content["images"]]
    more = [
        "--threshold",
        "0",
        "--json",
        str(tmp_path / "found.json"),
        "--draw",
        str(tmp_path / "d"),
    ]
    results = predict_dense.main([*files, *words, "--resume", last, *more, *opts])
    assert json.loads((tmp_path / "found.json").read_text()) == results
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for image, result in zip(content["images"], results, strict=True):
        assert (result["height"], result["width"]) == (image["height"], image["width"])
        own = [entry for entry in expected if entry["image_id"] == image["id"]]
        assert own
        assert Counter(entry["class"] for entry in result["objects"]) == Counter(
            names[entry["category_id"]] for entry in own
        )
        scores = [entry["score"] for entry in result["objects"]]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx(sorted((e["score"] for e in own), reverse=True), abs=1e-4)
        sums = [np.sum([e["bbox"] for e in entries], 0) for entries in (own, result["objects"])]
        assert sums[0] == pytest.approx(sums[1], abs=0.1 * len(own))
        codes = {e["segmentation"]["counts"] for e in masks if e["image_id"] == image["id"]}
        assert {e["segmentation"]["counts"] for e in result["objects"]} == codes
        with Image.open(result["picture"]) as picture:
            assert picture.height == image["height"]
            few = np.asarray(picture)
        assert (few != few[:, :1]).any()
    assert f"{files[0]}: " in capsys.readouterr().out
    assert predict_dense.main([files[0], *words, "--resume", last, "--threshold", "1", *opts]) == [
        dict(file=files[0], height=results[0]["height"], width=results[0]["width"], objects=[])
    ]
    assert capsys.readouterr().out.endswith(": nothing\n")


def test_a_segmenter_labels_what_evaluation_labels(tmp_path, capsys):
    write_pairs(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\nvessel\nlesion\n")
    data = ["DATA.DATASET", "image_pairs", "DATA.PAIRS.CLASSES", "classes.txt"]
    words, opts, last = trained(tmp_path, "seg", data)
    program.main([*words, "--eval", "--resume", last, *opts, "TEST.REPORT", "True"])
    files = sorted((tmp_path / "images" / "val").iterdir())
    results = predict_dense.main([*map(str, files), *words, "--resume", last, *opts])
    for file, result in zip(files, results, strict=True):
        (path,) = tmp_path.rglob(f"labels/{file.stem}.png")
        with Image.open(path) as labels:
            counts = np.bincount(np.asarray(labels).ravel(), minlength=3)
        shares = {entry["label"]: entry["share"] for entry in result["labels"]}
        expected = {label: n / counts.sum() for label, n in enumerate(counts) if n}
        assert shares == pytest.approx(expected, abs=1e-5)
        assert sorted(shares.values(), reverse=True) == list(shares.values())
        assert {e["class"] for e in result["labels"]} <= {"ground", "vessel", "lesion"}
    assert "% " in capsys.readouterr().out


def test_pictures_show_what_is_listed(tmp_path, monkeypatch):
    write_coco(tmp_path)
    words, opts, last = trained(tmp_path, "det", ["DATA.DATASET", "coco", *MASK_RCNN])
    drawn, predicted = [], []
    picture, predict = DetectionTask.picture, DetectionTask.predict
    monkeypatch.setattr(
        DetectionTask,
        "picture",
        lambda *args, **options: drawn.append(options) or picture(*args, **options),
    )
    monkeypatch.setattr(
        DetectionTask, "predict", lambda *args: predicted.append(args) or predict(*args)
    )
    file = str(next((tmp_path / "val2017").iterdir()))
    more = ["--threshold", "0.123", "--draw", str(tmp_path / "d")]
    predict_dense.main([file, *words, "--resume", last, *more, *opts])
    assert drawn == [dict(threshold=0.123)]
    assert len(predicted) == 1, "what was found is drawn, not found again"


def test_files_are_looked_at_before_the_model_is_built(tmp_path, capsys, caplog):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 8)).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "text.jpg").write_text("no image")
    files = [str(tmp_path / name) for name in ("turned.png", "text.jpg")]
    with pytest.raises(SystemExit, match="2"):
        predict_dense.main([*files, "--cfg", str(CONFIG_DIR / "_base_" / "smoke_seg.yaml")])
    assert re.search(r"text\.jpg cannot be read as an image", capsys.readouterr().err)
    assert re.search(r"turned\.png is taken as it is stored", caplog.text)


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("cls", [], "TASK='classification' must be detection or segmentation"),
        ("det", [], "the weights are fresh and would guess"),
        ("det", ["--threshold", "1.5"], r"--threshold 1.5 must be within \[0, 1\]"),
        ("det", ["no.jpg"], r"there are no files \['no.jpg'\]"),
    ],
)
def test_what_cannot_be_is_refused(task, words, message, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    cfg = str(CONFIG_DIR / "_base_" / f"smoke_{task}.yaml")
    with pytest.raises(SystemExit, match="2"):
        predict_dense.main([str(tmp_path / "a.png"), *words, "--cfg", cfg])
    assert re.search(message, capsys.readouterr().err)
