"""One file of weights: read without running anything in it, written whole or not at all, or fetched.

A checkpoint is a dict of tensors and plain data: `torch.load(weights_only=True)` reads it, so that a
file from a stranger can do nothing but be read. It is written to a temporary file and renamed: a full
disk or a killed process leaves the previous file as it was.
"""

import argparse
import hashlib
import json
import logging
import os
import pathlib
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import distributed
from .spelling import nearest

_LOG = logging.getLogger(__name__)


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that the file is either complete or as it was before.

    Raises:
        ValueError: something in `state` is neither a tensor nor plain data; the message says where.
        OSError: the file could not be written.
    """
    _check_plain(state, "state")
    write_atomically(Path(path), lambda file: torch.save(dict(state), file))


def load_file(path: str | Path, mapped: bool = False) -> Any:
    """Content of a checkpoint of MixLab or of the lineage, on the CPU, without running code from it.

    Allowed beside tensors and plain data is what published checkpoints hold: argparse.Namespace, yacs
    CfgNode (it becomes a dict), NumPy numbers and texts, and paths. `.safetensors` files are a dict of
    tensors, those of `save_safetensors` one with the weights under `model` and the facts beside them.

    Args:
        mapped: leave the tensors on the disk until they are used (files of before PyTorch 1.6 are read).

    Raises:
        ValueError: there is no such file, it is damaged, or it holds anything else.
        OSError: it may not be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(missing_file(path))
    with path.open("rb") as file:
        start = file.read(40)
    if not start:
        raise ValueError(f"checkpoint {path} is empty")
    # The length of a header in JSON, and the header: what a file is called says less, and the length may
    # look like the start of the other formats.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _load_safetensors(path)
    is_torch = start.startswith((b"PK", b"\x80"))
    if path.suffix == ".safetensors":
        if not is_torch:
            return _load_safetensors(path)  # which says what is wrong
        raise ValueError(
            f"{path} is what torch.save writes, no .safetensors file: rename it to .pth"
        )
    if not is_torch:
        raise ValueError(
            f"{path} is no checkpoint: it is neither a .safetensors file nor what torch.save writes, a "
            f"zip archive or a pickle; it starts with {start!r}"
        )
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript program, not a checkpoint: give the one that it was made from"
        )
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            mapped = mapped and start.startswith(b"PK")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        refused = _refused_globals(path, str(error))
        if not refused:
            # PyTorch's message begins with the advice to run whatever code is in the file.
            reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0]
            raise ValueError(f"checkpoint {path} is damaged: {reason}") from error
        raise ValueError(
            f"checkpoint {path} would run code when loaded: it holds {', '.join(refused)}. If you trust "
            "its author, convert it once: torch.save({'model': weights}, new_path), where the weights are a "
            "dict of tensors in torch.load(path, weights_only=False): its ['model'], of a whole module its "
            ".state_dict(), of arrays torch.as_tensor of each"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError) as error:
        raise ValueError(f"checkpoint {path} is damaged or cut off: {error}") from error


def _is_torchscript(path: Path) -> bool:
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
    return False


def save_safetensors(
    path: str | Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> None:
    """Write weights, and facts about them (plain data that JSON can say), as a `.safetensors` file.

    Every name gets a tensor of its own, so that any reader finds it. Which names shared one is noted, and
    `load_file` lets them share again.

    Raises:
        OSError: the file could not be written.
    """
    from safetensors.torch import save

    first: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and first.setdefault(place, name) != name:
            shared[name] = first[place]
    metadata = {"format": "pt", _FACTS: json.dumps({**(facts or {}), _SHARED: shared})}
    # Copies: views of one storage are refused, overlapping ones as well.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    content = save(copies, metadata)
    write_atomically(Path(path), lambda file: file.write(content))


# Names in the header of a .safetensors file.
_FACTS, _SHARED = "mixlab", "shared"


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from error
    if _FACTS not in metadata:
        return weights
    try:
        facts = json.loads(metadata[_FACTS])
        for name, like in facts.pop(_SHARED, {}).items():
            weights[name] = weights[like]
        return {**facts, "model": weights}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged: its header '{_FACTS}' ({error})"
        ) from error


