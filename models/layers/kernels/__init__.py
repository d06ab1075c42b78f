"""GPU kernels in Triton, forward and backward, for what PyTorch would spread over many passes of memory.

`available` says whether a tensor can go through them; where it cannot (no CUDA device, no Triton, double
precision, export) the plain PyTorch code beside them computes the same. They are checked in Triton's
interpreter and by its compiler; none has run on a GPU yet.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..eager import are_plain, is_exporting, is_transformed

__all__ = [
    "HAS_TRITON",
    "MAX_ROW",
    "available",
    "dilated_attention",
    "enabled",
    "filter_quads",
    "ragged_attention",
]

# Triton comes with PyTorch's CUDA builds for Linux and is missing elsewhere.
HAS_TRITON = importlib.util.find_spec("triton") is not None

# MIXLAB_KERNELS=0, or False here, times and tests the plain code on a GPU.
enabled = os.environ.get("MIXLAB_KERNELS", "1") != "0"

if HAS_TRITON:
    from .dilated import dilated_attention
    from .quads import filter_quads
    from .ragged import ragged_attention


# Bytes of a head's row up to which the blocks of `ragged_attention` fit the shared memory of all GPUs.
MAX_ROW = 256


def available(x: Tensor, head_dim: int = 0) -> bool:
    """Whether the kernels take `x`: float16, bfloat16 or float32 on a GPU that they know, and no export.

    Args:
        head_dim: channels of a head, for `ragged_attention`, which has a limit.
    """
    return (
        enabled
        and HAS_TRITON
        and x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and head_dim * x.dtype.itemsize <= MAX_ROW
        and not is_exporting()
        and not torch.jit.is_tracing()
        and not (are_plain() or is_transformed(x))
        and _knows(x.device)
    )


@torch.compiler.assume_constant_result
def _knows(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU from Ampere on: older ones have no bfloat16, others no TF32."""
    return _capability(device) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
