"""Moves between maps (B, C, H, W) and token sequences (B, H*W, C), in raster order."""

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # height and width


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W)."""
    return x.transpose(1, 2).unflatten(2, size)


def to_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """An image size of the config, one side or [height, width] -> (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with zeros at the right and the bottom, so that H and W become multiples."""
    height, width = x.shape[-2:]
    right, bottom = -width % multiple, -height % multiple
    return F.pad(x, (0, right, 0, bottom)) if right or bottom else x
