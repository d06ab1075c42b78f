"""Files of others: read without running anything, fetched once, and named when they are no checkpoint."""

import argparse
import functools
import http.server
import os
import pathlib
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from yacs.config import CfgNode

from utils.checkpoint_files import fetch, load_file, save_checkpoint, save_safetensors
from utils.sources import choose_source


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


def test_texts_of_numpy_are_texts(tmp_path):
    """Class names from np.unique."""
    content = {"classes": list(np.unique(["dog", "a cat"])), "raw": np.bytes_(b"xy")}
    torch.save(content, tmp_path / "x.pth")
    loaded = load_file(tmp_path / "x.pth")
    assert loaded == {"classes": ["a cat", "dog"], "raw": b"xy"}
    assert {type(name) for name in loaded["classes"]} == {str}


def test_a_file_with_the_suffix_of_another_format_is_understood(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {"epoch": 3})
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    loaded = load_file(tmp_path / "a.pth")
    assert (loaded["epoch"], loaded["model"]["w"].tolist()) == (3, [1, 1])
    torch.save({}, tmp_path / "b.pth")
    (tmp_path / "b.pth").rename(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors is what torch\.save writes.*rename it"):
        load_file(tmp_path / "b.safetensors")


def test_a_safetensors_header_may_begin_like_a_pickle(tmp_path):
    """It begins with its length, of which the first byte is 0x80 for one file in 32."""
    file = tmp_path / "x.safetensors"
    for length in range(256):
        save_safetensors(file, {"w": torch.ones(2)}, {"text": "x" * length})
        if file.read_bytes()[0] == 0x80:
            break
    assert file.read_bytes().startswith(b"\x80")
    assert load_file(file)["model"]["w"].tolist() == [1, 1]


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


@pytest.mark.parametrize("text", ["<html>404</html>", "MODEL:  {TYPE: swin}\n", "hello world\n"])
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
    save_checkpoint(tmp_path / "checkpoints" / "best.pth.tar", {})  # as timm calls them
    for folder in (tmp_path, tmp_path / "checkpoints"):
        for look in (load_file, lambda path: choose_source("eval", "last.pth", resume=str(path))):
            with pytest.raises(ValueError, match=r"is a directory.*best\.pth'.*best\.pth\.tar"):
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


def test_a_url_is_downloaded_once_to_the_cache(tmp_path):
    (tmp_path / "site").mkdir()
    save_checkpoint(tmp_path / "site" / "model.pth", {"model": {"w": torch.ones(1)}})
    whole = (tmp_path / "site" / "model.pth").read_bytes()
    (tmp_path / "site" / "half.pth").write_bytes(whole[: len(whole) // 2])

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
            half = url.replace("model", "half")
            for _ in range(2):
                with pytest.raises(
                    ValueError, match=r"cannot download .*half\.pth: .*damaged or cut"
                ):
                    fetch(half, tmp_path / "cache")
            (tmp_path / "site" / "half.pth").write_bytes(whole)
            assert load_file(fetch(half, tmp_path / "cache"))["model"]["w"].item() == 1
        finally:
            server.shutdown()
            thread.join()
    assert fetch(url, tmp_path / "cache") == path, "the server is gone, the file is not"
    assert choose_source("train", "last.pth", resume=url).path == url
    assert fetch("some/file.pth") == Path("some/file.pth")
