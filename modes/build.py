"""What a run is made of, built from the config: models on their devices, weights, averages."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from yacs.config import CfgNode

from config import dump, output_dir
from data import dataset_num_classes, published_num_classes
from logger import create_logger, muted
from models import Backbone, build_model
from models.layers.tokens import to_pair
from models.pretrained import LoadReport, has_averaged_weights, has_both_weights, load_pretrained
from tasks import sizes_vary
from utils.amp import Amp
from utils.checkpoint import check_training_state, restore
from utils.checkpoint_files import fetch, load_file
from utils.distributed import Runtime
from utils.ema import ModelEma
from utils.fingerprint import fingerprint
from utils.memory import keep_freed_memory
from utils.names import is_under
from utils.seeding import seed_everything, set_deterministic
from utils.sources import Source, check_classes, choose_source
from utils.yaml_files import differing

_LOG = logging.getLogger(__name__)


def set_up(config: CfgNode, runtime: Runtime) -> Amp:
    """Logger, seeds and numerics of this process, before anything is built."""
    create_logger(output_dir(config), runtime.rank, config.MODEL.NAME)
    seed_everything(config.SEED)  # the same on all processes, for the same initial weights
    set_deterministic(config.DETERMINISTIC, sizes_vary(config))
    if runtime.device.type == "cpu":
        keep_freed_memory()
    amp = Amp(runtime.device, config.AMP_DTYPE, config.AMP_ENABLE, config.AMP_OPT_LEVEL)
    amp.set_float32_precision()
    return amp


def log_start(config: CfgNode, runtime: Runtime) -> None:
    """What a log must say for its numbers to mean something: every setting, the machine, the versions."""
    _LOG.info("config\n%s", dump(config).rstrip())
    facts = fingerprint(runtime.device) | dict(processes=runtime.world_size)
    shown = ("gpu", "cpu", "threads", "processes", "python", "torch", "timm", "commit")
    _LOG.info("machine: %s", ", ".join(f"{key} {facts[key]}" for key in shown if key in facts))


def build_placed(config: CfgNode, num_classes: int | None, device: torch.device) -> Backbone:
    """The model on its device, in its memory layout; None classes keeps the config's number."""
    overrides = {} if num_classes is None else dict(num_classes=num_classes)
    layout = torch.channels_last if config.CHANNELS_LAST else torch.preserve_format
    return build_model(config, **overrides).to(device, memory_format=layout)


def wrap(config: CfgNode, model: nn.Module, runtime: Runtime) -> nn.Module:
    """The model as the training loop calls it: gradients averaged over processes, compiled."""
    if runtime.world_size > 1 and not config.TRAIN.FSDP:
        devices = [runtime.device.index] if runtime.device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    return compiled(config, model)


def synchronise_batch_norm(config: CfgNode, model: Backbone, runtime: Runtime) -> Backbone:
    """The model with batch statistics over all processes, if TRAIN.SYNC_BN asks for it."""
    if _synchronises(config, runtime):
        return converted_to_sync(model)
    if config.TRAIN.SYNC_BN and runtime.world_size > 1:
        _LOG.warning("TRAIN.SYNC_BN is left out: PyTorch synchronises batch norm on GPUs only")
    return model


def converted_to_sync(model: Backbone) -> Backbone:
    """The model with `SyncBatchNorm` where its paper has it, in place."""
    if not model.synchronised:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for path in model.synchronised:
        model.set_submodule(
            path, nn.SyncBatchNorm.convert_sync_batchnorm(model.get_submodule(path))
        )
    return model


def check_batch_norm(config: CfgNode, model: Backbone, runtime: Runtime) -> None:
    """ValueError if the model's batch norms would see fewer images than its `min_batch`."""
    needed = model.min_batch
    seen = config.DATA.BATCH_SIZE * (runtime.world_size if _synchronises(config, runtime) else 1)
    if seen < needed:
        raise ValueError(
            f"DATA.BATCH_SIZE={config.DATA.BATCH_SIZE}: the batch norms of MODEL.HEAD.TYPE="
            f"'{config.MODEL.HEAD.TYPE}' need {needed} images or more in training: set DATA.BATCH_SIZE to "
            f"{needed}, or TRAIN.SYNC_BN True with several GPUs (images accumulated one by one do not help)"
        )
    if seen == 1 and not sizes_vary(config):
        _check_single_image(config, model)


def _check_single_image(config: CfgNode, model: Backbone) -> None:
    """ValueError if some batch norm would see one pixel of one image, which has no variance."""
    images = torch.empty(1, config.MODEL.IN_CHANS, *to_pair(config.DATA.IMG_SIZE), device="meta")
    try:
        with torch.no_grad():
            model.train()(images)
    except (NotImplementedError, TypeError):
        return  # a model that must see numbers, or what is in the images
    except ValueError as error:
        if "per channel" not in str(error):  # PyTorch's words for it
            raise
        raise ValueError(
            f"DATA.BATCH_SIZE=1 and DATA.IMG_SIZE={config.DATA.IMG_SIZE}: the last batch norms of "
            f"{type(model).__name__} would see one pixel of one image, which has no variance: set "
            "DATA.BATCH_SIZE to 2 or more, or a larger DATA.IMG_SIZE"
        ) from error