def fetch(source: str, cache_dir: str | Path | None = None) -> Path:
    """Local file of a path or an http(s) URL; a URL is downloaded once, to torch.hub's cache.

    All processes call it; rank 0 downloads first, the others find the file, or fetch their machine's.

    Raises:
        ValueError: it cannot be downloaded, or what comes is no checkpoint, which is not kept.
    """
    if not is_url(source):
        return Path(source)
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints")
    # Many releases are called model.pth: the URL's hash keeps them apart.
    name = source.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
    target = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-{name}"
    failure = None
    if distributed.is_main():
        failure = _download(source, target)
    failure = distributed.broadcast_object(failure)
    if failure is None and not distributed.is_main():
        failure = _download(source, target)
    if failure is not None:
        raise ValueError(f"cannot download {source}: {failure}")
    return target


def is_url(source: str) -> bool:
    """Whether `fetch` would download it."""
    return source.startswith(("http://", "https://"))


def _download(url: str, target: Path) -> str | None:
    """Download `url` unless it is there; returns what went wrong."""
    if target.is_file():
        return None
    _LOG.info("downloading %s to %s", url, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), progress=distributed.is_main())
        load_file(target, mapped=True)
    except OSError as error:  # urllib's errors are OSErrors
        return str(error)
    except ValueError as error:  # cut off, or a page about an error: it would be found from now on
        target.unlink(missing_ok=True)
        return str(error)
    return None


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Call `write(file)` on a temporary file beside `path`, then rename it (no links: SMB has none)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    if os.name == "posix":
        # The rename itself survives a power cut only once the folder is on disk; not all file systems can.
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


_PLAIN = (str, int, float, bool, bytes, type(None), torch.Size, torch.dtype, torch.device)


def _check_plain(value: Any, where: str) -> None:
    """ValueError unless `value` is made of tensors and plain data only."""
    # Exact types: a NumPy float64 is a float, and still a global that safe loading refuses.
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int, float, bool, type(None)):
                raise ValueError(f"{where} has the key {key!r} of type {type(key).__name__}")
            _check_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif kind not in (*_PLAIN, Tensor, torch.nn.Parameter):
        raise ValueError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}: checkpoints hold tensors, numbers, "
            "text, lists and dicts; convert it"
        )


_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")  # timm's are called *.pth.tar


def missing_file(path: Path) -> str:
    """Message about a path that is no file, with what its folder has, or it has as a folder."""
    if path.is_dir():
        inside = [p for folder in (path, path / "checkpoints") for p in folder.glob("*.*")]
        found = sorted(str(p) for p in inside if p.suffix in _SUFFIXES)
        return f"checkpoint {path} is a directory: give a file; it has {found or 'none'}"
    if not path.parent.is_dir():
        return f"checkpoint {path} does not exist, nor does its folder"
    names = [p.name for p in path.parent.iterdir() if p.suffix in _SUFFIXES]
    near = ", ".join(nearest(path.name, names)[:3])
    found = f"{len(names)} checkpoints, such as {near}" if names else "none"
    return f"checkpoint {path} does not exist; its folder has {found}"


def _numpy_scalar(dtype: np.dtype, raw: bytes = b"") -> Any:
    """A NumPy number or text of a checkpoint as Python's; objects, which could hide code, are refused."""
    if dtype.kind not in "biufcUS":
        raise pickle.UnpicklingError(f"NumPy scalar of type {dtype}")
    return np.frombuffer(raw, dtype=dtype, count=1)[0].item()


# Everything here can only be filled with data. A pair names the class in the file that it stands for.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDGUS"},
    *(
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for pure, name in (
            (pathlib.PurePosixPath, "PosixPath"),
            (pathlib.PurePosixPath, "PurePosixPath"),
            (pathlib.PureWindowsPath, "WindowsPath"),
            (pathlib.PureWindowsPath, "PureWindowsPath"),
        )
    ),
]


def _refused_globals(path: Path, message: str) -> list[str]:
    """Names in the file that safe loading does not know; empty if that is not what went wrong."""
    # Files of before PyTorch 1.6 cannot be scanned: there, the message names the first one.
    found = re.findall(r"(?i)unsupported (?:global: )?(?:global|class) ([\w.]+)", message)
    with suppress(ValueError, RuntimeError), torch.serialization.safe_globals(_SAFE_GLOBALS):
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path) or found
    return sorted(set(found))
