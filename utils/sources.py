"""Where a run starts from, and whether what it finds there is of its classes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint_files import is_url, missing_file

_LOG = logging.getLogger(__name__)


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
            unused = f"; not used: {named} (another TAG would, or TRAIN.AUTO_RESUME False)"
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
        raise ValueError(missing_file(Path(path)))
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
