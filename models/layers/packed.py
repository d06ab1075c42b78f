"""Weights of linear layers in oneDNN's own layout, for inference on a CPU.

oneDNN multiplies by blocks of the weight, and lays a plain one out anew at each call. A packed weight is laid
out once: a pass of one image through EViT-S took 44 ms instead of 57, of eight 265 instead of 276 (two cores
of an AMD EPYC of family 25). It is for copies of a model that are not trained; see `models/deployment.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .activations import GELU, SiLU
from .eager import eager_on_cpu

# Rows that oneDNN is told to expect; the layout serves any number of them.
_EXPECTED_ROWS = 1024

# Activations that oneDNN computes while it writes the product.
_FUSED = {GELU: ("gelu", "none"), SiLU: ("swish", "")}


class PackedWeight:
    """A copy of a weight (out, in) for products without gradients; copies and pickles of it are empty.

    Args:
        source: the parameter. Once something writes to it through PyTorch (not `source.data`) or
            replaces it, the packed weight suits no input any more.
        weight: what to pack, a rearrangement of `source`; itself, flattened, if that is not given.
    """

    def __init__(self, source: Tensor | None = None, weight: Tensor | None = None):
        self._tensor = None
        if source is None or source.is_inference():
            return
        weight = source.flatten(1) if weight is None else weight
        with torch.no_grad():
            self._tensor = torch.ops.mkldnn._reorder_linear_weight(
                weight.detach().contiguous(), _EXPECTED_ROWS
            )
        self._in_features = weight.shape[1]
        self._source = (source.data_ptr(), source._version)

    def suits(self, x: Tensor, source: Tensor) -> bool:
        """Whether `product` gives what the parameter `source` now says for inputs (..., in) like `x`."""
        return (
            eager_on_cpu(x)  # first: compilers do not know packed tensors
            and self._tensor is not None
            and x.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and x.shape[-1] == self._in_features
            and (source.data_ptr(), source._version) == self._source
        )

    def product(self, x: Tensor, bias: Tensor | None, act: nn.Module | None = None) -> Tensor:
        """act(x weight^T + bias): (..., in) -> (..., out); `act` is one that `fuses`."""
        name, algorithm = ("none", "") if act is None else _FUSED[type(act)]
        return torch.ops.mkldnn._linear_pointwise(x, self._tensor, bias, name, [], algorithm)

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        return PackedWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()


def fuses(act: nn.Module) -> bool:
    """Whether `PackedWeight.product` can compute `act`."""
    return type(act) in _FUSED


def can_pack(weight: Tensor) -> bool:
    """Whether this PyTorch has the operators, and `weight` is one for them."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
