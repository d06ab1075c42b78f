"""`nn.Linear` by the faster of PyTorch's two matrix libraries.

On x86 PyTorch gives float32 products to MKL, which uses the 512-bit instructions of Intel's processors
only, and convolutions to oneDNN, which uses them wherever they are. On an AMD EPYC of family 26 a 1x1
convolution took 0.4 to 0.5 of the time of the same `F.linear`, forward and backward; on one of family 25 both
take as long. The choice depends on the processor's name and not on a measurement, so that two runs on a
machine agree to the last bit.
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .eager import compiled_for_cpu, eager_on_cpu, is_transformed
from .packed import UNCOUNTED, PackedWeight
from .plain import has_hooks, is_plain

# Below, setting up the convolution costs more than it saves.
_MIN_ROWS = 64

# Up to here MKL makes the gradient of the weight. oneDNN has it in a layout of its own and copies it, so that
# a large one is there twice, which was the peak of a step of DFvT-S: 467 MiB, 457 without the copy.
_FEW_ROWS = 512


class Linear(nn.Linear):
    """`nn.Linear`: same parameters, same results up to rounding.

    Attributes:
        packed: the weight as copies for inference have it.
    """

    packed: PackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution of a copy for inference: a linear layer where the map is channels-last."""

    packed: PackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        plain = x.ndim == 4 and not is_transformed(x)
        if plain and x.is_contiguous(memory_format=torch.channels_last):
            return self.on_map(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)

    def on_map(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, out), activated."""
        return linear(x, self.weight, self.bias, self.packed, act)


def activated(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(layer(x)); of a packed `Linear` in one operation, if it can be and no hook wants to see it."""
    if is_plain(layer, Linear) and layer.packed is not None and not has_hooks(act):
        return linear(x, layer.weight, layer.bias, layer.packed, act)
    return act(layer(x))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: PackedWeight | None = None,
    act: nn.Module | None = None,
) -> Tensor:
    """(..., in) -> (..., out), as `F.linear`, activated; by `packed`, made of `weight`, where it suits.

    Args:
        weight: (out, in), or that of a 1x1 convolution.
    """
    if packed is not None and packed.suits(x, weight):
        return packed.product(x, weight, bias, act)
    y = _linear_by_weight(x, weight.flatten(1), bias)
    return y if act is None else act(y)


def _linear_by_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _suits_convolution(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return _linear(x, weight, bias)
    if torch.is_grad_enabled() and weight.requires_grad and _has_few_rows(x):
        return _LinearOfFewRows.apply(x, weight, bias)
    return _convolve(x, weight, bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(_as_image(x), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _as_image(x: Tensor) -> Tensor:
    """(..., C) -> (1, C, 1, N): rows are the positions of one channels-last image, so nothing is copied."""
    return x.contiguous().view(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def _has_few_rows(x: Tensor) -> bool:
    return x.numel() <= _FEW_ROWS * x.shape[-1]


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias, those that are `needed`."""
    few = _has_few_rows(x)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        _as_image(grad),
        _as_image(x),
        weight[:, :, None, None],
        [len(weight)],  # shape of the bias
        *([1, 1], [0, 0], [1, 1], False, [0, 0], 1),  # a plain 1x1 convolution
        [needed[0], needed[1] and not few, needed[2] and not few],
    )
    if needed[0]:
        grad_x = grad_x.permute(0, 2, 3, 1).reshape(x.shape)
    if few:
        rows = grad.reshape(-1, len(weight))
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else None
        grad_bias = rows.sum(0) if needed[2] else None
    elif needed[1]:
        grad_weight = grad_weight[:, :, 0, 0]
    return grad_x, grad_weight, grad_bias


class _LinearOfFewRows(torch.autograd.Function):
    """`_convolve` with the gradient of its weight by MKL."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad)


# An operator of its own for the compiler: it gives axes of length 1 any stride, 0 too, and then PyTorch's
# convolution takes the image for one that is not channels-last, and copies it there and back.
@torch.library.custom_op("mixlab::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _convolve(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("mixlab::linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return _gradients(grad, x, weight, (True, True, True))


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_x, grad_weight, grad_bias = _linear_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.mixlab.linear, *UNCOUNTED])
def _flops(x_shape: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """Two per multiply-add, as PyTorch counts."""
    return 2 * math.prod(x_shape) * out_shape[-1]


def _suits_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # First what keeps exporters away from the sizes: a comparison would bound their free batch.
    return (
        (compiled_for_cpu(x) or eager_on_cpu(x, weight, bias))
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)  # quantised ones know linear layers only
        and not torch.is_autocast_enabled("cpu")
        and multiplies_by_onednn()
        and x.numel() >= _MIN_ROWS * x.shape[-1] > 0
    )


@torch.compiler.assume_constant_result
def multiplies_by_onednn() -> bool:
    """Whether linear layers of this process go to oneDNN, on a CPU in float32."""
    # With one thread PyTorch has convolutions of its own, made of MKL's products.
    return torch.get_num_threads() > 1 and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    """Whether this processor has 512-bit instructions that MKL does not use."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.cpu, "get_capabilities"):
        return False
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_f")) and "AMD" in cpu.get("cpu_name", "")
