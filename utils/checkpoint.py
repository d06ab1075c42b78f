"""Checkpoints of a run: what they hold, when they are written, and which one a run starts from.

A checkpoint is a dict of tensors and plain data: `torch.load(weights_only=True)` reads it, so that a
file from a stranger can do nothing but be read. It is written to a temporary file and renamed: a full
disk or a killed process leaves the previous file as it was.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import pathlib
import pickle
import platform
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import distributed
from .fingerprint import git_revision
from .seeding import rng_state, set_rng_state
from .spelling import nearest

_LOG = logging.getLogger(__name__)

FORMAT = 1  # raised when old files can no longer be read as they are


class Stateful(Protocol):
    """A model, an optimizer, a schedule: what is saved and restored."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


# -- reading and writing one file ----------------------------------------------------------------------


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that the file is either complete or as it was before.

    Raises:
        ValueError: something in `state` is neither a tensor nor plain data; the message says where.
        OSError: the file could not be written.
    """
    _check_plain(state, "state")
    _write_atomically(Path(path), lambda file: torch.save(dict(state), file))


def load_file(path: str | Path, mapped: bool = False) -> Any:
    """Content of a checkpoint of MixLab or of the lineage, on the CPU, without running code from it.

    Allowed beside tensors and plain data is what published checkpoints hold: argparse.Namespace, yacs
    CfgNode (it becomes a dict), NumPy numbers, and paths. `.safetensors` files are a dict of tensors, those
    of `save_safetensors` one with the weights under `model` and the facts beside them.

    Args:
        mapped: leave the tensors on the disk until they are used (files of before PyTorch 1.6 are read).

    Raises:
        ValueError: there is no such file, it is damaged, or it holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(_missing(path))
    with path.open("rb") as file:
        start = file.read(40)
    if not start:
        raise ValueError(f"checkpoint {path} is empty")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if not start.startswith((b"PK", b"\x80")):
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
    _write_atomically(Path(path), lambda file: file.write(content))


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
        torch.hub.download_url_to_file(url, str(target), progress=False)
    except OSError as error:  # urllib's errors are OSErrors
        return str(error)
    return None


def _write_atomically(path: Path, write: Callable[[Any], None]) -> None:
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


_SUFFIXES = (".pth", ".pt", ".safetensors")


def _missing(path: Path) -> str:
    """Message about a path that is no file, with what its folder has, or it has as a folder."""
    if path.is_dir():
        inside = [p for folder in (path, path / "checkpoints") for p in folder.glob("*.*")]
        found = sorted(str(p) for p in inside if p.suffix in _SUFFIXES)
        return f"checkpoint {path} is a directory: give a file; it has {found or 'none'}"
    if not path.parent.is_dir():
        return f"checkpoint {path} does not exist, nor does its folder"
    names = [p.name for p in path.parent.iterdir() if p.suffix in _SUFFIXES]
    near = nearest(path.name, names)
    found = f"{len(names)} checkpoints, the nearest: {near}" if names else "none"
    return f"checkpoint {path} does not exist; its folder has {found}"


def _numpy_scalar(dtype: np.dtype, raw: bytes = b"") -> Any:
    """A NumPy number of a checkpoint as a Python number; objects, which could hide code, are refused."""
    if dtype.kind not in "biufc":
        raise pickle.UnpicklingError(f"NumPy scalar of type {dtype}")
    return np.frombuffer(raw, dtype=dtype, count=1)[0].item()


# Everything here can only be filled with data. A pair names the class in the file that it stands for.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDG"},
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


# -- where a run starts from ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where weights come from. kind: scratch | weights (evaluate them) | pretrained | resume."""

    kind: str
    path: str
    reason: str  # one line for the log


