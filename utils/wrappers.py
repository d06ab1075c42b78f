"""Wrappers around a model, `DistributedDataParallel` and `torch.compile`, and what lies inside them."""

import torch.distributed as dist
from torch import nn

from .distributed import get_world_size

# Those of torch.compile; reduce-overhead records CUDA graphs, which replay for one size of batch.
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# Of these, those whose results lie in memory that the next call writes again.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")

_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DDP and torch.compile wrappers in any order."""
    while True:
        if isinstance(model, _PARALLEL):
            model = model.module
        elif is_compiled(model):
            model = model._orig_mod
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile (or a wrapper that names its inside as that does) has made this module."""
    return hasattr(model, "_orig_mod")


def on_this_process(model: nn.Module) -> nn.Module:
    """What computes the same without asking other processes: still compiled, but not parallel."""
    return unwrap(model) if any(isinstance(m, _PARALLEL) for m in model.modules()) else model


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of rank 0: batch-norm statistics drift apart between forwards."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
