"""Attention whose keys and values come from a coarser map."""

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import merge_heads, split_heads
from .checks import check_heads
from .layer_norm import LayerNorm
from .linear import Linear
from .precision import autocast_dtype
from .token_maps import attention_received
from .tokens import pad_to_multiple, to_map, to_tokens


class SpatialReductionAttention(nn.Module):
    """Multi-head attention with full-resolution queries (PVT, arXiv:2102.12122, Sec. 3.3, Eq. 1-3).

    A strided convolution shrinks the map R times per side before keys and values are taken from it.
    Maps that R does not divide are padded with zeros at the right and the bottom.
    Shapes: (B, N, C) tokens of a map -> (B, N, C). With R = 1 further tokens may precede the map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if reduction < 1:
            raise ValueError(
                f"reduction={reduction} must be at least 1, which keeps the map's size"
            )
        self.num_heads = num_heads
        self.reduction = reduction
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, dim * 2, bias=qkv_bias)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = LayerNorm(dim)  # eps 1e-5, unlike the norms of the blocks
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x.to(autocast_dtype(x))  # once for queries and keys
        (q,) = split_heads(self.q(x), self.num_heads, 1)
        k, v = self.keys_values(x, size)
        return self.project(merge_heads(F.scaled_dot_product_attention(q, k, v)))

    def keys_values(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Tokens (B, N, C) of a map of `size` -> keys and values, each (B, heads, M, C / heads)."""
        if self.reduction > 1:
            x = pad_to_multiple(to_map(x, size), self.reduction)
            if all(side <= self.reduction for side in size):
                # One key: there PyTorch 2.15 gives wrong bfloat16 sums for channels_last maps on some CPUs.
                x = x.contiguous()
            x = self.norm(to_tokens(self.sr(x)))  # B M C
        return split_heads(self.kv(x), self.num_heads, 2)

    def project(self, x: Tensor) -> Tensor:
        """Output projection of merged heads, (..., C) -> (..., C)."""
        return self.proj_drop(self.proj(x))

    def attention_maps(self, x: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """`attention` (B, heads, ceil(H/R), ceil(W/R)): what each key gets, the mean over all tokens.

        With R = 1 what goes to tokens before the map is left out.
        """
        (q,) = split_heads(self.q(x), self.num_heads, 1)
        k, _ = self.keys_values(x, size)
        rows, columns = (-(-side // self.reduction) for side in size)
        received = attention_received(q, k, q.shape[-1] ** -0.5)[..., -rows * columns :]
        return {"attention": received.unflatten(-1, (rows, columns))}