def choose_source(
    mode: str,
    last: str | Path,
    *,
    resume: str = "",
    pretrained: str = "",
    auto_resume: bool = True,
) -> Source:
    """Decide where weights come from; looks whether files exist, reads and changes nothing.

    Evaluation and timing use an explicit `resume` and nothing else; training continues `last` of its
    own output folder if there is one, else `resume`, else starts from `pretrained`, else from scratch.

    Args:
        mode: train | eval | throughput.
        last: the last.pth of the run's own output folder.

    Raises:
        ValueError: the chosen file does not exist, or there is nothing to evaluate.
    """
    last = Path(last)
    if mode == "train":
        if auto_resume and last.is_file():
            given = (("--resume", resume), ("--pretrained", pretrained))
            named = " and ".join(f"{flag} {path}" for flag, path in given if path)
            unused = f"; not used: {named} (TRAIN.AUTO_RESUME False, or another TAG, would)"
            reason = f"continuing {last} (auto-resume){unused if named else ''}"
            return Source("resume", str(last), reason)
        if resume:
            return Source("resume", _existing(resume), f"continuing {resume} (--resume)")
        if pretrained:
            return Source(
                "pretrained", _existing(pretrained), f"starting from {pretrained} (--pretrained)"
            )
        return Source("scratch", "", "starting from scratch")
    for flag, path in (("--resume", resume), ("--pretrained", pretrained)):
        if path:
            return Source("weights", _existing(path), f"weights of {path} ({flag})")
    if mode == "eval":
        hint = f"; this run's own is {last}" if last.is_file() else ""
        raise ValueError(f"--eval has nothing to evaluate: give --resume CHECKPOINT{hint}")
    return Source("scratch", "", "random weights: neither --resume nor --pretrained is given")


def _existing(path: str) -> str:
    if not is_url(path) and not Path(path).is_file():
        raise ValueError(_missing(Path(path)))
    return path


def check_classes(saved: Any, current: Sequence[str], path: str | Path) -> None:
    """Compare the classes that weights were trained on with those that they will be used for.

    A class that is named by its number has no known name and agrees with any. Other numbers of classes
    are left to the classifier, which does not fit then.

    Args:
        saved: "classes" of a checkpoint; whatever is no list says nothing of them.
        current: those of the data.

    Raises:
        ValueError: these are the same names in another order: labels would not mean the same.
    """
    if not isinstance(saved, list) or len(saved) != len(current):
        return
    differing = [
        label
        for label, (old, new) in enumerate(zip(saved, current, strict=True))
        if old != new and str(label) not in (old, new)
    ]
    if not differing:
        return
    first = differing[0]
    fault = (
        f"{path} was trained on other classes than the data has: label {first} is '{saved[first]}' there "
        f"and '{current[first]}' here ({len(differing)} of {len(current)} differ)"
    )
    if sorted(saved) == sorted(current):
        raise ValueError(f"{fault}; these are the same classes in another order: number them alike")
    _LOG.warning("%s; if they do not mean the same, so do the results not", fault)


def check_training_state(
    state: Any, path: str | Path, parts: Iterable[str], classes: Sequence[str]
) -> None:
    """Look whether a run can be continued from the content of a file.

    Args:
        parts: names of what the run needs from it.
        classes: of the data.

    Raises:
        ValueError: it is no training checkpoint of this format, it lacks a part, or its classes are those of
            the data in another order.
    """
    if not isinstance(state, dict) or state.get("format") != FORMAT or "progress" not in state:
        raise ValueError(
            f"{path} is no training checkpoint of MixLab (format {FORMAT}): its weights alone load "
            "with --pretrained"
        )
    check_classes(state.get("classes"), classes, path)
    for name in parts:
        if state.get(name) is None:
            raise ValueError(
                f"{path} has no '{name}', which this run needs: train with the settings that the "
                "checkpoint was written with, or start from its weights with --pretrained"
            )


def restore(
    part: Any, state: Mapping[str, Any], name: str, path: str | Path, **keywords: Any
) -> None:
    """Load entry `name` of a file's content into a part of a run; ValueError if it does not fit.

    Args:
        keywords: of the part's `load_state_dict`.
    """
    try:
        part.load_state_dict(state[name], **keywords)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"'{name}' of {path} does not fit this run: {error}") from error


# -- the checkpoints of a run --------------------------------------------------------------------------


