"""Means that are read rarely."""

import math
import subprocess
import sys
from pathlib import Path

import torch

from utils.meters import Mean


def test_windows_and_totals():
    mean = Mean()
    for value in (1.0, 3.0):
        mean.add(torch.tensor(value))
    assert mean.read() == (2.0, 2.0)
    mean.add(torch.tensor(8.0))
    assert mean.read() == (8.0, 4.0)
    assert math.isnan(mean.read()[0])


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
