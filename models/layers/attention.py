"""Global multi-head self-attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .checks import check_heads
from .eager import eager_on_cpu, piece
from .linear import Linear
from .token_maps import attention_received

# Up to so many keys, on a CPU, the terms one after the other in pieces beat PyTorch's fused kernel.
_FEW_KEYS = 64


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (ViT, arXiv:2010.11929, Eq. 5-8), fused.

    Shapes: (B, N, C) -> (B, N, C), head width C / num_heads.

    Args:
        qk_scale: replaces the factor head_dim ** -0.5 on the logits.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if not 0 <= attn_drop < 1:
            raise ValueError(f"attn_drop={attn_drop} must be in [0, 1); 0 drops nothing")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(merge_heads(x)))

    def attention_maps(self, x: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Tokens (B, E + H*W, C) of a map of `size` -> `attention` (B, heads, H, W) to each position.

        It is that of the first of the extra tokens, the class token, or without one the mean over all
        tokens. What goes to extra tokens is left out, so that rows may sum to less than 1.
        """
        q, k, _ = split_heads(self.qkv(x), self.num_heads, 3)
        extra = x.shape[1] - size[0] * size[1]
        received = attention_received(q[:, :, :1] if extra else q, k, self.scale)
        return {"attention": received[..., extra:].unflatten(-1, size)}


class MapAttention(Attention):
    """Self-attention over all positions of a map: (B, H, W, C) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    def attention_maps(self, x: Tensor) -> dict[str, Tensor]:
        """(B, H, W, C) -> `attention` (B, heads, H, W) to each position, the mean over all of them."""
        return super().attention_maps(x.flatten(1, 2), (x.shape[1], x.shape[2]))


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias) v, fused: (..., N, d); the bias broadcasts to (..., N, N)."""
    if eager_on_cpu(q) and q.dtype == bias.dtype:
        if torch.is_grad_enabled():
            if bias.requires_grad:
                return _BiasedAttention.apply(q, k, v, bias, scale)
        elif k.shape[-2] <= _FEW_KEYS and q.dtype == torch.float32 and len(bias) == 1:
            return _attention_in_pieces(q, k, v, bias, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _attention_in_pieces(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The same, a few batch entries at a time, so that their logits stay in the caches."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    length = piece(2 * q.shape[1:-1].numel() * k.shape[-2])
    parts = (tensor.split(length) for tensor in (q, k, v, out))
    for q_part, k_part, v_part, out_part in zip(*parts, strict=True):
        logits = (q_part @ k_part.transpose(-2, -1)).mul_(scale).add_(bias)
        out_part.copy_(logits.softmax(-1) @ v_part)
    return out


class _BiasedAttention(torch.autograd.Function):
    """Keeps no attention matrix: PyTorch's fused kernel for CPUs has no gradient of the bias."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputed activations are given out once
        dtypes = [tensor.dtype for tensor in saved[:4]]
        # In float32 at least, as the kernel has its logits and sums.
        q, k, v, bias, out, grad = (
            tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (*saved, grad)
        )
        probs = (q @ k.transpose(-2, -1)).mul_(ctx.scale).add_(bias).softmax(-1)
        grad_v = probs.transpose(-2, -1) @ grad
        # The softmax's gradient: what each logit gets, less the mean over its row.
        grad_logits = (grad @ v.transpose(-2, -1)).sub_((grad * out).sum(-1, keepdim=True))
        grad_logits.mul_(probs)
        grad_bias = grad_logits.sum_to_size(bias.shape)
        grad_q = (grad_logits @ k).mul_(ctx.scale)
        grad_k = (grad_logits.transpose(-2, -1) @ q).mul_(ctx.scale)
        grads = (grad_q, grad_k, grad_v, grad_bias)
        return *(part.to(dtype) for part, dtype in zip(grads, dtypes, strict=True)), None


def split_heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """(B, N, parts * C) -> `parts` tensors (B, heads, N, C / heads); channels part by part."""
    x = x.unflatten(-1, (parts, num_heads, -1))  # B N parts h d
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)
