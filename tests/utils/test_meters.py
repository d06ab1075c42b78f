"""Means that are read rarely."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.meters import ImageStatistics, Mean


def test_windows_and_totals():
    mean = Mean()
    for value in (1.0, 3.0):
        mean.add(torch.tensor(value))
    assert mean.read() == (2.0, 2.0)
    mean.add(torch.tensor(8.0))
    assert mean.read() == (8.0, 4.0)
    assert math.isnan(mean.read()[0])


def statistics(batches):
    result = ImageStatistics()
    for batch in batches:
        result.add({"share": batch})
    return result


def test_statistics_are_over_images_not_batches():
    values = torch.arange(101.0, dtype=torch.float64)[torch.randperm(101)]
    result = statistics(values.split(8)).compute()
    assert result == {"share_mean": 50.0, "share_p5": 5.0, "share_p95": 95.0}
    assert ImageStatistics().compute() == {}


@pytest.mark.parametrize("world", [2, 3, 20])
def test_statistics_of_many_processes_are_those_of_one(monkeypatch, world):
    """With 20 processes some have no image."""
    batches = list(torch.rand(101, dtype=torch.float64).split(8))
    values = torch.cat(batches).numpy()
    single = statistics(batches).compute()
    low, high = np.percentile(values, (5, 95))
    assert single["share_p5"] == pytest.approx(low, abs=1e-6)
    assert single["share_p95"] == pytest.approx(high, abs=1e-6)
    shards = [statistics(batches[rank::world]) for rank in range(world)]
    sent = []
    with monkeypatch.context() as patch:
        patch.setattr("utils.meters.all_gather_object", lambda own: sent.append(own) or [own])
        for shard in shards:
            shard.compute()
    monkeypatch.setattr("utils.meters.all_gather_object", lambda own: sent)
    assert [shard.compute() for shard in shards] == [single] * world


def test_draining_early_changes_no_mean():
    mean = Mean()
    mean.add(torch.tensor(1.0))
    assert mean.drain() == 1.0
    mean.add(torch.tensor(3.0))
    assert mean.drain() == 4.0
    assert mean.read() == (2.0, 2.0)


def test_one_overflow_spoils_its_window_only():
    mean = Mean()
    mean.add(torch.tensor(float("inf")))
    assert math.isinf(mean.read()[0])
    mean.add(torch.tensor(2.0))
    assert mean.read() == (2.0, 2.0)


def test_peak_memory_keeps_what_was_held_once():
    """In a process of its own: the peak of this one depends on all tests before."""
    program = """
import torch
from utils.meters import peak_memory_mib
before = peak_memory_mib(torch.device("cpu"))
held = torch.ones(2**26)
del held
assert 200 < peak_memory_mib(torch.device("cpu")) - before < 300
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
