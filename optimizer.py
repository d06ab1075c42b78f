"""Optimizers and their parameter groups: weight decay, layer-wise decay, learning-rate multipliers."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from utils.distributed import get_world_size
from utils.spelling import nearest
from utils.wrappers import unwrap

REFERENCE_BATCH = 512  # images per step that TRAIN.BASE_LR is given for
SCALINGS = ("linear", "base", "none")
OWN_OPTIMIZERS = ("adamw", "sgd", "fused_adam", "fused_lamb")
# Shared defaults of TRAIN.OPTIMIZER; other optimizers keep their own unless the user sets these keys.
DEFAULT_EPS, DEFAULT_BETAS = 1e-8, (0.9, 0.999)


class Rates(NamedTuple):
    """Learning rates of a run: after the warm-up, at its start, and at the end of the schedule."""

    base: float
    warmup: float
    minimum: float


def scaled_lr(base: float, batch: int, world: int, accumulation: int, rule: str) -> float:
    """Learning rate for the images that one optimizer step really sees.

    Args:
        base: rate for 512 images per step.
        batch: images per process and forward pass.
        world: processes.
        accumulation: forward passes per step; 0 means 1, as in DFvT's configs.
        rule: 'linear' and 'base' multiply by the images per step / 512, 'none' returns `base`.
    """
    if rule not in SCALINGS:
        raise ValueError(f"TRAIN.LR_SCALING='{rule}' must be one of {list(SCALINGS)}")
    if rule == "none":
        return base
    return base * batch * world * max(accumulation, 1) / REFERENCE_BATCH


def build_rates(config: Any, world_size: int | None = None) -> Rates:
    """The scaled rates of a config: all three with LR_SCALING 'linear', as in Swin, or one, as in DeiT.

    Args:
        config: keys TRAIN and DATA.BATCH_SIZE.
        world_size: processes; None asks the process group.

    Raises:
        ValueError: unknown LR_SCALING.
    """
    train, rule = config.TRAIN, config.TRAIN.LR_SCALING
    world = get_world_size() if world_size is None else world_size
    images = config.DATA.BATCH_SIZE, world, train.ACCUMULATION_STEPS
    ends = "none" if rule == "base" else rule
    return Rates(
        scaled_lr(train.BASE_LR, *images, rule),
        scaled_lr(train.WARMUP_LR, *images, ends),
        scaled_lr(train.MIN_LR, *images, ends),
    )


def param_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    lr_multipliers: Sequence[str] = (),
    no_weight_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Trainable parameters grouped by weight decay and learning-rate factor, in the model's order.

    No decay for tensors of at most one dimension, names that end in `.bias`, full names in
    `model.no_weight_decay()`, and names that `no_weight_decay` covers. The factor is that of the longest
    matching prefix in `model.lr_multipliers()`, times those of `lr_multipliers`, times
    `layer_decay ** (layers above)`.

    Args:
        lr_multipliers: "name=factor"; a name covers the parameters below it, and may be a pattern with
            `*` for whole parameter names ("*.router.*=0.1").
        no_weight_decay: names or patterns of the same kind.

    Returns:
        dicts with `params` (list of (name, parameter), as torch optimizers take), `weight_decay`,
        `lr_scale`, which timm's schedulers multiply into the rate, and `wd_scale`, 0 where nothing decays.

    Raises:
        ValueError: nothing to train, layer decay for a model without `layer_id`, or a name that covers no
            parameter.
    """
    model = unwrap(model)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    multipliers = model.lr_multipliers() if hasattr(model, "lr_multipliers") else {}
    if layer_decay != 1.0 and not hasattr(model, "layer_id"):
        raise ValueError(
            f"TRAIN.LAYER_DECAY={layer_decay}: {type(model).__name__} has no layer_id(); set it to 1.0"
        )
    names = [name for name, _ in model.named_parameters()]
    factors = dict(_name_and_factor(entry) for entry in lr_multipliers)
    _check_cover("TRAIN.LR_MULTIPLIERS", factors, names)
    _check_cover("TRAIN.NO_WEIGHT_DECAY", no_weight_decay, names)
    groups: dict[tuple[float, float], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        no_decay = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
        no_decay = no_decay or any(_covers(pattern, name) for pattern in no_weight_decay)
        scale = _multiplier(name, multipliers)
        for pattern, factor in factors.items():
            scale *= factor if _covers(pattern, name) else 1.0
        if layer_decay != 1.0:
            scale *= layer_decay ** (model.num_layers() - 1 - model.layer_id(name))
        groups.setdefault((scale, 0.0 if no_decay else 1.0), []).append((name, parameter))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    return [
        dict(params=members, weight_decay=weight_decay * decays, lr_scale=scale, wd_scale=decays)
        for (scale, decays), members in groups.items()
    ]


def build_optimizer(
    config: Any, model: nn.Module, world_size: int | None = None
) -> torch.optim.Optimizer:
    """The optimizer that TRAIN.OPTIMIZER.NAME names, with the scaled learning rate.

    Every group's `lr` is the scaled base rate; the schedule multiplies `lr_scale` in.

    Args:
        config: keys TRAIN and DATA.BATCH_SIZE.
        model: on its device already, so that the fused kernels can be chosen.
        world_size: processes; None asks the process group.

    Raises:
        ValueError: unknown name, Apex is missing for a fused one, or what `param_groups` refuses.
    """
    train, options = config.TRAIN, config.TRAIN.OPTIMIZER
    lr = build_rates(config, world_size).base
    groups = param_groups(
        model,
        train.WEIGHT_DECAY,
        train.LAYER_DECAY,
        train.LR_MULTIPLIERS,
        train.NO_WEIGHT_DECAY,
    )
    name, betas = options.NAME.lower(), tuple(options.BETAS)
    if name in OWN_OPTIMIZERS and len(betas) != 2:
        raise ValueError(f"TRAIN.OPTIMIZER.BETAS={options.BETAS}: '{name}' takes two")
    if name == "adamw":
        fused = _on_gpu(groups)
        optimizer = torch.optim.AdamW(groups, lr=lr, eps=options.EPS, betas=betas, fused=fused)
    elif name == "sgd":
        momentum = options.MOMENTUM
        optimizer = torch.optim.SGD(
            groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=_on_gpu(groups)
        )
    elif name in ("fused_adam", "fused_lamb"):
        optimizer = _apex_optimizer(name)(groups, lr=lr, eps=options.EPS, betas=betas)
    else:
        optimizer = _timm_optimizer(options.NAME, groups, lr, options)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["initial_lr"] = lr  # what the schedule multiplies lr_scale into
    if name in ("adamw", "sgd"):
        optimizer.register_load_state_dict_pre_hook(_keep_kernels)
    return optimizer


def _keep_kernels(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to load, in which the kernels are those of this run: a file may be from another device."""
    saved, own = state["param_groups"], optimizer.param_groups
    if len(saved) != len(own):
        return state  # the optimizer says what does not fit
    groups = [
        old | {name: new[name] for name in ("fused", "foreach") if name in new}
        for old, new in zip(saved, own, strict=True)
    ]
    return state | dict(param_groups=groups)


def _multiplier(name: str, multipliers: Mapping[str, float]) -> float:
    matches = [p for p in multipliers if name == p or name.startswith(p + ".")]
    return multipliers[max(matches, key=len)] if matches else 1.0


def _name_and_factor(entry: str) -> tuple[str, float]:
    """ "head=10" -> ("head", 10.0)."""
    name, separator, text = entry.rpartition("=")
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    if not (separator and name and 0 <= factor < float("inf")):
        raise ValueError(
            f"TRAIN.LR_MULTIPLIERS: '{entry}' must be 'name=factor' with a factor of at least 0, "
            "for instance 'head=10' or '*.router.*=0.1'"
        )
    return name, factor


def _covers(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def _check_cover(key: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """ValueError for a name of the config that is no parameter's."""
    for pattern in patterns:
        if not any(_covers(pattern, name) for name in names):
            parts = [name.split(".") for name in names]
            known = dict.fromkeys(".".join(p[: i + 1]) for p in parts for i in range(len(p)))
            raise ValueError(
                f"{key}: '{pattern}' covers no parameter of the model; did you mean one of "
                f"{nearest(pattern, known)[:3]}? (`*` stands for any text: '*.{pattern}.*')"
            )


def _on_gpu(groups: list[dict[str, Any]]) -> bool | None:
    """True where the fused kernel runs; None leaves the choice to PyTorch."""
    return all(p.is_cuda for group in groups for _, p in group["params"]) or None


def _apex_optimizer(name: str) -> Any:
    try:
        from apex.optimizers import FusedAdam, FusedLAMB
    except ImportError as error:
        raise ValueError(
            f"TRAIN.OPTIMIZER.NAME='{name}' needs NVIDIA Apex, built from github.com/NVIDIA/apex (the "
            "'apex' on PyPI is another package); 'adamw' is fused on a GPU by PyTorch itself, and 'lamb' "
            "is timm's"
        ) from error
    return {"fused_adam": FusedAdam, "fused_lamb": FusedLAMB}[name]


def _timm_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, options: Any
) -> torch.optim.Optimizer:
    known = list_optimizers()
    if name.lower().removeprefix("lookahead_") not in known:
        raise ValueError(
            f"TRAIN.OPTIMIZER.NAME='{name}' is unknown; did you mean one of "
            f"{nearest(name, [*OWN_OPTIMIZERS, *known])[:3]}? Own: {list(OWN_OPTIMIZERS)}, "
            "all others: timm.optim.list_optimizers()"
        )
    # Lion, Adan and others have betas of their own, which the shared defaults must not replace.
    given = {}
    if options.EPS != DEFAULT_EPS:
        given["eps"] = options.EPS
    if tuple(options.BETAS) != DEFAULT_BETAS:
        given["betas"] = tuple(options.BETAS)
    try:
        optimizer = create_optimizer_v2(groups, opt=name, lr=lr, momentum=options.MOMENTUM, **given)
    except (AssertionError, ImportError) as error:  # a package or a GPU is missing
        raise ValueError(f"TRAIN.OPTIMIZER.NAME='{name}' cannot run here: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(
            f"TRAIN.OPTIMIZER.NAME='{name}' needs second-order gradients, which training does not compute"
        )
    return optimizer