def _synchronises(config: CfgNode, runtime: Runtime) -> bool:
    return config.TRAIN.SYNC_BN and runtime.world_size > 1 and runtime.device.type == "cuda"


def freeze(config: CfgNode, model: Backbone) -> None:
    """Take out of training what TRAIN.FREEZE and TRAIN.FREEZE_DEPTH name."""
    frozen = model.freeze(config.TRAIN.FREEZE, config.TRAIN.FREEZE_DEPTH)
    if config.TRAIN.FREEZE_BN:
        model.freeze_batch_norms()
    if frozen:
        total = sum(1 for _ in model.parameters())
        _LOG.info(
            "frozen: %d of %d parameters, %s ... %s", len(frozen), total, frozen[0], frozen[-1]
        )


def is_sharded(config: CfgNode, runtime: Runtime) -> bool:
    """Whether TRAIN.FSDP spreads the model over the processes; one process has nobody to share with."""
    if config.TRAIN.FSDP and runtime.world_size == 1:
        _LOG.warning("TRAIN.FSDP is left out: there is one process, so there is nothing to share")
    return config.TRAIN.FSDP and runtime.world_size > 1


def average_of(config: CfgNode, model: nn.Module, foreach: bool = True) -> ModelEma | None:
    """The moving average of the model, if TRAIN.EMA.ENABLE asks for one."""
    keys = config.TRAIN.EMA
    return ModelEma(model, keys.DECAY, keys.WARMUP, foreach=foreach) if keys.ENABLE else None


