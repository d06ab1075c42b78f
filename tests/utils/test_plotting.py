import json

import pytest
from PIL import Image

from utils.plotting import plot_training, read_metrics


def write(path, records, rest=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + rest)
    return path


def train(step, loss=1.0):
    return {"kind": "train", "step": step, "loss": loss, "lr": 1e-3}


def evaluation(step, acc1):
    return {"kind": "eval", "step": step, "loss": 0.5, "acc1": acc1, "acc1_ema": acc1 / 2}


def test_a_resumed_run_replaces_earlier_lines_of_the_same_step(tmp_path):
    path = write(
        tmp_path / "m.jsonl",
        [train(1, 3.0), train(2, 9.0), evaluation(2, 10.0), train(2, 2.0), evaluation(2, 20.0)],
        rest='{"kind": "train", "st',
    )
    records = read_metrics(path)
    assert [(r["kind"], r["step"], r["loss"]) for r in records] == [
        ("train", 1, 3.0),
        ("train", 2, 2.0),
        ("eval", 2, 0.5),
    ]
    assert records[-1]["acc1"] == 20.0


def test_losses_that_are_not_finite_are_read_and_not_drawn(tmp_path):
    path = write(tmp_path / "m.jsonl", [train(1), train(2, "NaN"), train(3, "Infinity"), train(4)])
    losses = [r["loss"] for r in read_metrics(path)]
    assert losses[1] != losses[1]
    assert losses[2] == float("inf")
    plot_training(path, tmp_path / "plot.png")


def test_the_picture_is_drawn(tmp_path):
    records = [train(s, 5 / (1 + s / 50)) for s in range(0, 400, 2)]
    records += [evaluation(s, s / 5) for s in range(50, 400, 50)]
    path = write(tmp_path / "m.jsonl", records)
    picture = tmp_path / "plots" / "run.png"
    plot_training(path, picture, title="swin_tiny")
    with Image.open(picture) as image:
        assert image.size == (1800, 540)
        assert len(image.convert("RGB").getcolors(maxcolors=2**20)) > 20


def test_a_run_without_evaluation_or_training_is_drawn_too(tmp_path):
    for records in ([train(0)], [evaluation(1, 5.0)]):
        plot_training(write(tmp_path / "m.jsonl", records), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no record"):
        read_metrics(write(tmp_path / "m.jsonl", [], rest='{"a": 1}\n'))
