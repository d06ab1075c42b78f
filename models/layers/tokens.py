"""Moves between maps and token sequences in raster order, and what else changes shapes only."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # height and width


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W)."""
    return x.transpose(1, 2).unflatten(2, size)


def to_pair(size: int | Sequence[int], name: str = "img_size") -> Size:
    """An image size of the config, one side or [height, width] -> (height, width).

    Raises:
        ValueError: anything else, such as the shape of an image; the message speaks of `name`.
    """
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise ValueError(f"{name}={size!r} must be one side in pixels or [height, width]")
    return sides


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with zeros at the right and the bottom, so that H and W become multiples."""
    height, width = x.shape[-2:]
    right, bottom = -width % multiple, -height % multiple
    return F.pad(x, (0, right, 0, bottom)) if right or bottom else x


def space_to_depth(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4C), missing neighbours 0.

    Channel blocks in the order of patch merging: (row, column) = (0, 0), (1, 0), (0, 1), (1, 1).
    """
    if x.shape[1] % 2 or x.shape[2] % 2:  # padding by nothing copies
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B H/2 2 W/2 2 C
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)
