"""How tables with a spatial meaning follow the input size; the identity at their own size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_position_grid(
    table: Tensor,
    num_special: int,
    old: tuple[int, int],
    new: tuple[int, int],
    mode: str = "bicubic",
) -> Tensor:
    """Position embedding (1, num_special + h*w, C) of grid `old` -> that of grid `new`."""
    if old == new:
        return table
    special, grid = table[:, :num_special], table[:, num_special:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), new, mode=mode, align_corners=False).to(table.dtype)
    return torch.cat([special, grid.flatten(2).transpose(1, 2)], dim=1)


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Relative bias ((2h-1)*(2w-1), heads) of window `old` -> that of `new` (Swin's recipe)."""
    if old == new:
        return table
    grid = table.t().unflatten(1, (2 * old[0] - 1, 2 * old[1] - 1))[None]
    grid = F.interpolate(
        grid.float(), (2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic", align_corners=False
    )
    return grid[0].flatten(1).t().to(table.dtype)


def resize_complex_filter(filters: Tensor, new: tuple[int, int]) -> Tensor:
    """Half-spectrum filters (h, w, F, 2) -> (*new, F, 2), corners aligned (DFFormer's recipe)."""
    if tuple(filters.shape[:2]) == tuple(new):
        return filters
    grid = filters.flatten(2).permute(2, 0, 1)[None]  # 1, 2F, h, w
    grid = F.interpolate(grid.float(), new, mode="bicubic", align_corners=True)
    return grid[0].permute(1, 2, 0).unflatten(2, (-1, 2)).to(filters.dtype)
