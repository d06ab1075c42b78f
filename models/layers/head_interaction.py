"""Head-interacted attention of DHVT."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .attention import Attention, merge_heads, split_heads
from .layer_norm import LayerNorm
from .precision import autocast_dtype
from .token_maps import attention_received


class HIAttention(Attention):
    """Self-attention over the tokens and one head token per head, pooled from that head's channels.

    DHVT, arXiv:2210.05958, Sec. 3, "Head-Interacted Multi-Head Self-Attention".

    The mean of the head tokens' outputs is added to the class token; without a class token they act
    as keys and values only.

    Shapes: tokens (B, N, C) and a class token (B, 1, C) or None -> the same.
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
        super().__init__(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop)
        self.ht_proj = nn.Linear(dim // num_heads, dim)
        self.ht_norm = LayerNorm(dim // num_heads, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_heads, dim))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor, cls: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        length = x.shape[1]
        q, k, v = split_heads(self.qkv(self._with_head_tokens(x, cls)), self.num_heads, 3)
        if cls is None:
            q = q[:, :, :length]  # nothing reads the head tokens' outputs
        dropout = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        y = self.proj(merge_heads(y))
        if cls is None:
            return self.proj_drop(y), None
        x, cls, heads = y.split([length, 1, self.num_heads], dim=1)
        cls = cls + heads.mean(dim=1, keepdim=True)
        return self.proj_drop(x), self.proj_drop(cls)

    def attention_maps(self, x: Tensor, cls: Tensor | None = None) -> dict[str, Tensor]:
        """(B, H, W, C), and a class token (B, 1, C) -> `attention` (B, heads, H, W) to each position.

        It is that of the class token, or without one the mean over all positions. What goes to class and
        head tokens is left out, so that rows sum to less than 1.
        """
        size, length = (x.shape[1], x.shape[2]), x.shape[1] * x.shape[2]
        tokens = self._with_head_tokens(x.flatten(1, 2), cls)
        q, k, _ = split_heads(self.qkv(tokens), self.num_heads, 3)
        asking = slice(length) if cls is None else slice(length, length + 1)
        received = attention_received(q[:, :, asking], k, self.scale)
        return {"attention": received[..., :length].unflatten(-1, size)}

    def _with_head_tokens(self, x: Tensor, cls: Tensor | None) -> Tensor:
        """Tokens (B, N, C) and a class token (B, 1, C) or None -> both, then the head tokens."""
        pooled = x.mean(dim=1, keepdim=True)
        if cls is None:
            parts = [x, self._head_tokens(pooled)]
        else:
            # The class token counts as one more.
            pooled = pooled + (cls - pooled) / (x.shape[1] + 1)
            parts = [x, cls, self._head_tokens(pooled)]
        dtype = autocast_dtype(x)
        return torch.cat([part.to(dtype) for part in parts], dim=1)

    def _head_tokens(self, pooled: Tensor) -> Tensor:
        """Mean token (B, 1, C) -> head tokens (B, heads, C)."""
        x = self.ht_proj(pooled.unflatten(2, (self.num_heads, -1)).squeeze(1))  # B h C
        x = F.gelu(self.ht_norm(x.unflatten(2, (self.num_heads, -1))))  # B h h d
        return x.flatten(2) + self.pos_embed
