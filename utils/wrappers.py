"""What lies inside `DistributedDataParallel` and `torch.compile` wrappers."""

import torch.distributed as dist
from torch import nn

from .distributed import get_world_size


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DDP and torch.compile wrappers in any order."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # how torch.compile names the compiled module
            model = model._orig_mod
        else:
            return model


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of rank 0: batch-norm statistics drift apart between forwards."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
