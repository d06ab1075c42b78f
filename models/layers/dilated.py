"""Multi-scale dilated attention: each head looks at a sparse window around every position.

DilateFormer, arXiv:2302.01791, Sec. 3.1 (sliding window dilated attention) and 3.2 (several scales).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels
from .checks import check_heads
from .eager import is_eager
from .plain import is_plain


class DilatedAttention(nn.Module):
    """Attention of each position to its k x k neighbours at a distance that depends on the head.

    Shapes: (B, H, W, C) -> (B, H, W, C). Heads come in len(dilation) equal groups, one per dilation.

    Args:
        kernel_size: k, odd.
        dilation: pixels between neighbours, per group of heads.
    """

    reads_weights_of = ("qkv", "proj")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        dilation: Sequence[int] = (1, 2, 3),
        qkv_bias: bool = True,
    ):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(
                f"kernel_size={kernel_size} must be odd, so that a window has a centre; take "
                f"{max(kernel_size, 0) + 1}"
            )
        if not dilation or min(dilation) < 1:
            raise ValueError(f"dilation={list(dilation)} must be positive numbers of pixels")
        check_heads(dim, num_heads)
        if num_heads % len(dilation):
            raise ValueError(
                f"num_heads={num_heads} heads for dilation={list(dilation)} must be a multiple of "
                f"{len(dilation)}: each entry has as many heads"
            )
        self.num_heads = num_heads
        self.kernel_size, self.dilation = kernel_size, tuple(dilation)
        self.scale = (dim // num_heads) ** -0.5
        # A convolution in the published weights; computed as the matrix product that it is.
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        args = (self.num_heads, self.kernel_size, self.dilation, self.scale)
        if kernels.available(x):
            # On a GPU all stays in the order that a linear layer reads and writes.
            if is_plain(self.qkv, nn.Conv2d):
                qkv = F.linear(x, self.qkv.weight.flatten(1), self.qkv.bias)  # B H W 3C
            else:
                qkv = self.qkv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
            return self.proj(kernels.dilated_attention(qkv, *args))
        x = dilated_attention(self._queries_keys_values(x), *args)  # B C H W
        if not is_plain(self.proj, nn.Linear):
            return self.proj(x.permute(0, 2, 3, 1))
        weight = self.proj.weight.t().expand(x.shape[0], -1, -1)
        x = _product(x.flatten(2).transpose(1, 2), weight, self.proj.bias, dim=2)  # B HW C
        return x.unflatten(1, size)

    def attention_maps(self, x: Tensor) -> dict[str, Tensor]:
        """`attention` (B, heads, k * k, H, W): from each position to its neighbours, row by row.

        Neighbours outside the image count.
        """
        qkv = self._queries_keys_values(x)
        qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
        _, probs = _forward(qkv, self.num_heads, self.kernel_size, self.dilation, self.scale)
        return {"attention": torch.cat(probs, dim=1)}

    def _queries_keys_values(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 3C, H, W)."""
        if not is_plain(self.qkv, nn.Conv2d):
            return self.qkv(x.permute(0, 3, 1, 2))
        # Batched products read and write transposed operands: planes come out without a copy.
        weight = self.qkv.weight.flatten(1).expand(x.shape[0], -1, -1)
        qkv = _product(weight, x.flatten(1, 2).transpose(1, 2), self.qkv.bias, dim=1)  # B 3C HW
        return qkv.unflatten(2, (x.shape[1], x.shape[2]))


