"""Mixers without learned weights: the controls of a mixer study.

Papers: PoolFormer, arXiv:2111.11418; MetaFormer baselines, arXiv:2210.13452
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.resize import FileGrid, precise_dtype
from .registry import register_mixer


@register_mixer("identity")
class Identity(nn.Module):
    """No mixing: tokens meet in the downsampling only."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


@register_mixer("pooling")
class Pooling(nn.Module):
    """Mean over a window, minus the token itself because the block adds it (PoolFormer, Eq. 4)."""

    def __init__(self, dim: int, *, pool_size: int = 3):
        super().__init__()
        if pool_size % 2 == 0 or pool_size < 1:
            raise ValueError(
                f"pool_size={pool_size} must be positive and odd, to keep the map's size"
            )
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        padding = self.pool_size // 2
        mean = F.avg_pool2d(
            x.permute(0, 3, 1, 2), self.pool_size, 1, padding, count_include_pad=False
        )
        return mean.permute(0, 2, 3, 1) - x


@register_mixer("random")
class RandomMixing(nn.Module):
    """A fixed random row-stochastic matrix over all tokens (baselines, Sec. 2.2).

    The matrix is a buffer: it belongs to the checkpoint but is not trained. It has (H*W)^2 entries of the
    native grid, so this mixer is for the deep stages. Other sizes interpolate it and renormalise its rows.
    """

    def __init__(self, dim: int, *, grid: tuple[int, int]):
        super().__init__()
        self.grid = (grid[0], grid[1])
        tokens = grid[0] * grid[1]
        self.register_buffer("random_matrix", torch.rand(tokens, tokens).softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        return (self._matrix(size).to(x.dtype) @ x.flatten(1, 2)).unflatten(1, size)

    def _matrix(self, size: tuple[int, int]) -> Tensor:
        """(H*W, H*W) for the grid `size`; the stored one at the native grid."""
        return _resize_matrix(self.random_matrix, self.grid, size)

    def resize_table(self, name: str, old: Tensor, file_grid: FileGrid) -> Tensor | None:
        """The file's matrix as its model has it at this one's native grid; see `ResizesTables`."""
        if old.ndim != 2 or old.shape[0] != old.shape[1]:
            return None
        return _resize_matrix(old, file_grid(len(old), self.grid), self.grid)


def _resize_matrix(matrix: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(h*w, h*w) of grid `old` -> that of grid `new`, whose rows add up to 1."""
    if old == new:
        return matrix
    matrix = _resize_columns(matrix, old, new)
    matrix = _resize_columns(matrix.t(), old, new).t()
    return matrix / matrix.sum(dim=1, keepdim=True)


def _resize_columns(matrix: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(N, h*w) -> (N, h'*w'), each row seen as a map; bilinear, so what is positive stays positive."""
    maps = matrix.unflatten(1, old)[:, None].to(precise_dtype(matrix))
    return F.interpolate(maps, new, mode="bilinear", align_corners=False).flatten(1)