def hyper_parameters(config: CfgNode, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the config says of each parameter group, and no schedule changes, as it does the rate."""
    names = ["betas", "eps", "momentum", "nesterov"]
    if config.TRAIN.WEIGHT_DECAY_END is None:
        names.append("weight_decay")
    return [
        {k: group[k] for k in names if k in group} | dict(lr_scale=group.get("lr_scale", 1.0))
        for group in optimizer.param_groups
    ]


def load_weights(
    config: CfgNode,
    model: nn.Module,
    source: Source,
    classes: Sequence[str] = (),
    mapped: bool = False,
    content: Any = None,
) -> LoadReport:
    """Weights of a file of ours or an official one; only a fresh run may replace the classifier.

    Args:
        classes: of the data, where they must be those that the weights were trained on.
        mapped: leave the tensors on the disk until they are used.
        content: of the file, where it is known; None reads it.
    """
    if content is None:
        content = load_file(fetch(source.path), mapped)
    fresh = source.kind == "pretrained"
    if not fresh and isinstance(content, dict):
        check_classes(content.get("classes"), classes, source.path)
    scored = config.TRAIN.EMA.ENABLE and config.TRAIN.EMA.EVALUATE
    averaged = config.MODEL.PRETRAINED_EMA or (scored and not fresh)
    if averaged and not has_averaged_weights(content):
        _LOG.warning("%s has no averaged weights: taking the plain ones", source.path)
        averaged = False
    elif (
        config.EVAL_MODE and not (averaged or config.TRAIN.EMA.ENABLE) and has_both_weights(content)
    ):
        _LOG.warning(
            "%s has averaged weights too, which may be those that its scores are of: they are taken with "
            "TRAIN.EMA.ENABLE True, as in training, or MODEL.PRETRAINED_EMA True",
            source.path,
        )
    return load_pretrained(
        model,
        content,
        name=source.path,
        allow_partial=config.MODEL.PRETRAINED_PARTIAL,
        use_ema=averaged,
        new_head=fresh,
    )


def load_trained(config: CfgNode, device: torch.device) -> tuple[Backbone, list[str]]:
    """The model with the weights of --resume or --pretrained, in eval mode, and its classes' names.

    Names are those that the file holds; there may be none.

    Raises:
        ValueError: neither is given, or the weights do not fit.
    """
    last = output_dir(config) / "checkpoints" / "last.pth"
    source = source_of(config, "throughput", last)
    if source.kind == "scratch":
        own = f", such as this run's own {last}" if last.is_file() else ""
        raise ValueError(f"the weights are fresh and would guess: give --resume CHECKPOINT{own}")
    content = load_file(fetch(source.path), mapped=True)
    names = content.get("classes") if isinstance(content, Mapping) else None
    names = [str(name) for name in names] if isinstance(names, Sequence) else []
    model = build_placed(config, len(names) or known_classes(config), device).eval()
    load_weights(config, model, source, content=content)
    return model, names


# Keys of MODEL that say nothing of the shape of a model.
_FREE = ("MODEL.NAME", "MODEL.RESUME", "MODEL.PRETRAINED")


def check_weights(
    config: CfgNode,
    model: nn.Module,
    source: Source,
    classes: Sequence[str] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Look whether a run can start from `source`: names, shapes and classes, without reading the weights.

    What the run will warn of is not said. What a URL names is fetched: all processes call this.

    Args:
        model: on the meta device; it is not to be used afterwards.
        optimizer: of that model, for a run that trains.

    Raises:
        ValueError: the file is damaged or no checkpoint, or does not fit the model or the data.
    """
    if source.kind == "scratch":
        return
    with muted():
        if source.kind != "resume":
            load_weights(config, model, source, classes, mapped=True)
            return
        state = load_file(fetch(source.path), mapped=True)
        parts = ["model", "optimizer", "scheduler", "scaler", *["ema"] * config.TRAIN.EMA.ENABLE]
        check_training_state(state, source.path, parts, classes)
        _check_optimizer(config, state, source.path)
        try:
            restore(model, state, "model", source.path, assign=True)
        except ValueError as error:
            raise _misfit(config, state, source.path, classes, error) from error
        if optimizer is not None:
            _check_groups(optimizer, state["optimizer"], source.path)


def _misfit(
    config: CfgNode,
    state: Mapping[str, Any],
    path: str,
    classes: Sequence[str],
    error: ValueError,
) -> ValueError:
    """What to say where a run's model is not that of its file: the settings that differ, if known."""
    settings = differing(state.get("config") or "MODEL: {}", dump(config))
    found = [
        f"{name} {there!r} there, {here!r} here"
        for name, (there, here) in settings.items()
        if is_under(name, "MODEL") and name not in _FREE
    ]
    saved = state.get("classes") or []
    if len(saved) != len(classes):
        found.append(f"{len(saved)} classes there, {len(classes)} here")
    first, *more = [line.strip() for line in str(error).splitlines()]
    reasons = found or [*more[:2], *[f"and {len(more) - 2} more"] * (len(more) > 2)]
    return ValueError(
        f"{first} {'; '.join(reasons)}. Train with the settings of {path}, or start a run of its own with "
        "another --tag"
    )


def _check_optimizer(config: CfgNode, state: Mapping[str, Any], path: str) -> None:
    """ValueError if the training state of a file is that of another optimizer than the config's."""
    if not state.get("config"):
        return
    own = config.TRAIN.OPTIMIZER.NAME
    saved = yaml.safe_load(state["config"])["TRAIN"]["OPTIMIZER"]["NAME"]
    if saved.lower() != own.lower():
        raise ValueError(
            f"TRAIN.OPTIMIZER.NAME='{own}' cannot go on with the state of '{saved}' in {path}: train with "
            f"'{saved}', or start a run with another --tag, from these weights with --pretrained {path}"
        )


def _check_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], path: str) -> None:
    """ValueError if a file's parameter groups hold others: PyTorch gives states to parameters by position."""
    theirs, ours = (
        [list(group.get("param_names", ())) for group in groups]
        for groups in (saved["param_groups"], optimizer.param_groups)
    )
    if theirs == ours or not any(theirs):  # nothing but our own files has names
        return
    pairs = itertools.zip_longest(itertools.chain(*theirs), itertools.chain(*ours))
    old, new = next(((a, b) for a, b in pairs if a != b), (None, None))
    where = f": where it has '{old}', this run has '{new}'" if old != new else ""
    raise ValueError(
        f"{path} has {len(theirs)} groups of parameters and this run {len(ours)}, not of the same "
        f"parameters{where}. Resume with its TRAIN.FREEZE, FREEZE_DEPTH, LAYER_DECAY, LR_MULTIPLIERS and "
        f"NO_WEIGHT_DECAY, or start from its weights with another --tag and --pretrained {path}"
    )


def find_source(config: CfgNode, mode: str, last: Path) -> Source:
    """Where weights come from; ValueError if they are not there."""
    return choose_source(
        mode,
        last,
        resume=config.MODEL.RESUME,
        pretrained=config.MODEL.PRETRAINED,
        auto_resume=config.TRAIN.AUTO_RESUME,
    )


def source_of(config: CfgNode, mode: str, last: Path) -> Source:
    """Where weights come from, said in one log line."""
    source = find_source(config, mode, last)
    _LOG.info("weights: %s", source.reason)
    return source


def known_classes(config: CfgNode) -> int | None:
    """Classes of the data, at hand or by its name; None leaves the config's number, or 1000."""
    try:
        return dataset_num_classes(config)
    except FileNotFoundError:
        configured = config.MODEL.NUM_CLASSES is not None
        return None if configured else published_num_classes(config.DATA.DATASET, config.TASK)


def compiled(config: CfgNode, model: nn.Module) -> nn.Module:
    """The model, compiled if COMPILE says so."""
    return torch.compile(model, mode=config.COMPILE_MODE) if config.COMPILE else model
