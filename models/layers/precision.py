"""The precision that autocast gives to products, and regions without it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off where `x` is; the meta device has no autocast to turn off.

    Where it is off already nothing is entered: exported programs cannot be saved with such regions.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that autocast gives to `x` in a matrix product; it leaves float64 as it is."""
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
