"""What a run saves it has back, and a failure while saving loses nothing."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from utils.checkpoint import Checkpointer
from utils.checkpoint_files import load_file, save_checkpoint
from utils.wrappers import unwrap

ROOT = Path(__file__).resolve().parents[2]


def parts(seed=0, ema=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    return {
        "model": model,
        "optimizer": optimizer,
        "scaler": scaler,
        "ema": nn.Linear(3, 4) if ema else None,
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_resumed_run_has_all_states_back(tmp_path):
    """Trap 16: resume does not restore (accuracy jumps: scaler, moments, random numbers)."""
    first = Checkpointer(tmp_path, parts(0, ema=True), config_text="A: 1", classes=("cat", "dog"))
    first.save({"epoch": 3, "step": 40, "batch": 7}, {"acc1": 50.0})
    expected = torch.rand(4)
    second = Checkpointer(tmp_path, parts(1, ema=True))
    assert second.resume(second.last) == {"epoch": 3, "step": 40, "batch": 7}
    assert torch.equal(torch.rand(4), expected)
    for name, part in second.parts.items():
        assert same(dict(part.state_dict()), dict(first.parts[name].state_dict())), name
    state = torch.load(second.last, weights_only=True)
    assert state["config"] == "A: 1"
    assert state["classes"] == ["cat", "dog"]
    assert state["metrics"] == {"acc1": 50.0}
    assert state["versions"]["torch"] == str(torch.__version__)
    assert state["git"] is None or len(state["git"]) >= 40


def test_the_best_metric_is_fresh_after_a_resume(tmp_path):
    """Trap of Swin: max_accuracy is written before the epoch's validation, one epoch stale."""
    run = Checkpointer(tmp_path, parts())
    assert run.save({"epoch": 0}, {"acc1": 40.0})
    assert run.save({"epoch": 1}, {"acc1": 60.0})
    again = Checkpointer(tmp_path, parts())
    again.resume(again.last)
    assert (again.best["value"], again.best["progress"]) == (60.0, {"epoch": 1})
    assert not again.save({"epoch": 2}, {"acc1": 50.0})
    assert not again.save({"epoch": 3}, {"acc1": float("nan")})
    assert not again.save({"epoch": 3, "batch": 5})
    assert load_file(tmp_path / "best.pth")["progress"] == {"epoch": 1}
    assert load_file(tmp_path / "last.pth")["progress"] == {"epoch": 3, "batch": 5}
    assert load_file(tmp_path / "last.pth")["best"]["value"] == 60.0


def test_a_metric_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no 'miou', only \['acc1'\]"):
        Checkpointer(tmp_path, parts(), metric="miou").save({}, {"acc1": 1.0})


def test_only_the_newest_numbered_checkpoints_stay(tmp_path):
    """Trap 19: best checkpoint and disk use."""
    run = Checkpointer(tmp_path, parts(), keep=2)
    for epoch in range(9, 13):
        run.save({"epoch": epoch}, epoch=epoch)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch_11.pth",
        "epoch_12.pth",
        "last.pth",
    ]
    keeper = Checkpointer(tmp_path, parts(), keep=0)
    for epoch in range(13, 17):
        keeper.save({"epoch": epoch}, epoch=epoch)
    assert len(list(tmp_path.glob("epoch_*.pth"))) == 6


def test_a_full_disk_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch):
    """Trap 19: disk full."""
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert load_file(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_failed_write_of_a_run_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    run = Checkpointer(tmp_path, parts())
    run.save({"epoch": 0})

    def broken(source, target):
        raise OSError("read-only file system")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match=f"cannot write checkpoints to {tmp_path}"):
        run.save({"epoch": 1})
    monkeypatch.undo()
    assert load_file(run.last)["progress"] == {"epoch": 0}


def test_a_process_killed_while_saving_keeps_the_old_file(tmp_path):
    script = f"""
import os, signal, torch
from utils.checkpoint_files import save_checkpoint
path = r"{tmp_path / "last.pth"}"
save_checkpoint(path, {{"step": 1, "w": torch.ones(1000)}})
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(path, {{"step": 2, "w": torch.ones(1000)}})
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert load_file(tmp_path / "last.pth")["step"] == 1
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    Checkpointer(tmp_path, {})
    assert not list(tmp_path.glob(".*.tmp")), "the next run cleans up"


def test_saving_needs_no_hard_links(tmp_path, monkeypatch):
    """Trap 27: filesystems without hard links."""

    def refuse(*args, **kwargs):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    Checkpointer(tmp_path, parts()).save({"epoch": 0}, {"acc1": 1.0}, epoch=0)
    assert (tmp_path / "best.pth").read_bytes() == (tmp_path / "last.pth").read_bytes()


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.float64(1.0), r"state\['a'\]\['b'\]\[1\] is a numpy.float64"),
        (argparse.Namespace(), "argparse.Namespace"),
        (CfgNode(), "yacs.config.CfgNode"),
        ({(1, 2): 3}, "has the key"),
    ],
)
def test_only_tensors_and_plain_data_are_saved(tmp_path, value, where):
    with pytest.raises(ValueError, match=where):
        save_checkpoint(tmp_path / "x.pth", {"a": {"b": [1, value]}})
    assert not list(tmp_path.iterdir())


def test_names_have_no_wrapper_prefix(tmp_path):
    """Trap 16: the _orig_mod. prefix of torch.compile in checkpoints."""
    model = nn.Linear(2, 2)
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    Checkpointer(tmp_path, {"model": unwrap(wrapped)}).save({"epoch": 0})
    assert list(load_file(tmp_path / "last.pth")["model"]) == ["weight", "bias"]


def test_a_checkpoint_that_does_not_fit_the_run_is_refused(tmp_path, caplog):
    run = Checkpointer(tmp_path, parts(ema=True))
    run.save({"epoch": 0})
    other = Checkpointer(tmp_path, parts() | {"model": nn.Linear(5, 5)})
    with pytest.raises(ValueError, match=r"'model' of .*last.pth does not fit"):
        other.resume(run.last)
    with pytest.raises(ValueError, match="has no 'schedule', which this run needs"):
        Checkpointer(tmp_path, parts() | {"schedule": nn.Linear(1, 1)}).resume(run.last)
    Checkpointer(tmp_path, parts()).resume(run.last)
    assert "has 'ema', which this run does not use" in caplog.text
    save_checkpoint(tmp_path / "swin.pth", {"model": {}, "epoch": 3})
    with pytest.raises(ValueError, match=r"swin\.pth is no training checkpoint.*--pretrained"):
        run.resume(tmp_path / "swin.pth")


def test_another_number_of_processes_resumes_with_a_warning(tmp_path, caplog):
    run = Checkpointer(tmp_path, parts())
    run.save({"epoch": 2})
    state = load_file(run.last)
    state["rng"] = state["rng"] * 2
    save_checkpoint(run.last, state)
    assert run.resume(run.last) == {"epoch": 2}
    assert "written by 2 processes" in caplog.text