def _product(a: Tensor, b: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """Batched a @ b, plus `bias` along dimension `dim`."""
    if bias is None:
        return torch.bmm(a, b)
    return torch.baddbmm(bias[None, :, None] if dim == 1 else bias[None, None], a, b)


def dilated_attention(
    qkv: Tensor, num_heads: int, kernel_size: int, dilation: Sequence[int], scale: float
) -> Tensor:
    """Queries, keys and values (B, 3C, H, W) -> weighted values (B, C, H, W).

    Channels are (q | k | v, dilation, head of the group, head_dim). A neighbour outside the image has
    key 0 and value 0: it takes its share of the softmax and contributes nothing (no mask).
    """
    args = (num_heads, kernel_size, tuple(dilation), scale)
    # Compilers fuse the passes of the plain code, and would specialise the function on each batch size.
    if torch.is_grad_enabled() and qkv.requires_grad and is_eager(qkv):
        return _DilatedAttention.apply(qkv, *args)
    return _forward(qkv, *args)[0]


class _DilatedAttention(torch.autograd.Function):
    """Keeps qkv and the probabilities only; autograd would scatter a padded map for each neighbour."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, kernel: int, dilation: tuple[int, ...], scale: float
    ) -> Tensor:
        out, probs = _forward(qkv, heads, kernel, dilation, scale)
        ctx.save_for_backward(qkv, *probs)
        ctx.args = (heads, kernel, dilation, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *probs = ctx.saved_tensors
        return _backward(grad, qkv, probs, *ctx.args), None, None, None, None


def _forward(
    qkv: Tensor, heads: int, kernel: int, dilation: tuple[int, ...], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Weighted values (B, C, H, W), and per dilation the probabilities (B, heads, k * k, H, W)."""
    outputs, probs = [], []
    for (q, k, v), r in zip(_groups(qkv, heads, dilation), dilation, strict=True):
        k, v = _padded(k, r, kernel), _padded(v, r, kernel)
        prob = _dots(q, k, r, kernel).mul_(scale).softmax(2).to(qkv.dtype)
        out = None
        for weight, view in zip(prob.unbind(2), _neighbours(v, r, kernel), strict=True):
            weight = weight[:, :, None]  # B h 1 H W
            out = view * weight if out is None else out.addcmul_(view, weight)
        outputs.append(out.flatten(1, 2))
        probs.append(prob)
    return torch.cat(outputs, dim=1), probs


def _backward(
    grad: Tensor,
    qkv: Tensor,
    probs: list[Tensor],
    heads: int,
    kernel: int,
    dilation: tuple[int, ...],
    scale: float,
) -> Tensor:
    """Gradient of qkv (B, 3C, H, W) from that of the output (B, C, H, W)."""
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    # Coming from a batched product it is channels last, and planes are what the loops read.
    grad = grad.contiguous().unflatten(1, (len(dilation), heads // len(dilation), -1))
    grads = _groups(grad_qkv, heads, dilation)
    for i, ((q, k, v), r) in enumerate(zip(_groups(qkv, heads, dilation), dilation, strict=True)):
        g, prob = grad[:, i], probs[i]  # B h d H W, B h k*k H W
        grad_q, grad_k, grad_v = grads[i]
        k, v = _padded(k, r, kernel), _padded(v, r, kernel)
        d_prob = _dots(g, v, r, kernel)
        wide = prob.to(d_prob.dtype)
        d_logit = (wide * (d_prob - (wide * d_prob).sum(2, keepdim=True))).mul_(scale).to(g.dtype)

        # Padded maps collect what neighbours outside the image get; cutting it off drops it.
        wide_k, wide_v = torch.zeros_like(k), torch.zeros_like(v)
        total = torch.zeros_like(q)
        views = (_neighbours(t, r, kernel) for t in (k, wide_k, wide_v))
        for p, s, k_t, grad_k_t, grad_v_t in zip(
            prob.unbind(2), d_logit.unbind(2), *views, strict=True
        ):
            total.addcmul_(k_t, s[:, :, None])
            grad_k_t.addcmul_(q, s[:, :, None])
            grad_v_t.addcmul_(g, p[:, :, None])
        grad_q.copy_(total)
        grad_k.copy_(_inner(wide_k, r, kernel))
        grad_v.copy_(_inner(wide_v, r, kernel))
    return grad_qkv


def _groups(qkv: Tensor, heads: int, dilation: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """(B, 3C, H, W) -> per dilation views q, k, v (B, heads / len(dilation), head_dim, H, W)."""
    parts = qkv.unflatten(1, (3, len(dilation), heads // len(dilation), -1))
    return [group.unbind(1) for group in parts.unbind(2)]


def _dots(q: Tensor, padded: Tensor, r: int, kernel: int) -> Tensor:
    """Dot product of q (B, h, d, H, W) with each neighbour -> (B, h, k * k, H, W), float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.stack([(q * t).sum(2, dtype=dtype) for t in _neighbours(padded, r, kernel)], dim=2)


def _padded(x: Tensor, r: int, kernel: int) -> Tensor:
    """(..., H, W) with a border of zeros that the outermost neighbours reach."""
    return F.pad(x, (r * (kernel // 2),) * 4)


def _inner(x: Tensor, r: int, kernel: int) -> Tensor:
    """What `_padded` put the border around."""
    border = r * (kernel // 2)
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]


def _neighbours(padded: Tensor, r: int, kernel: int) -> Iterator[Tensor]:
    """Views (..., H, W) of a padded map, one per neighbour, rows outer and columns inner."""
    reach = r * (kernel - 1)
    height, width = padded.shape[-2] - reach, padded.shape[-1] - reach
    for y in range(0, reach + 1, r):
        for x in range(0, reach + 1, r):
            yield padded[..., y : y + height, x : x + width]
