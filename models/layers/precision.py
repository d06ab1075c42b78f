"""Regions that compute in the precision of their inputs."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off where `x` is; the meta device has no autocast to turn off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
