"""What can be known to be wrong before a run writes anything."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from config import MODE_KEYS, output_dir
from data import Checked, check_data, check_evaluation, check_labels
from logger import kept_warnings, muted
from lr_scheduler import build_scheduler
from models import Backbone
from optimizer import build_optimizer
from tasks import build_task
from tasks.classification_report import check_predictions_file
from utils.amp import Amp
from utils.distributed import Runtime, all_gather_object
from utils.files import is_locked, obstacle
from utils.sources import Source

from .build import (
    build_placed,
    check_batch_norm,
    check_weights,
    find_source,
    freeze,
    known_classes,
)
from .planning import make_plan


def check(config: CfgNode, runtime: Runtime) -> None:
    """Stop a run that cannot succeed before it writes anything.

    The model is built without memory behind it; of weights only names and shapes are read, of images their
    masks and heads, and the images of folders, which take long to list, are left to the run.

    What one process finds in its share of the data stops them all: each raises the error of the first that
    has one. Warnings are kept for the run's log.

    Raises:
        ValueError: keys that the data, the task, the model or the optimizer refuse, a model that the task
            cannot train, weights that are missing, damaged, or of another model or other classes, or
            processes that would start from different weights.
        OSError: the data is not there, or something may not be read.
    """
    with kept_warnings():
        share = _on_all(lambda: _check_share(config, runtime))
        answers = all_gather_object((share.source, share.data.labels))
        _check_sources([source for source, _ in answers], output_dir(config))
        shares = [labels for _, labels in answers]
        together = {split: set().union(*(s[split] for s in shares)) for split in share.data.labels}
        check_labels(together, share.data.classes)
        if share.source is not None:
            # The same on all processes by now: what a URL names is fetched by one for all.
            classes = share.data.classes
            _on_all(
                lambda: check_weights(config, share.model, share.source, classes, share.optimizer)
            )


class _Share(NamedTuple):
    """What one process looked at.

    Attributes:
        source: where it would take weights from; None where the mode takes none.
        model: on the meta device.
        optimizer: of that model; None where nothing is trained.
    """

    source: Source | None
    data: Checked
    model: Backbone | None = None
    optimizer: torch.optim.Optimizer | None = None


def _on_all(look: Callable[[], Any]) -> Any:
    """`look()` on every process; the error of the first one that has one is raised by all of them."""
    error = found = None
    try:
        found = look()
    except (ValueError, OSError) as own:
        error = own  # the other processes wait: they must hear of it
    for first in all_gather_object(error):
        if first is not None:
            raise first
    return found


def _check_writable(folder: Path, written: Sequence[str]) -> None:
    """ValueError if a run's folder cannot be made, or if it, or one of what is `written` in it, is locked."""
    if reason := obstacle(folder):
        raise ValueError(f"OUTPUT leads to {folder}, and {reason}: give another --output")
    for path in (folder / name for name in written):
        if is_locked(path):
            raise ValueError(f"{path} cannot be written to: change its mode, or give another --tag")


def _check_sources(sources: Sequence[Source | None], folder: Path) -> None:
    """ValueError unless all processes start from the same weights; those of each, by rank."""
    starts = [None if source is None else (source.kind, source.path) for source in sources]
    for rank, start in enumerate(starts):
        if start != starts[0]:
            raise ValueError(
                f"process {rank} would start from {_described(start)}, process 0 from "
                f"{_described(starts[0])}: the output folder {folder} must be one that all machines share"
            )


def _described(start: tuple[str, str] | None) -> str:
    kind, path = start or ("", "")
    return path or kind or "nothing"


def _check_share(config: CfgNode, runtime: Runtime) -> _Share:
    """What this process can know without the weights."""
    mode = next((key for key in MODE_KEYS if config[key]), "train")
    written = ["checkpoints", "metrics.jsonl", "tensorboard"] if mode == "train" else []
    _check_writable(output_dir(config), [*written, f"log_rank{runtime.rank}.txt"])
    Amp(runtime.device, config.AMP_DTYPE, config.AMP_ENABLE, config.AMP_OPT_LEVEL)
    if mode == "PLAN_MODE":
        with muted():  # it is made again, and says it then
            make_plan(config, runtime)
        return _Share(None, Checked([], {}))
    if mode in ("train", "EVAL_MODE"):
        look = check_data if mode == "train" else check_evaluation
        data = look(config, rank=runtime.rank, world_size=runtime.world_size)
        num_classes = len(data.classes)
        task = build_task(config, num_classes)
    else:
        data, num_classes = Checked([], {}), known_classes(config)
    optimizer = None
    with torch.device("meta"):
        model = build_placed(config, num_classes, torch.device("meta"))
    if mode == "train":
        task.check(model)
        check_batch_norm(config, model, runtime)
        freeze(config, model)
        optimizer = build_optimizer(config, model, runtime.world_size)
        with muted():  # how long an epoch is, only the data says
            build_scheduler(config, optimizer, steps_per_epoch=1)
    if mode == "EVAL_MODE" and config.TEST.PREDICTIONS:
        check_predictions_file(config.TEST.PREDICTIONS, config.TEST.REPORT)
    # Timing and counting take weights if they are given, and need none.
    kind = {"train": "train", "EVAL_MODE": "eval"}.get(mode, "throughput")
    source = find_source(config, kind, output_dir(config) / "checkpoints" / "last.pth")
    return _Share(source, data, model, optimizer)
