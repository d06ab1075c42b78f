"""From list files to a checkpoint and back: class names come along, and bad data stops a run at once."""

import logging
from pathlib import Path

import pytest
import torch

import main as program
from models import CONFIG_DIR

SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def root(tmp_path, write_images, monkeypatch):
    """Images and their lists, in a folder that the run writes to as well."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_images(tmp_path, dict.fromkeys(CLASSES, 3), split, size=(32, 32))
        write_list(tmp_path, split, CLASSES)
    return tmp_path


def write_list(root, split, order):
    lines = [
        f"{split}/{name}/{number}.png {label}\n"
        for label, name in enumerate(order)
        for number in range(3)
    ]
    (root / f"{split}.txt").write_text("".join(lines))


def run(root, *args, **keys):
    keys = {
        "DATA.DATASET": "lists", "DATA.LISTS.TRAIN": "['train.txt']", "DATA.LISTS.VAL": "['val.txt']",
        "DATA.BATCH_SIZE": "4", "TRAIN.MAX_STEPS": "1", **keys,
    }  # fmt: skip
    opts = [part for pair in keys.items() for part in pair]
    program.main(
        ["--cfg", SMOKE, "--output", "out", "--data-path", str(root), *args, "--opts", *opts]
    )
    return Path("out/smoke_cls/default")


def test_classes_are_stored_with_the_weights_and_compared_when_these_are_used(root, caplog, capsys):
    """Labels that mean something else give a figure that means nothing."""
    checkpoint = run(root) / "checkpoints" / "last.pth"
    assert torch.load(checkpoint, weights_only=True)["classes"] == CLASSES
    evaluate = ("--eval", "--resume", str(checkpoint))
    run(root, *evaluate)
    for split in ("train", "val"):
        write_list(root, split, ["bee", "ant", "cat"])
    for args, keys in ((evaluate, {}), ((), {"TRAIN.MAX_STEPS": "2"})):  # the latter resumes
        with pytest.raises(SystemExit):
            run(root, *args, **keys)
        error = capsys.readouterr().err
        assert "label 0 is 'ant' there and 'bee' here" in error
        assert "another order" in error
    (root / "classes.txt").write_text("Formica\nApis\nFelis\n")
    with caplog.at_level(logging.WARNING):
        run(root, *evaluate)
    assert "label 0 is 'ant' there and 'Formica' here (3 of 3 differ)" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"DATA.LISTS.TRAIN": "['none.txt']"}, "none.txt does not exist"),
        ({"DATA.LISTS.TRAIN": "train.txt"}, "DATA.LISTS.TRAIN='train.txt' in --opts must be list"),
        ({"DATA.LISTS.VAL": "[1]"}, "DATA.LISTS.VAL=[1] in --opts must be a list of str"),
        (
            {"DATA.DATASET": "pacs", "DATA.DOMAINNET.DOMAINS": "['photos']"},
            "unknown domain 'photos'",
        ),
        ({"DATA.DATASET": "inat2018", "DATA.INAT.CATEGORY": "tribe"}, "DATA.INAT.CATEGORY='tribe'"),
        ({"DATA.DATASET": "lmdb"}, "train.lmdb does not exist"),
        ({"DATA.DATASET": "lmdb", "DATA.ZIP_MODE": "True"}, "'lmdb' has no zip files"),
        ({"DATA.DATASET": "webdataset"}, "has no .tar files of the split 'train'"),
        ({"DATA.DATASET": "parquet", "DATA.PARQUET.TRAIN": "x"}, "(DATA.PARQUET.TRAIN 'x')"),
        ({"DATA.DATASET": "fashion_mnist"}, "train-images-idx3-ubyte does not exist"),
    ],
)
def test_data_that_is_not_there_stops_a_run_before_it_writes_anything(root, keys, message, capsys):
    with pytest.raises(SystemExit):
        run(root, **keys)
    assert message in capsys.readouterr().err
    assert not (root / "out").exists()
