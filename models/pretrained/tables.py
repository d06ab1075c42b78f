"""Tables of another size: position embeddings, relative position biases, Fourier filters."""

import math
from functools import partial

from torch import Tensor, nn

from ..layers.resize import (
    ResizesTables,
    resize_bias_table,
    resize_complex_filter,
    resize_position_grid,
)

_UNKNOWN_GRID = (
    "a grid of the file is neither square nor one of DATA.IMG_SIZE in its config: save the weights as "
    "{'model': weights, 'config': {'DATA': {'IMG_SIZE': [height, width]}}}"
)


def resized(
    owner: nn.Module,
    key: str,
    old: Tensor,
    new: tuple[int, ...],
    grid: tuple[int, tuple[int, int], str] | None,
    image: tuple[int, int] | None,
) -> Tensor | None:
    """Tensor `old` of the file as the model has it: itself if it fits; None if it is no table.

    The file's grid is that of its images' size, if known and fitting, else square. The model's is
    square, unless it says otherwise: `grid` is (special tokens, (h, w), interpolation mode).

    Raises:
        ValueError: it is such a table and cannot be resized; says why.
    """
    leaf = key.rsplit(".", 1)[-1]
    if isinstance(owner, ResizesTables):
        return owner.resize_table(leaf, old, partial(_file_grid, image))
    if _same_layout(tuple(old.shape), new, grid, image):
        return old
    if _is_position_table(key):
        if old.ndim != 3 or len(new) != 3 or old.shape[2] != new[2]:
            return None
        # PVT resamples bilinearly and calls its tables pos_embed1 to pos_embed4; ViT and Swin bicubically.
        mode = "bilinear" if leaf[-1].isdigit() else "bicubic"
        choices = [(grid[0], grid[1])] if grid else _square_grids(new[1])
        for num_special, size in choices:
            side = _root(old.shape[1] - num_special)
            square = (side, side) if side else None
            before = _image_grid(old.shape[1] - num_special, image) or square
            if before and num_special + size[0] * size[1] == new[1]:
                mode = grid[2] if grid else mode
                return resize_position_grid(old, num_special, before, size, mode)
        raise ValueError(_special_tokens(old.shape[1], [n for n, _ in choices]) or _UNKNOWN_GRID)
    if leaf == "relative_position_bias_table":
        if old.ndim != 2 or len(new) != 2 or old.shape[1] != new[1]:
            return None
        before = _root(old.shape[0])
        after = grid[1] if grid else (((_root(new[0]) or 0) + 1) // 2,) * 2
        if not before or before % 2 == 0 or (2 * after[0] - 1) * (2 * after[1] - 1) != new[0]:
            return None
        return resize_bias_table(old, ((before + 1) // 2,) * 2, after)
    if leaf == "complex_weights" and old.ndim == len(new) == 4 and tuple(old.shape[2:]) == new[2:]:
        return resize_complex_filter(old, new[:2])
    return None


def _is_position_table(key: str) -> bool:
    leaf = key.rsplit(".", 1)[-1]
    return leaf == "absolute_pos_embed" or leaf.rstrip("1234") == "pos_embed"


def _same_layout(
    old: tuple[int, ...],
    new: tuple[int, ...],
    grid: tuple[int, tuple[int, int], str] | None,
    image: tuple[int, int] | None,
) -> bool:
    """Whether a tensor has the model's shape and, if it is a table of a known grid, that grid."""
    if old != new or not grid or len(old) != 3:
        return old == new
    return _image_grid(old[1] - grid[0], image) in (None, grid[1])  # 8x8 has as many as 4x16


def _file_grid(image: tuple[int, int] | None, length: int, own: tuple[int, int]) -> tuple[int, int]:
    """Grid (h, w) of `length` patches in the file: of its images, else the model's `own`, else square.

    Raises:
        ValueError: none of these has so many.
    """
    side = _root(length)
    square = (side, side) if side else None
    grid = _image_grid(length, image) or (own if math.prod(own) == length else square)
    if grid is None:
        raise ValueError(_UNKNOWN_GRID)
    return grid


def _image_grid(length: int, image: tuple[int, int] | None) -> tuple[int, int] | None:
    """Grid (h, w) of `length` patches of an image, or None if there is none."""
    for stride in range(1, max(image) + 1) if image else ():
        grid = (-(-image[0] // stride), -(-image[1] // stride))
        if grid[0] * grid[1] == length:  # a larger stride gives fewer patches: no other grid fits
            return grid
    return None


def _special_tokens(length: int, ours: list[int]) -> str:
    """What to do about a table of `length` entries with other special tokens; empty if it has none such."""
    theirs = [n for n in (0, 1, 2) if n not in ours and _root(length - n)]
    if not theirs or not ours:
        return ""
    return (
        f"special tokens: the file's table has {theirs[0]} before its grid, the model's "
        f"{' or '.join(map(str, ours))} (1: class token, 2: a distillation token too); choose the variant "
        "that the file is of, for DeiT with or without distillation (MODEL.DEIT.DISTILLED)"
    )


def _square_grids(length: int) -> list[tuple[int, tuple[int, int]]]:
    """(special tokens, square grid) that make up a table of `length` entries."""
    sides = [(num_special, _root(length - num_special)) for num_special in (0, 1, 2)]
    return [(num_special, (side, side)) for num_special, side in sides if side]


def _root(number: int) -> int | None:
    """Integer square root of a positive square number, else None."""
    side = math.isqrt(max(number, 0))
    return side if side and side * side == number else None
