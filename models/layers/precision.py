"""Regions that compute in the precision of their inputs."""

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
