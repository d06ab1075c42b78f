"""Attention within shifted windows as loops over pixels, straight from the equations."""

import torch
from torch import Tensor


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    window: int,
    shift: int,
    padding_is_hidden: bool = True,
) -> Tensor:
    """What each real pixel gathers from its window.

    Args:
        q, k, v: (B, heads, Hp, Wp, d) on the padded map, q scaled.
        bias: (heads, 2w-1, 2w-1), by row and column offset of query minus key, plus w-1.
        size: (H, W) without padding.

    Returns:
        (B, H, W, heads * d)
    """
    height, width = q.shape[2:4]
    rows = []
    for y in range(size[0]):
        row = []
        for x in range(size[1]):
            logits, values = [], []
            for y2 in range(height):
                for x2 in range(width):
                    here = ((y - shift) % height, (x - shift) % width)
                    there = ((y2 - shift) % height, (x2 - shift) % width)
                    if any(a // window != b // window for a, b in zip(here, there, strict=True)):
                        continue
                    if padding_is_hidden and (y2 >= size[0] or x2 >= size[1]):
                        continue
                    logit = (q[:, :, y, x] * k[:, :, y2, x2]).sum(-1)
                    logit = (
                        logit
                        + bias[:, here[0] - there[0] + window - 1, here[1] - there[1] + window - 1]
                    )
                    if _region(here, (height, width), window, shift) != _region(
                        there, (height, width), window, shift
                    ):
                        logit = logit - 100
                    logits.append(logit)
                    values.append(v[:, :, y2, x2])
            weights = torch.stack(logits, -1).softmax(-1)
            row.append((weights[..., None] * torch.stack(values, 2)).sum(2).flatten(1))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def _region(
    place: tuple[int, int], size: tuple[int, int], window: int, shift: int
) -> tuple[int, int]:
    """Which of the three slices of the rolled map a pixel is in, per axis."""
    return tuple(
        0 if a < length - window or not shift else 1 if a < length - shift else 2
        for a, length in zip(place, size, strict=True)
    )
