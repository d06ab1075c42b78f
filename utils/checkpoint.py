"""Checkpoints of a run: what they hold, when they are written, and how a run goes on from one."""

import logging
import math
import platform
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from . import distributed
from .checkpoint_files import load_file, save_checkpoint, write_atomically
from .fingerprint import git_revision
from .seeding import rng_state, set_rng_state
from .sources import check_classes

_LOG = logging.getLogger(__name__)

FORMAT = 1  # raised when old files can no longer be read as they are


class Stateful(Protocol):
    """A model, an optimizer, a schedule: what is saved and restored."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


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
                write_atomically(path, lambda file, source=source: shutil.copyfileobj(source, file))
        if epoch is not None and self.keep > 0:
            numbered = {
                int(match.group(1)): path
                for path in self.folder.glob("epoch_*.pth")
                if (match := re.fullmatch(r"epoch_(\d+)\.pth", path.name))
            }
            # Higher numbers can be of an earlier run in this folder: newest means up to this epoch.
            for number in sorted(n for n in numbered if n <= epoch)[: -self.keep]:
                numbered[number].unlink(missing_ok=True)
