"""Layer norm of which compilers leave the computation on a CPU to PyTorch's own kernel."""

from typing import Any

import torch
from torch import Tensor, nn

from .eager import compiled_for_cpu


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis: same parameters, same results up to rounding.

    Inductor is slow at the gradients, which are sums over positions: those of DHVT-T's norms, with what it
    joins to them, took 32 ms of a training step, where PyTorch's kernel takes 3 (batch 8, two cores, torch
    2.14); the step took 594 ms instead of 629. A pass of DFFormer-S18 took 492 ms instead of 503.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self._suits_operator(x):
            return super().forward(x)
        return _layer_norm(x, self.weight, self.bias, self.eps)[0]

    def _suits_operator(self, x: Tensor) -> bool:
        return (
            compiled_for_cpu(x)
            and self.weight is not None
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and x.shape[-1:] == self.normalized_shape  # PyTorch's layer says what is wrong
        )


@torch.library.custom_op("mixlab::layer_norm", mutates_args=(), device_types="cpu")
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., C) -> the same, normalised; of each position mean and 1 / deviation (..., 1)."""
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((*x.shape[:-1], 1))
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


@torch.library.custom_op("mixlab::layer_norm_backward", mutates_args=(), device_types="cpu")
def _layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    # Of the bias the kernel reads type and shape only.
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, inverse, weight, weight, [True, True, True]
    )


@_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, *output[1:], weight)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = _layer_norm_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
