"""The state dict in the content of a checkpoint, by the names of the model."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dense import BACKBONE
from .report import short

_LOG = logging.getLogger(__name__)

_CONTAINERS = ("model", "state_dict", "module")
_EMA_CONTAINERS = ("ema", "model_ema", "state_dict_ema")
# DDP, torch.compile, Lightning, contrastive and masked pre-training (MoBY, SimMIM), detectors.
_PREFIXES = ("module", "_orig_mod", "model", "encoder", "backbone", "bottom_up")


def has_averaged_weights(content: Any) -> bool:
    """Whether a checkpoint's content has averaged weights, so that `use_ema` would find them."""
    return isinstance(content, Mapping) and any(
        isinstance(content.get(key), Mapping) for key in _EMA_CONTAINERS
    )


def has_both_weights(content: Any) -> bool:
    """Whether a checkpoint's content has averaged weights beside those that were trained."""
    return has_averaged_weights(content) and any(key in content for key in _CONTAINERS)


def find_weights(
    content: Any, use_ema: bool = False, name: str = "the checkpoint"
) -> tuple[dict[str, Tensor], str]:
    """The state dict inside a checkpoint's content, and where it was (` [model]`).

    Averaged weights are taken without `use_ema` if they are the only ones.

    Raises:
        ValueError: there is none, no averaged one although `use_ema`, or several averaged ones only.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}, not a dict of tensors")
    keys = _EMA_CONTAINERS if use_ema else _CONTAINERS
    for key in keys:
        if isinstance(content.get(key), Mapping):
            # The averaged weights can be wrapped once more, as in {"model_ema": {"module": ...}}.
            inner, where = find_weights(content[key], False, name)
            return inner, f" [{key}]{where}"
    if use_ema:
        raise ValueError(
            f"{name} has no averaged weights under any of {list(keys)}; "
            f"it has {short(sorted(map(str, content)))}: set MODEL.PRETRAINED_EMA False"
        )
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        averaged = [key for key in _EMA_CONTAINERS if isinstance(content.get(key), Mapping)]
        if len(averaged) == 1:
            _LOG.info("%s has averaged weights only: taking '%s'", name, averaged[0])
            return find_weights(content, True, name)
        nested = sorted(str(key) for key, value in content.items() if _holds_tensors(value))
        hint = (
            f"; MODEL.PRETRAINED_EMA True takes the first of the averaged ones, {averaged}"
            if averaged
            else f"; {nested} hold tensors: choose one, and convert the file once, as in "
            f"torch.save({{'model': torch.load(path)['{nested[0]}']}}, new_path)"
            if nested
            else ""
        )
        raise ValueError(
            f"{name} has no weights: none of {list(keys)} and no tensor, "
            f"only {short(sorted(map(str, content)))}{hint}"
        )
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ValueError(
                f"{name}: {key} is {kind}, models hold plain numbers: convert it, by .to_dense() or "
                ".dequantize()"
            )
    return tensors, ""


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def strip_prefixes(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Any],
    name: str = "the checkpoint",
    *,
    keep_backbone: bool = False,
) -> dict[str, Tensor]:
    """Take wrappers' prefixes off names, as often as they are there, until the model knows the name.

    Args:
        keep_backbone: `backbone.` is a part of the model, and no wrapper.

    Raises:
        ValueError: two tensors end up with one name.
    """
    prefixes = set(_PREFIXES) - ({BACKBONE} if keep_backbone else set())
    stripped: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in weights.items():
        place = f"{BACKBONE}." if keep_backbone and key.startswith(f"{BACKBONE}.") else ""
        rest = key.removeprefix(place)
        while place + rest not in own and rest.split(".", 1)[0] in prefixes and "." in rest:
            rest = rest.split(".", 1)[1]
        short = place + rest
        if short in stripped:
            raise ValueError(
                f"{name}: {key} and {origin[short]} are both '{short}' without their prefixes; "
                "save the part that you want into a file of its own"
            )
        stripped[short], origin[short] = tensor, key
    return stripped
