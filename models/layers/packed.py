"""Weights of linear layers in oneDNN's own layout, for inference on a CPU.

oneDNN multiplies by blocks of the weight, and lays a plain one out anew at each call. A packed weight is laid
out once: a pass of one image through EViT-S took 44 ms instead of 57, of eight 265 instead of 276 (two cores
of an AMD EPYC of family 25). It is for copies of a model that are not trained; see `models/deployment.py`.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from .activations import GELU, SiLU
from .eager import compiled_for_cpu, eager_on_cpu

# Rows that oneDNN is told to expect; the layout serves any number of them.
_EXPECTED_ROWS = 1024

# Activations that oneDNN computes while it writes the product, by its names.
_FUSED = {GELU: "gelu", SiLU: "swish"}

_PLAIN = {"gelu": F.gelu, "swish": F.silu, "none": lambda y: y}

_NUMBERS = itertools.count()
_BY_NUMBER: weakref.WeakValueDictionary[int, "PackedWeight"] = weakref.WeakValueDictionary()


# A parameter -> weight (out, in).
Arrange = Callable[[Tensor], Tensor]


def _matrix(weight: Tensor) -> Tensor:
    """That of a linear layer, or of a 1x1 convolution."""
    return weight.flatten(1)


class PackedWeight:
    """A copy of a weight (out, in) for products without gradients; copies and pickles of it are empty.

    Args:
        source: the parameter. It is multiplied by itself, and not the packed weight, while it requires
            gradients and once something has written to it or replaced it. Two ways to write leave no
            trace: `source.data`, and optimizers with `fused=True`.
        arrange: makes the weight of the parameter.

    Attributes:
        number: stands for it in compiled code; a tensor, as compilers make code for each plain number.
    """

    def __init__(self, source: Tensor | None = None, arrange: Arrange = _matrix):
        self.is_empty = source is None or source.is_inference()
        if self.is_empty:
            return
        with torch.no_grad():
            weight = arrange(source.detach()).contiguous()
            self._tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
        number = next(_NUMBERS)
        self.number = torch.tensor(number, device="cpu")
        self.arrange = arrange
        self._in_features = weight.shape[1]
        # Alive, so that no other weight can come to lie at its address.
        self._source, self._version = source.detach(), source._version
        _BY_NUMBER[number] = self

    def suits(self, x: Tensor, source: Tensor) -> bool:
        """Whether `product` gives what the parameter `source` now says for inputs (..., in) like `x`.

        Compilers do not ask whether `source` has changed: what they make of `product` asks at each call.
        """
        compiled = compiled_for_cpu(x)
        return (
            not self.is_empty
            and (compiled or eager_on_cpu(x, source))
            and x.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not source.requires_grad
            and not torch.is_autocast_enabled("cpu")
            and x.shape[-1] == self._in_features
            and (compiled or self.is_of(source))
        )

    def is_of(self, source: Tensor) -> bool:
        """Whether `source` is the parameter that was packed, and nothing has written to it since."""
        if source.is_inference():  # has no version
            return False
        try:
            address = source.data_ptr()
        except RuntimeError:  # one of a transform, such as torch.vmap over weights
            return False
        return (address, source._version) == (self._source.data_ptr(), self._version)

    def product(
        self, x: Tensor, source: Tensor, bias: Tensor | None, act: nn.Module | None = None
    ) -> Tensor:
        """act(x weight^T + bias): (..., in) -> (..., out), in one operation if oneDNN knows `act`."""
        name = _FUSED.get(type(act), "none")
        if torch.compiler.is_compiling():
            y = _packed_linear(x, source, bias, name, self.number)
        else:
            y = self.compute(x, bias, name)
        return y if act is None or name != "none" else act(y)

    def compute(self, x: Tensor, bias: Tensor | None, name: str) -> Tensor:
        """`product` with an activation by oneDNN's name."""
        algorithm = "none" if name == "gelu" else ""
        bias = None if bias is None else bias.contiguous()  # its strides are not looked at
        return torch.ops.mkldnn._linear_pointwise(x, self._tensor, bias, name, [], algorithm)

    def __deepcopy__(self, memo: dict) -> "PackedWeight":
        return PackedWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()


# Compilers know neither packed tensors nor these objects, but numbers.
@torch.library.custom_op("mixlab::packed_linear", mutates_args=(), device_types="cpu")
def _packed_linear(
    x: Tensor, source: Tensor, bias: Tensor | None, act: str, number: Tensor
) -> Tensor:
    packed = _BY_NUMBER[int(number)]
    if packed.is_of(source):
        return packed.compute(x, bias, act)
    y = F.linear(x, packed.arrange(source), bias)
    return _PLAIN[act](y)


@_packed_linear.register_fake
def _(x: Tensor, source: Tensor, bias: Tensor | None, act: str, number: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], source.shape[0]))


_HAS_OPERATORS = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)

# Products by packed weights, which PyTorch does not count by itself.
UNCOUNTED = [torch.ops.mixlab.packed_linear]
if _HAS_OPERATORS and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    UNCOUNTED.append(torch.ops.mkldnn._linear_pointwise)


def can_pack(weight: Tensor) -> bool:
    """Whether this PyTorch has the operators, and `weight` is a parameter for them."""
    return (
        _HAS_OPERATORS
        and isinstance(weight, nn.Parameter)  # others, pruned or normalised, are made anew
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() > 0
    )
