"""Head-interacted attention of DHVT."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .attention import Attention, merge_heads, split_heads


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
        self.ht_norm = nn.LayerNorm(dim // num_heads, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_heads, dim))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor, cls: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        length = x.shape[1]
        pooled = x.mean(dim=1, keepdim=True)
        if cls is not None:
            pooled = pooled + (cls - pooled) / (length + 1)  # the class token counts as one more
        tokens = (
            [x, self._head_tokens(pooled)] if cls is None else [x, cls, self._head_tokens(pooled)]
        )
        q, k, v = split_heads(self.qkv(torch.cat(tokens, dim=1)), self.num_heads, 3)
        if cls is None:
            q = q[:, :, :length]  # nothing reads the head tokens' outputs
        dropout = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        y = self.proj(merge_heads(y))
        if cls is not None:
            cls = y[:, length : length + 1] + y[:, length + 1 :].mean(dim=1, keepdim=True)
            cls = self.proj_drop(cls)
        return self.proj_drop(y[:, :length]), cls

    def _head_tokens(self, pooled: Tensor) -> Tensor:
        """Mean token (B, 1, C) -> head tokens (B, heads, C)."""
        x = self.ht_proj(pooled.unflatten(2, (self.num_heads, -1)).squeeze(1))  # B h C
        x = F.gelu(self.ht_norm(x.unflatten(2, (self.num_heads, -1))))  # B h h d
        return x.flatten(2) + self.pos_embed
