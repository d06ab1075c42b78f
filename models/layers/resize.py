"""How tables with a spatial meaning follow the input size; the identity at their own size."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import without_autocast
from .table_cache import Constants

# (positions, the model's grid) -> grid (h, w) that so many positions had in the file; ValueError if unknown.
FileGrid = Callable[[int, tuple[int, int]], tuple[int, int]]

_MATRICES = Constants(limit=64)


@runtime_checkable
class ResizesTables(Protocol):
    """A layer whose parameters follow the input size in a way of their own; `models/pretrained` asks."""

    def resize_table(self, name: str, old: Tensor, file_grid: FileGrid) -> Tensor | None:
        """Parameter or buffer `name` of a file -> this layer's; `old` itself if it fits.

        Returns:
            None if `old` is another kind of table, such as one of another head count.

        Raises:
            ValueError: such a table has no equivalent here; says why, and what to do.
        """
        ...


def same_size(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether two sizes are equal; no, if an exporter left `new` open.

    Resizing to the same size changes nothing, so the path that is exported then fits all sizes.
    """
    return not any(isinstance(side, torch.SymInt) for side in new) and tuple(old) == tuple(new)


def precise_dtype(table: Tensor) -> torch.dtype:
    """What to interpolate a table in: single precision at least, and its own if that is more."""
    return torch.promote_types(table.dtype, torch.float32)


def resize_position_grid(
    table: Tensor,
    num_special: int,
    old: tuple[int, int],
    new: tuple[int, int],
    mode: str = "bicubic",
) -> Tensor:
    """Position embedding (1, num_special + h*w, C) of grid `old` -> that of grid `new`."""
    if same_size(old, new):
        return table
    special, grid = table[:, :num_special], table[:, num_special:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)
    grid = _interpolated(grid.to(precise_dtype(table)), new, mode)
    return torch.cat([special, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Relative bias ((2h-1)*(2w-1), heads) of window `old` -> that of `new` (Swin's recipe)."""
    if old == new:
        return table
    grid = table.t().unflatten(1, (2 * old[0] - 1, 2 * old[1] - 1))[None]
    sides = (2 * new[0] - 1, 2 * new[1] - 1)
    grid = _interpolated(grid.to(precise_dtype(table)), sides, "bicubic")
    return grid[0].flatten(1).t().to(table.dtype)


def resize_complex_filter(filters: Tensor, new: tuple[int, int]) -> Tensor:
    """Half-spectrum filters (h, w, F, 2) -> (*new, F, 2), corners aligned (DFFormer's recipe)."""
    if tuple(filters.shape[:2]) == tuple(new):
        return filters
    dtype = precise_dtype(filters)
    # One matrix per axis: ten times faster than `interpolate` on the many channels of a global
    # filter, so that every forward pass can do it; half precision would blur the filters.
    with without_autocast(filters):
        rows, columns = (
            _matrix("bicubic", True, old, size, filters.device, dtype)
            for old, size in zip(filters.shape[:2], new, strict=True)
        )
        grid = rows @ filters.to(dtype).flatten(1)
        grid = columns @ grid.unflatten(1, (filters.shape[1], -1))  # new[0], new[1], 2F
        return grid.unflatten(2, (-1, 2)).to(filters.dtype)


def pooled(x: Tensor, cells: int) -> Tensor:
    """Maps (B, C, h, w) -> means over `cells` x `cells` parts of them, (B, C, cells, cells)."""
    if _wants_matrices(x):
        return _by_matrices(x, (cells, cells), "mean")
    return F.adaptive_avg_pool2d(x, cells)


def _interpolated(grid: Tensor, new: tuple[int, int], mode: str) -> Tensor:
    """(B, C, h, w) -> (B, C, *new), between the centres of pixels."""
    if _wants_matrices(grid):
        return _by_matrices(grid, new, mode)
    return F.interpolate(grid, new, mode=mode, align_corners=False)


def _wants_matrices(x: Tensor) -> bool:
    """Whether `x` needs a gradient with the same bits on every run: on a GPU PyTorch has none of these."""
    return x.requires_grad and torch.are_deterministic_algorithms_enabled()


def _by_matrices(x: Tensor, new: tuple[int, int], mode: str) -> Tensor:
    rows, columns = (
        _matrix(mode, False, old, size, x.device, x.dtype)
        for old, size in zip(x.shape[2:], new, strict=True)
    )
    return rows @ x @ columns.t()


def _matrix(
    mode: str, align_corners: bool, old: int, new: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(new, old): what interpolation, or taking means, does to each unit vector; made once."""

    def make() -> Tensor:
        # In double precision, on the CPU where the device may not have that.
        where = device if device.type == "cuda" else "cpu"
        units = torch.eye(old, dtype=torch.float64, device=where)[None, :, :, None]
        if mode == "mean":
            matrix = F.adaptive_avg_pool2d(units, (new, 1))
        else:
            matrix = F.interpolate(units, (new, 1), mode=mode, align_corners=align_corners)
        return matrix[0, :, :, 0].t().to(device, dtype)

    return _MATRICES.get((mode, align_corners, old, new, device, dtype), make)
