"""Batch norm of which compilers leave the training on a CPU to PyTorch's own kernel."""

from typing import Any

import torch
from torch import Tensor, nn

from .eager import compiled_for_cpu


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`: same parameters and buffers, same results up to rounding.

    Inductor is slow at sums over the positions of channels-last maps: its gradients of DFvT-S's norms took
    95 ms of a training step, where PyTorch's kernel takes 21 (batch 8, two cores, torch 2.14).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self._suits_operator(x):
            return super().forward(x)
        y, mean, _, variance = _batch_norm(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach(), self.momentum)
        return y

    def _suits_operator(self, x: Tensor) -> bool:
        return (
            compiled_for_cpu(x)
            and self.training
            and torch.is_grad_enabled()
            # PyTorch's layer refuses what has no variance, and knows what to do with an empty batch.
            and x.ndim == 4
            and x.numel() > x.shape[1]
            and self.weight is not None
            and x.dtype == self.weight.dtype == torch.float32
            and self.running_mean is not None
            and self.momentum is not None
        )


# Batch norms of maps that do nothing more, as classes derived from them elsewhere may.
MAP_NORMS = (BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


@torch.library.custom_op("mixlab::batch_norm", mutates_args=(), device_types="cpu")
def _batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, C, H, W) -> normalised map; of each channel mean, 1 / deviation, and variance without bias."""
    x = x.contiguous(memory_format=_layout(x))
    # With a momentum of 1 these buffers become what a step adds to the running ones.
    mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)
    y, _, inverse = torch.native_batch_norm(x, weight, bias, mean, variance, True, 1.0, eps)
    return y, mean, inverse, variance


@_batch_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=_layout(x))
    return y, *(torch.empty_like(weight) for _ in range(3))


def _layout(x: Tensor) -> torch.memory_format:
    """Of a map and what is computed from it: channels-last stays, anything else becomes PyTorch's default."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@torch.library.custom_op("mixlab::batch_norm_backward", mutates_args=(), device_types="cpu")
def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x, grad = (tensor.contiguous(memory_format=_layout(x)) for tensor in (x, grad))
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inverse, True, eps, [True, True, True]
    )


@_batch_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=_layout(x))
    return grad_x, torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.eps = inputs
    _, mean, inverse, _ = output
    ctx.save_for_backward(x, weight, mean, inverse)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_batch_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


_batch_norm.register_autograd(_backward, setup_context=_setup_context)
