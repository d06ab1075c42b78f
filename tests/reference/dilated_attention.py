"""Multi-scale dilated attention one pixel at a time, from the equations."""

import torch
from torch import Tensor


def dilated_attention(
    qkv: Tensor, num_heads: int, kernel_size: int, dilation: tuple[int, ...], scale: float
) -> Tensor:
    """(B, 3C, H, W) -> (B, C, H, W); head j uses dilation[j // (heads per dilation)]."""
    batch, channels, height, width = qkv.shape
    head_dim = channels // 3 // num_heads
    query, key, value = qkv.reshape(batch, 3, num_heads, head_dim, height, width).unbind(1)
    nothing = qkv.new_zeros(head_dim)
    middle = kernel_size // 2
    pixels = []
    for b in range(batch):
        for head in range(num_heads):
            r = dilation[head // (num_heads // len(dilation))]
            for y in range(height):
                for x in range(width):
                    keys, values = [], []
                    for ky in range(kernel_size):
                        for kx in range(kernel_size):
                            row, column = y + r * (ky - middle), x + r * (kx - middle)
                            inside = 0 <= row < height and 0 <= column < width
                            keys.append(key[b, head, :, row, column] if inside else nothing)
                            values.append(value[b, head, :, row, column] if inside else nothing)
                    logits = torch.stack(keys) @ query[b, head, :, y, x] * scale
                    pixels.append(logits.softmax(0) @ torch.stack(values))
    out = torch.stack(pixels).reshape(batch, num_heads, height, width, head_dim)
    return out.permute(0, 1, 4, 2, 3).reshape(batch, -1, height, width)
