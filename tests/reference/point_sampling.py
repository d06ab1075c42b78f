"""Point-sampled attention, query by query and neighbour by neighbour."""

import math

import torch
from torch import Tensor, nn


def sample(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Map (H, W, d) at the point (x, y), in pixels -> (d,); a neighbour outside counts as zero."""
    height, width, dim = values.shape
    left, top = math.floor(x.item()), math.floor(y.item())
    result = values.new_zeros(dim)
    for column in (left, left + 1):
        for row in (top, top + 1):
            if 0 <= column < width and 0 <= row < height:
                weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
                result = result + weight * values[row, column]
    return result


def point_sampled_attention(attn: nn.Module, u: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, H*W, C) of a map of `size` -> (B, H*W, C)."""
    batch, length, dim = u.shape
    heads, points = attn.num_heads, attn.num_points
    values = attn.v(u).reshape(batch, *size, heads, dim // heads)
    offsets = attn.offsets(u).reshape(batch, length, heads, points, 2)
    if offsets.requires_grad:
        offsets.register_hook(lambda gradient: 0.1 * gradient)
    weights = attn.attn_weight(u).reshape(batch, length, heads, points).softmax(-1)
    images = []
    for b in range(batch):
        tokens = []
        for n in range(length):
            row, column = divmod(n, size[1])
            parts = []
            for j in range(heads):
                total = 0
                for p in range(points):
                    dx, dy = offsets[b, n, j, p]
                    total = total + weights[b, n, j, p] * sample(
                        values[b, :, :, j], column + dx, row + dy
                    )
                parts.append(total)
            tokens.append(torch.cat(parts))
        images.append(torch.stack(tokens))
    return attn.proj(torch.stack(images))
