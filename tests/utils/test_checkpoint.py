import argparse
import functools
import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from utils.checkpoint import Checkpointer, choose_source, fetch, load_file, save_checkpoint
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
from utils.checkpoint import save_checkpoint
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


# -- files of others -----------------------------------------------------------------------------------


def test_published_containers_load_without_running_code(tmp_path):
    """Trap 10: torch >= 2.6 rejects old checkpoints that hold a CfgNode or a Namespace."""
    config = CfgNode({"MODEL": {"TYPE": "swin", "DEPTHS": [2, 2]}})
    config.freeze()
    torch.save(
        {
            "model": OrderedDict(w=torch.ones(2)),
            "config": config,
            "args": argparse.Namespace(
                lr=0.1, output_dir=pathlib.PosixPath("/a/b"), decay=(0.1, None)
            ),
            "max_accuracy": np.float64(81.2),
            "epoch": np.int64(299),
            "flag": np.bool_(True),
        },
        tmp_path / "x.pth",
    )
    content = load_file(tmp_path / "x.pth")
    assert content["config"] == {"MODEL": {"TYPE": "swin", "DEPTHS": [2, 2]}}
    assert content["args"].output_dir == pathlib.PurePosixPath("/a/b")
    assert (content["max_accuracy"], content["epoch"], content["flag"]) == (81.2, 299, True)
    assert torch.equal(content["model"]["w"], torch.ones(2))


def test_containers_of_before_torch_1_6_load(tmp_path):
    torch.save(
        {"model": {"w": torch.ones(2)}, "config": CfgNode({"A": 1})},
        tmp_path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    assert load_file(tmp_path / "old.pth")["config"] == {"A": 1}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_left_on_the_disk_are_the_same_and_survive_a_new_file(tmp_path, zipped):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.arange(9.0)}, path, _use_new_zipfile_serialization=zipped)
    mapped = load_file(path, mapped=True)
    save_checkpoint(path, {"w": torch.zeros(9)})  # a run that goes on replaces its last.pth
    assert torch.equal(mapped["w"], torch.arange(9.0))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_never_runs(tmp_path, zipped):
    target = tmp_path / "hacked"
    torch.save(
        {"model": {"w": torch.ones(1)}, "evil": Evil(str(target))},
        tmp_path / "evil.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match=r"would run code.*posix\.mkdir.*convert"):
        load_file(tmp_path / "evil.pth")
    assert not target.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert target.exists(), "the file was harmless, so refusing it proved nothing"


def test_a_numpy_object_is_no_number(tmp_path):
    """NumPy's own loader of scalars unpickles objects: ours must not."""
    scalar = np.float64(0).__reduce__()[0]
    evil = type("Wrap", (), {"__reduce__": lambda self: (scalar, (np.dtype("O"), b"x"))})()
    torch.save({"model": evil}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="ObjectDType") as caught:
        load_file(tmp_path / "x.pth")
    assert "Re-running" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"w": torch.ones(1000)})
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:500])
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02e.")
    for name in ("cut.pth", "pickle.pth", "cut.safetensors"):
        for mapped in (False, True):
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                load_file(tmp_path / name, mapped)


@pytest.mark.parametrize("text", ["<html>404</html>", "MODEL:\n  TYPE: swin\n", "hello world\n"])
def test_a_text_file_is_refused_without_advice_to_load_it_anyway(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml is no checkpoint.*starts with") as caught:
        load_file(tmp_path / "x.yaml")
    assert "weights_only" not in str(caught.value)
    assert text[:5] in str(caught.value)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "x.pth").touch()
    with pytest.raises(ValueError, match=r"x\.pth is empty"):
        load_file(tmp_path / "x.pth")


def test_a_folder_names_the_checkpoints_in_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints" / "best.pth", {})
    for folder in (tmp_path, tmp_path / "checkpoints"):
        for look in (load_file, lambda path: choose_source("eval", "last.pth", resume=str(path))):
            with pytest.raises(ValueError, match=r"is a directory: give a file; .*best\.pth"):
                look(folder)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_a_torchscript_program_is_called_one(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth is a TorchScript program, not a checkpoint"):
        load_file(tmp_path / "x.pth")


def test_a_missing_file_names_what_is_there(tmp_path):
    save_checkpoint(tmp_path / "epoch_10.pth", {})
    with pytest.raises(
        ValueError, match=r"epoch_11\.pth does not exist; its folder has.*epoch_10\.pth"
    ):
        load_file(tmp_path / "epoch_11.pth")
    with pytest.raises(ValueError, match="nor does its folder"):
        load_file(tmp_path / "no" / "x.pth")


# -- where weights come from ---------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    found = {name: tmp_path / f"{name}.pth" for name in ("last", "given", "weights")}
    for path in found.values():
        path.touch()
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize("mode", ["eval", "throughput"])
def test_evaluation_uses_exactly_the_given_file(files, mode):
    """Trap of Swin: auto-resume replaces an explicit --resume, so that another model is scored."""
    source = choose_source(mode, files["last"], resume=files["given"], pretrained=files["weights"])
    assert (source.kind, source.path) == ("weights", files["given"])
    source = choose_source(mode, files["last"], pretrained=files["weights"])
    assert (source.kind, source.path) == ("weights", files["weights"])


def test_evaluation_of_nothing_is_an_error(files):
    """Trap of Swin: --eval without --resume starts training."""
    with pytest.raises(ValueError, match=r"nothing to evaluate: give --resume.*last\.pth"):
        choose_source("eval", files["last"])
    assert choose_source("throughput", files["last"]).kind == "scratch"


def test_training_prefers_its_own_last_checkpoint(files, tmp_path):
    last, given, weights = files["last"], files["given"], files["weights"]
    both = {"resume": given, "pretrained": weights}
    source = choose_source("train", last, **both)
    assert (source.kind, source.path) == ("resume", last)
    assert f"not used: --resume {given} and --pretrained {weights} (" in source.reason
    assert "not used" not in choose_source("train", last).reason
    assert "\n" not in source.reason
    source = choose_source("train", last, auto_resume=False, **both)
    assert (source.kind, source.path) == ("resume", given)
    nothing = tmp_path / "fresh" / "last.pth"
    assert choose_source("train", nothing, **both).path == given
    source = choose_source("train", nothing, pretrained=weights)
    assert (source.kind, source.path) == ("pretrained", weights)
    assert choose_source("train", nothing).kind == "scratch"


@pytest.mark.parametrize("flag", ["resume", "pretrained"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_source_that_does_not_exist_is_named_with_its_neighbours(files, tmp_path, mode, flag):
    with pytest.raises(ValueError, match=r"givn\.pth does not exist; its folder has.*given\.pth"):
        choose_source(mode, tmp_path / "none.pth", **{flag: str(tmp_path / "givn.pth")})


def test_a_url_is_downloaded_once_to_the_cache(tmp_path):
    (tmp_path / "site").mkdir()
    save_checkpoint(tmp_path / "site" / "model.pth", {"model": {"w": torch.ones(1)}})

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/model.pth"
        try:
            path = fetch(url, tmp_path / "cache")
            assert load_file(path)["model"]["w"].item() == 1
            with pytest.raises(ValueError, match=r"cannot download .*404"):
                fetch(url + "x", tmp_path / "cache")
        finally:
            server.shutdown()
            thread.join()
    assert fetch(url, tmp_path / "cache") == path, "the server is gone, the file is not"
    assert choose_source("train", "last.pth", resume=url).path == url
    assert fetch("some/file.pth") == Path("some/file.pth")
