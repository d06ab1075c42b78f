"""Attention with a bias that all batch entries share, as windows have it; on a CPU a few entries at a time.

Shapes:     G batch entries, h heads, N tokens, d head dim

PyTorch's fused kernel for CPUs has no gradient of the bias, and is slow for few keys.
"""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .eager import eager_on_cpu, is_transformed, piece

# Up to so many keys, pieces beat PyTorch's fused kernel in evaluation.
_FEW_KEYS = 64

# Entries that a kernel on a GPU takes at most: more are an error of cuDNN's up to PyTorch 2.11.
_MAX_BATCH = 2**16 - 1

# What a piece needs at once, in numbers per logit: logits, probabilities, and q, k and v of it.
_PER_LOGIT = 4


def biased_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor], bias: Tensor, scale: float
) -> Tensor:
    """softmax(scale * q k^T + bias) v, fused: (G, h, N, d).

    Args:
        qkv: three tensors (G, h, N, d), or one (3, G, h, N, d) whose gradient then is one of its layout.
        bias: broadcasts to (G, h, N, N); one of shape (1, h, N, N) has fast paths.
    """
    q, k, v = qkv
    if not eager_on_cpu(q, k, v, bias):
        if q.device.type == "cpu" and any(map(is_transformed, (q, k, v, bias))):
            return _formula(q, k, v, bias, scale)
    elif _is_shared(bias, q, k, v):
        if torch.is_grad_enabled():
            if bias.requires_grad:
                tensors = (qkv,) if isinstance(qkv, Tensor) else qkv
                return _InPieces.apply(scale, bias, *tensors)
        elif k.shape[2] <= _FEW_KEYS and q.dtype == torch.float32:
            return _attend(q, k, v, bias, scale)
    if bias.requires_grad and not any(t.requires_grad for t in (q, k, v)):
        # Kernels keep nothing for a backward pass to a bias alone, and some then read what is not there.
        return _formula(q, k, v, bias, scale)
    if q.is_cuda and len(q) > _MAX_BATCH and len(bias) == 1:
        return _fused_in_parts(q, k, v, bias, scale, _MAX_BATCH)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _fused_in_parts(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, length: int
) -> Tensor:
    """By the fused kernel, so many entries at a time."""
    parts = zip(q.split(length), k.split(length), v.split(length), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*part, attn_mask=bias, scale=scale) for part in parts]
    )


def _formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """By operators that every transform of functions knows."""
    return (scale * q @ k.transpose(-2, -1) + bias).softmax(-1) @ v


def _is_shared(bias: Tensor, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `bias` is one for all entries, of attention among the same tokens in one type."""
    same = q.shape == k.shape == v.shape and q.dtype == bias.dtype
    return same and bias.shape == (1, *q.shape[1:3], k.shape[2])


class _InPieces(torch.autograd.Function):
    """Keeps its inputs only, and holds the attention matrices of one piece at a time."""

    @staticmethod
    def forward(ctx: Any, scale: float, bias: Tensor, *qkv: Tensor) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(bias, *qkv)
        return _attend(*_parts(qkv), bias, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias, *qkv = ctx.saved_tensors  # once: recomputed activations are given out once
        if is_transformed(grad):  # several gradients at once
            return _attend_backward_by_formula(grad, qkv, bias, ctx.scale)
        grads = [torch.empty_like(tensor) for tensor in qkv]
        grad_bias = _attend_backward(grad, _parts(qkv), _parts(grads), bias, ctx.scale)
        return None, grad_bias, *grads


def _parts(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """q, k and v, of one tensor or of three."""
    return tensors if len(tensors) == 3 else tensors[0].unbind()


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    # Tokens before heads: to merge the heads then takes no copy.
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    work = _Workspace(q)
    for rows in _pieces(q, k):
        q_rows = work.copy("q", q[rows]).mul_(scale)
        probs = _probabilities(work, q_rows, work.copy("k", k[rows]), bias)
        out[rows] = work.product("out", probs, work.copy("v", v[rows]))
    return out


def _attend_backward(
    grad: Tensor,
    qkv: Sequence[Tensor],
    grads: Sequence[Tensor],
    bias: Tensor,
    scale: float,
) -> Tensor:
    """The gradient of the bias; those of q, k and v are written into `grads`."""
    work = _Workspace(grad)
    grad_q, grad_k, grad_v = grads
    grad_bias = torch.zeros_like(bias, dtype=work.dtype)
    for rows in _pieces(*qkv[:2]):
        q, k, v = (work.copy(name, x[rows]) for name, x in zip("qkv", qkv, strict=True))
        grad_rows = work.copy("grad", grad[rows])
        probs = _probabilities(work, q.mul_(scale), k, bias)
        # The softmax's gradient: each probability's share, less the row's sum of shares times it.
        grad_logits = work.product("logits", grad_rows, v.transpose(2, 3)).mul_(probs)
        grad_logits.addcmul_(probs, grad_logits.sum(-1, keepdim=True), value=-1)
        grad_bias += grad_logits.sum(0, keepdim=True)
        # v has been read: its copy makes room for the results.
        grad_v[rows] = work.product("v", probs.transpose(2, 3), grad_rows)
        grad_q[rows] = work.product("v", grad_logits, k).mul_(scale)
        grad_k[rows] = work.product("v", grad_logits.transpose(2, 3), q)
    return grad_bias.to(bias.dtype)


def _attend_backward_by_formula(
    grad: Tensor, qkv: Sequence[Tensor], bias: Tensor, scale: float
) -> tuple[Tensor | None, ...]:
    """What `_InPieces.backward` returns, by `_formula`."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (bias, *qkv)]
        out = _formula(*_parts(inputs[1:]), inputs[0], scale)
    return None, *torch.autograd.grad(out, inputs, grad)


def _probabilities(work: "_Workspace", q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    logits = work.product("logits", q, k.transpose(2, 3)).add_(bias)
    return torch.softmax(logits, -1, out=work.empty("probs", logits.shape))


def _pieces(q: Tensor, k: Tensor) -> Iterator[slice]:
    """A few batch entries at a time, one at least.

    Their attention matrices fit into the caches where one entry's do. They are a quarter of all entries at
    most, so that the workspace is small beside the maps.
    """
    length = piece(_PER_LOGIT * q.shape[1:3].numel() * k.shape[2])
    length = max(1, min(length, ceil(len(q) / 4)))
    return (slice(start, start + length) for start in range(0, len(q), length))


class _Workspace:
    """Contiguous tensors in float32 at least, in memory that serves one piece after the other.

    Matrix products read contiguous operands faster, and fresh memory would cost page faults.
    """

    def __init__(self, like: Tensor):
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self._device = like.device
        self._kept: dict[str, Tensor] = {}

    def copy(self, name: str, x: Tensor) -> Tensor:
        return self.empty(name, x.shape).copy_(x)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a b for each entry and head."""
        out = self.empty(name, (*a.shape[:3], b.shape[3]))
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
        return out

    def empty(self, name: str, shape: Sequence[int]) -> Tensor:
        """What `name` held before is lost; shapes differ along the first axis, the first is the longest."""
        if name not in self._kept:
            self._kept[name] = torch.empty(shape, dtype=self.dtype, device=self._device)
        return self._kept[name][: shape[0]]
