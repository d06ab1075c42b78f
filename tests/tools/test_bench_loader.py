"""The loader's benchmark names the slow stage, counts right, and compares the same work."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import load_config
from data import build_loader
from tools import bench_loader
from tools.bench_loader import STAGES, compare, main, rate, recommend, time_stages, usual_loader

CPU = torch.device("cpu")


class Clock:
    """A clock of its own: it moves by `tick` whenever it is read, and when told to."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 1.0, tick

    def perf_counter(self):
        self.now += self.tick
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench_loader, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


@pytest.fixture
def options(tmp_path):
    rng = np.random.default_rng(0)
    for split, label in (("train", "ant"), ("train", "bee"), ("val", "ant"), ("val", "bee")):
        folder = tmp_path / "images" / split / label
        folder.mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8)).save(folder / f"{i}.jpg")
    return [
        *("DATA.DATA_PATH", str(tmp_path / "images"), "DATA.DATASET", "imagenet"),
        *("DATA.IMG_SIZE", "40", "DATA.BATCH_SIZE", "4", "DATA.NUM_WORKERS", "0"),
        *("MODEL.NUM_CLASSES", "None", "DEVICE", "cpu"),
    ]


CFG = "configs/swin/swin_tiny_patch4_window7_224.yaml"


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_stage_is_timed_and_a_slow_one_is_found(options, split, monkeypatch, clock):
    loader = build_loader(load_config(CFG, options), split, device=CPU)
    read = loader.dataset.dataset.read

    def slow(index):
        clock.now += 0.02
        return read(index)

    monkeypatch.setattr(loader.dataset.dataset, "read", slow)
    clock.tick = 0.004  # per stage of a batch of 4
    stages = time_stages(loader, num_batches=2, rounds=2)
    assert list(stages) == list(STAGES)
    assert stages == pytest.approx(dict.fromkeys(STAGES, 1.0) | dict(read=21.0))
    assert bench_loader.limit(stages) == "read"


def test_the_rate_counts_what_comes_after_the_first_batch(clock):
    def batches():
        for _ in range(4):
            clock.now += 0.05
            yield torch.zeros(10, 1), None

    assert rate(batches(), CPU) == pytest.approx(30 / 0.15)


@pytest.mark.parametrize(("target", "expected"), [(None, 4), (150.0, 2), (90.0, 0), (10_000.0, 4)])
def test_the_fewest_workers_that_are_enough_are_recommended(target, expected):
    assert recommend({0: 100.0, 2: 190.0, 4: 380.0, 8: 390.0}, target) == expected


def test_the_race_compares_the_same_images_of_the_same_size(options):
    config = load_config(CFG, [*options, *bench_loader.PLAIN])
    ours = build_loader(config, "train", device=CPU)
    usual = usual_loader(config, ours)
    assert len(usual) == len(ours) == 3
    for (images, labels), (others, expected) in zip(ours, usual, strict=True):
        assert (images.shape, images.dtype) == (others.shape, others.dtype)
        assert labels.equal(expected)
    result = compare(dict(pil=config, cv2=config), "train", CPU, workers=0, rounds=2)
    assert list(result) == ["pil", "cv2", bench_loader.BASELINE]
    assert result[bench_loader.BASELINE]["ratio"] == 1
    assert all(row["img_per_s"] > 0 for row in result.values())


def test_the_program_prints_and_writes_what_it_measured(options, tmp_path, capsys):
    command = ["--cfg", CFG, "--batches", "1", "--rounds", "1", "--workers", "0", "--target", "1e9"]
    result = main([*command, "--output", str(tmp_path / "out" / "loader"), "--opts", *options])
    text = capsys.readouterr().out
    assert "| decode |" in text
    assert "DATA.NUM_WORKERS 0 is enough here" in text
    assert "No number of workers reaches 1000000000 images/s" in text
    written = json.loads((tmp_path / "out" / "loader.json").read_text())
    assert written["ms_per_image"] == result["ms_per_image"]
    assert (tmp_path / "out" / "loader.md").read_text() in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--rounds", "0"], "--rounds must be at least 1"),
     (["--compare", "--split", "val"], "--compare is about training"),
     (["--opts", "DATA.ON_DEVICE", "True"], "DATA.ON_DEVICE=True"),
     (["--cfg", "configs/_base_/smoke_det.yaml"], "TASK='detection'")],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_named(extra, message, capsys):
    with pytest.raises(SystemExit):
        main(["--cfg", CFG, *extra])
    assert message in capsys.readouterr().err
