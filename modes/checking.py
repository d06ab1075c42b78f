"""What can be known to be wrong before a run writes anything."""

import torch
from yacs.config import CfgNode

from config import MODE_KEYS, output_dir
from data import check_data, check_evaluation
from optimizer import build_optimizer
from tasks import build_task
from tasks.classification_report import check_predictions_file
from utils.amp import Amp
from utils.distributed import Runtime, all_gather_object

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

    The model is built without memory behind it; no image is read, of weights only names and shapes, and the
    images of folders, which take long to list, are left to the run.

    What one process finds in its share of the data stops them all: each raises the error of the first that
    has one.

    Raises:
        ValueError: keys that the data, the task, the model or the optimizer refuse, a model that the task
            cannot train, or weights that are missing, damaged, or of another model or other classes.
        FileNotFoundError: the data is not there.
    """
    found = None
    try:
        _check(config, runtime)
    except (ValueError, FileNotFoundError) as error:
        found = error  # the other processes wait: they must hear of it
    for error in all_gather_object(found):
        if error is not None:
            raise error


def _check(config: CfgNode, runtime: Runtime) -> None:
    """What this process can know."""
    Amp(runtime.device, config.AMP_DTYPE, config.AMP_ENABLE, config.AMP_OPT_LEVEL)
    mode = next((key for key in MODE_KEYS if config[key]), "train")
    if mode == "PLAN_MODE":
        make_plan(config, runtime)
        return
    if mode in ("train", "EVAL_MODE"):
        look = check_data if mode == "train" else check_evaluation
        classes = look(config, rank=runtime.rank, world_size=runtime.world_size)
        num_classes = len(classes)
        task = build_task(config, num_classes)
    else:
        classes, num_classes = [], known_classes(config)
    with torch.device("meta"):
        model = build_placed(config, num_classes, torch.device("meta"))
    if mode == "train":
        task.check(model)
        check_batch_norm(config, model, runtime)
        freeze(config, model)
        build_optimizer(config, model, runtime.world_size)
    if mode == "EVAL_MODE" and config.TEST.PREDICTIONS:
        check_predictions_file(config.TEST.PREDICTIONS)
    # Timing and counting take weights if they are given, and need none.
    kind = {"train": "train", "EVAL_MODE": "eval"}.get(mode, "throughput")
    source = find_source(config, kind, output_dir(config) / "checkpoints" / "last.pth")
    check_weights(config, model, source, classes)
