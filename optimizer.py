"""Optimizers and their parameter groups: weight decay, layer-wise decay, learning-rate multipliers."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from utils.distributed import get_world_size
from utils.spelling import nearest
from utils.wrappers import unwrap

REFERENCE_BATCH = 512  # images per step that TRAIN.BASE_LR is given for
OWN_OPTIMIZERS = ("adamw", "sgd", "fused_adam", "fused_lamb")
# Shared defaults of TRAIN.OPTIMIZER; other optimizers keep their own unless the user sets these keys.
DEFAULT_EPS, DEFAULT_BETAS = 1e-8, (0.9, 0.999)


def scaled_lr(base: float, batch: int, world: int, accumulation: int, rule: str) -> float:
    """Learning rate for the images that one optimizer step really sees.

    Args:
        base: rate for 512 images per step.
        batch: images per process and forward pass.
        world: processes.
        accumulation: forward passes per step; 0 means 1, as in DFvT's configs.
        rule: 'linear' multiplies by the images per step / 512, 'none' returns `base`.
    """
    if rule not in ("linear", "none"):
        raise ValueError(f"TRAIN.LR_SCALING='{rule}' must be one of ['linear', 'none']")
    if rule == "none":
        return base
    return base * batch * world * max(accumulation, 1) / REFERENCE_BATCH


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters grouped by weight decay and learning-rate factor, in the model's order.

    No decay for tensors of at most one dimension, names that end in `.bias`, and full names in
    `model.no_weight_decay()`. The factor is that of the longest matching prefix in
    `model.lr_multipliers()`, times `layer_decay ** (layers above)`.

    Returns:
        dicts with `params` (list of (name, parameter), as torch optimizers take), `weight_decay`, and
        `lr_scale`, which timm's schedulers multiply into the rate.

    Raises:
        ValueError: nothing to train, or layer decay for a model without `layer_id`.
    """
    model = unwrap(model)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    multipliers = model.lr_multipliers() if hasattr(model, "lr_multipliers") else {}
    if layer_decay != 1.0 and not hasattr(model, "layer_id"):
        raise ValueError(
            f"TRAIN.LAYER_DECAY={layer_decay}: {type(model).__name__} has no layer_id(); set it to 1.0"
        )
    groups: dict[tuple[float, float], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        no_decay = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
        scale = _multiplier(name, multipliers)
        if layer_decay != 1.0:
            scale *= layer_decay ** (model.num_layers() - 1 - model.layer_id(name))
        key = (scale, 0.0 if no_decay else weight_decay)
        groups.setdefault(key, []).append((name, parameter))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    return [
        dict(params=members, weight_decay=decay, lr_scale=scale)
        for (scale, decay), members in groups.items()
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
        ValueError: unknown name, or Apex is missing for a fused one.
    """
    train, options = config.TRAIN, config.TRAIN.OPTIMIZER
    lr = scaled_lr(
        train.BASE_LR,
        config.DATA.BATCH_SIZE,
        get_world_size() if world_size is None else world_size,
        train.ACCUMULATION_STEPS,
        train.LR_SCALING,
    )
    groups = param_groups(model, train.WEIGHT_DECAY, train.LAYER_DECAY)
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
    return optimizer


def _multiplier(name: str, multipliers: Mapping[str, float]) -> float:
    matches = [p for p in multipliers if name == p or name.startswith(p + ".")]
    return multipliers[max(matches, key=len)] if matches else 1.0


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
