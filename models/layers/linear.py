"""`nn.Linear` by the faster of PyTorch's two matrix libraries.

On x86 PyTorch gives float32 products to MKL, which uses the 512-bit instructions of Intel's processors
only, and convolutions to oneDNN, which uses them wherever they are. On an AMD EPYC of family 26 a 1x1
convolution took 0.4 to 0.5 of the time of the same `F.linear`, forward and backward. The choice depends on
the processor's name and not on a measurement, so that two runs on a machine agree to the last bit.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import eager_on_cpu

# Below, setting up the convolution costs more than it saves.
_MIN_ROWS = 64


class Linear(nn.Linear):
    """`nn.Linear`: same parameters, same results up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., in) x (out, in) -> (..., out), as `F.linear`."""
    if not _suits_convolution(x, weight):
        return F.linear(x, weight, bias)
    # Rows are the positions of one channels-last image, so contiguous ones are not copied.
    image = x.contiguous().view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _suits_convolution(x: Tensor, weight: Tensor) -> bool:
    # First what keeps exporters away from the sizes: a comparison would bound their free batch.
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return (
        (compiled or eager_on_cpu(x))
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _convolves()
        and x.numel() >= _MIN_ROWS * x.shape[-1] > 0
    )


@torch.compiler.assume_constant_result
def _convolves() -> bool:
    # With one thread PyTorch has convolutions of its own, made of MKL's products.
    return torch.get_num_threads() > 1 and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    """Whether this processor has 512-bit instructions that MKL does not use."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.cpu, "get_capabilities"):
        return False
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_f")) and "AMD" in cpu.get("cpu_name", "")
