"""Global multi-head self-attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_heads
from .linear import Linear
from .token_maps import attention_received


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
        self.dim, self.num_heads = dim, num_heads
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


def split_heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """(B, N, parts * C) -> `parts` tensors (B, heads, N, C / heads); channels part by part."""
    x = x.unflatten(-1, (parts, num_heads, -1))  # B N parts h d
    # Unbound where they lie: the gradient then is one copy, not two.
    return tuple(part.transpose(1, 2) for part in x.unbind(2))


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)