class Checkpointer:
    """Writes last.pth, best.pth and epoch_N.pth of a run, and restores from them.

    All processes call `save` and `resume` together; rank 0 writes.

    Args:
        folder: usually OUTPUT/<MODEL.NAME>/<TAG>/checkpoints.
        parts: what is saved and restored, by name: model (unwrapped, so that names have no prefix),
            optimizer, scheduler, scaler, ema; None where the run has no such part.
        metric: key of the metrics that selects best.pth; higher is better.
        keep: newest numbered checkpoints that stay; 0 keeps all.
        config_text: YAML text of the run.
        classes: class names of the dataset.
    """

    def __init__(
        self,
        folder: str | Path,
        parts: Mapping[str, Stateful | None],
        *,
        metric: str = "acc1",
        keep: int = 3,
        config_text: str = "",
        classes: Sequence[str] = (),
    ) -> None:
        self.folder = Path(folder)
        self.parts = dict(parts)
        self.metric = metric
        self.keep = keep
        self.best: dict[str, Any] | None = None
        self._run = {
            "config": config_text,
            "classes": [str(name) for name in classes],
            "git": git_revision(),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }
        if distributed.is_main() and self.folder.is_dir():
            for leftover in self.folder.glob(".*.pth.*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)

    @property
    def last(self) -> Path:
        """The file that an interrupted run continues from."""
        return self.folder / "last.pth"

    def save(
        self,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        epoch: int | None = None,
    ) -> bool:
        """Write last.pth; best.pth too if `metrics` improve; epoch_{epoch}.pth too if `epoch` is given.

        Args:
            progress: where training is (epoch, step, position in the epoch), plain data.
            metrics: of an evaluation of exactly these weights; None if there was none.

        Returns:
            Whether this is the best checkpoint so far.

        Raises:
            OSError: rank 0 could not write; raised on every rank, and the old files are intact.
            ValueError: something is neither a tensor nor plain data, or the metric is missing.
        """
        metrics = {
            name: value if type(value) is int else float(value)
            for name, value in (metrics or {}).items()
        }
        improved = self._improves(metrics)
        if improved:
            # Before anything is written: a resumed run must compare with this one, not its precursor.
            self.best = {
                "value": metrics[self.metric],
                "metrics": metrics,
                "progress": dict(progress),
            }
        rng = distributed.all_gather_object(rng_state())
        # On every process: a sharded part is put together by all of them.
        states = {n: None if p is None else p.state_dict() for n, p in self.parts.items()}
        failure: Exception | None = None
        if distributed.is_main():
            state = {
                "format": FORMAT,
                **states,
                "progress": dict(progress),
                "rng": rng,
                "metrics": metrics,
                "best": self.best,
                **self._run,
            }
            try:
                self._write(state, improved, epoch)
            except ValueError as error:  # the others must not wait for a rank 0 that is gone
                failure = error
            except (OSError, RuntimeError) as error:  # torch.save turns a full disk into the latter
                failure = OSError(f"cannot write checkpoints to {self.folder}: {error}")
        failure = distributed.broadcast_object(failure)
        if failure is not None:
            raise failure
        return improved

    def resume(self, path: str | Path) -> dict[str, Any]:
        """Restore all parts and the random generators; returns the saved `progress`.

        Raises:
            ValueError: the file is no training checkpoint of this format, or does not fit the run.
        """
        state = load_file(path)
        used = {name: part for name, part in self.parts.items() if part is not None}
        check_training_state(state, path, used, self._run["classes"])
        for name in self.parts:
            if name not in used and state.get(name) is not None:
                _LOG.warning("%s has '%s', which this run does not use", path, name)
        for name, part in used.items():
            restore(part, state, name, path)
        rank, saved_ranks = distributed.get_rank(), len(state["rng"])
        if saved_ranks == distributed.get_world_size():
            set_rng_state(state["rng"][rank])
        else:
            _LOG.warning(
                "%s was written by %d processes, now there are %d: random generators keep their seed",
                path,
                saved_ranks,
                distributed.get_world_size(),
            )
        self.best = state["best"]
        return state["progress"]

    def _improves(self, metrics: Mapping[str, float]) -> bool:
        if not metrics:
            return False
        if self.metric not in metrics:
            raise ValueError(f"metrics have no '{self.metric}', only {sorted(metrics)}")
        value = metrics[self.metric]
        return not math.isnan(value) and (self.best is None or value > self.best["value"])

    def _write(self, state: dict[str, Any], improved: bool, epoch: int | None) -> None:
        # last.pth is renamed to last: if the process dies before, the resumed run makes the others
        # again, while a last.pth that already knew of a better epoch would never write best.pth.
        names = ["best.pth"] * improved + [f"epoch_{epoch}.pth"] * (epoch is not None)
        files = [self.folder / name for name in names] + [self.last]
        save_checkpoint(files[0], state)
        for path in files[1:]:
            with files[0].open("rb") as source:
                _write_atomically(
                    path, lambda file, source=source: shutil.copyfileobj(source, file)
                )
        if epoch is not None and self.keep > 0:
            numbered = {
                int(match.group(1)): path
                for path in self.folder.glob("epoch_*.pth")
                if (match := re.fullmatch(r"epoch_(\d+)\.pth", path.name))
            }
            # Higher numbers can be of an earlier run in this folder: newest means up to this epoch.
            for number in sorted(n for n in numbered if n <= epoch)[: -self.keep]:
                numbered[number].unlink(missing_ok=True)
