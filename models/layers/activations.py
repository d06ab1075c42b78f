"""Activations, by name, and the two squared ones of the MetaFormer line."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .eager import eager_on_cpu, is_eager, may_overwrite

# Consecutive values that stay in the caches from one pass to the next, 1 MiB of float32.
_PIECE = 2**18


class StarReLU(nn.Module):
    """s * relu(x)^2 + b, s and b learned scalars (MetaFormer baselines, arXiv:2210.13452, Sec. 2.3).

    Attributes:
        inplace: without gradients it may overwrite its input; see `made_inplace`.
    """

    inplace = False

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        # Both scalars in the input's type: under autocast float32 ones would widen the whole map.
        scale, bias = self.scale.to(x.dtype), self.bias.to(x.dtype)
        if x.dtype == torch.bfloat16 and is_eager(x, scale, bias) and torch.is_grad_enabled():
            return _Bfloat16StarReLU.apply(x, scale, bias)
        if not eager_on_cpu(x, scale, bias) or x.dtype not in (torch.float32, torch.float64):
            return _star_relu(x, scale, bias)
        if torch.is_grad_enabled():
            return _StarReLU.apply(x, scale, bias)
        y = F.relu(x, inplace=self.inplace)
        return torch.addcmul(bias, y, y, value=scale.item(), out=y)


class _StarReLU(torch.autograd.Function):
    """The same on a CPU in pieces that stay in its caches; keeps relu(x) only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        rectified, y = torch.empty_like(x), torch.empty_like(x)
        for x_part, part, y_part in zip(*map(_pieces, (x, rectified, y)), strict=True):
            torch.clamp_min(x_part, 0, out=part)
            torch.addcmul(bias, part, part, value=scale.item(), out=y_part)
        ctx.save_for_backward(rectified, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rectified, scale = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(grad)
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(scale)
        for part, of_y, of_x in zip(*map(_pieces, (rectified, grad, grad_x)), strict=True):
            torch.mul(of_y, part, out=of_x)
            grad_scale += of_x.dot(part)
            grad_bias += of_y.sum()
            of_x.mul_(2 * scale.item())
        return grad_x, grad_scale, grad_bias


def _star_relu(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias, _squared_relu(x), scale)


def _squared_relu(x: Tensor) -> Tensor:
    y = F.relu(x)
    # `square` is a power, which CUDA's autocast computes and returns in float32. bfloat16 has the range for a
    # product instead; float16 ends at the square of 256.
    return y * y if y.dtype == torch.bfloat16 else y.square()


class _Bfloat16StarReLU(torch.autograd.Function):
    """`_star_relu` in bfloat16; keeps x only, and not relu(x) and its square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return _star_relu(x, scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        need_x, need_scale, need_bias = ctx.needs_input_grad
        y = F.relu(x)
        grad_y = grad * y
        grad_x = grad_y * (2 * scale) if need_x else None
        grad_scale = _sum(grad_y * y, scale) if need_scale else None
        return grad_x, grad_scale, _sum(grad, scale) if need_bias else None


def _sum(x: Tensor, like: Tensor) -> Tensor:
    """The sum of all values, as a tensor like that of a scalar parameter."""
    return x.sum().to(like.dtype).expand(like.shape)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.view(-1).split(_PIECE)


def made_inplace(act: nn.Module) -> nn.Module:
    """`act` for inputs that nobody else reads: eager on a CPU, without gradients, it may overwrite them.

    For the owner of the layer before; what a hook keeps of that layer's output is then overwritten too.
    """
    if isinstance(act, StarReLU):
        act.inplace = True
    exact = type(act) is nn.GELU and act.approximate == "none"
    return GELU() if exact else SiLU() if type(act) is nn.SiLU else act


class SiLU(nn.SiLU):
    """`made_inplace(nn.SiLU())`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=may_overwrite(x))


class GELU(nn.GELU):
    """`made_inplace(nn.GELU())`, the exact form."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x) if may_overwrite(x) else F.gelu(x)


class SquaredReLU(nn.Module):
    """relu(x)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return _squared_relu(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "squared_relu": SquaredReLU,
    "star_relu": StarReLU,
}
