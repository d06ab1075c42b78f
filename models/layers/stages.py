"""What pyramids of window attention have in common: plans, norms and depths of their stages, and positions.

Reference:  github.com/microsoft/Swin-Transformer @ f82860b, models/swin_transformer.py
Shapes:     B batch, C channels, H/W map; maps are (B, H, W, C)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .init import drop_path_rates
from .layer_norm import LayerNorm
from .resize import resize_position_grid
from .tokens import to_pair


@dataclass(frozen=True)
class StagePlan:
    """What the blocks of one stage are built from.

    Attributes:
        grid: map size (H, W) at the built input size.
        drop_paths: one rate per block.
    """

    index: int
    dim: int
    num_heads: int
    grid: tuple[int, int]
    drop_paths: list[float]


def plan_stages(
    img_size: int | Sequence[int],
    patch_size: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int,
    drop_path_rate: float,
) -> tuple[tuple[int, int], list[StagePlan]]:
    """Check the hyper-parameters -> map size (H, W) after the stem, and one plan per stage.

    Raises:
        ValueError: lists of different lengths, or a width that its heads do not divide.
    """
    if len(depths) != len(num_heads) or not depths or min(depths) < 1:
        raise ValueError(
            f"DEPTHS={list(depths)} and NUM_HEADS={list(num_heads)} need one positive entry per stage"
        )
    if window_size < 1 or patch_size < 1:
        raise ValueError(f"WINDOW_SIZE={window_size} and PATCH_SIZE={patch_size} must be positive")
    height, width = to_pair(img_size)
    grid = (-(-height // patch_size), -(-width // patch_size))
    plans = []
    for i, (heads, rates) in enumerate(
        zip(num_heads, drop_path_rates(drop_path_rate, list(depths)), strict=True)
    ):
        dim = embed_dim * 2**i
        if dim % heads:
            raise ValueError(
                f"NUM_HEADS[{i}]={heads} does not divide the width {dim} of stage {i} "
                f"(EMBED_DIM={embed_dim} times {2**i})"
            )
        shrunk = (-(-grid[0] // 2**i), -(-grid[1] // 2**i))
        plans.append(StagePlan(i, dim, heads, shrunk, rates))
    return grid, plans


def set_stage_norms(model: nn.Module, dims: Sequence[int], per_stage: bool) -> None:
    """Give `model` one norm per stage, `norm0`, `norm1`, ..., or `norm` for the last stage only.

    From one to the other the norm of the last stage keeps its weights, and the others are fresh.
    """
    names = [f"norm{i}" for i in range(len(dims))]
    last = getattr(model, "norm", getattr(model, names[-1], None))
    if last is None:
        last = LayerNorm(dims[-1])
    for name in {"norm", *names} & model._modules.keys():
        delattr(model, name)
    if not per_stage:
        model.norm = last
        return
    for name, dim in zip(names[:-1], dims[:-1], strict=True):
        model.add_module(name, LayerNorm(dim).to(last.weight))
    model.add_module(names[-1], last)


def stage_prefixes(layers: nn.ModuleList) -> list[tuple[str, ...]]:
    """Depths for layer-wise decay: stem, then each block; `downsample` goes with the last one."""
    prefixes: list[tuple[str, ...]] = [("patch_embed",)]
    for i, stage in enumerate(layers):
        prefixes += [(f"layers.{i}.blocks.{j}",) for j in range(len(stage.blocks))]
        prefixes[-1] += (f"layers.{i}.downsample",)
    return prefixes


class AbsolutePositions:
    """A learned vector for each position of the stem's map, or none; a mixin before `Backbone`.

    Attributes:
        grid: size (H, W) of the map that the vectors are stored for; on others they are resized.
        absolute_pos_embed: (1, H*W, C), or None.
    """

    grid: tuple[int, int]
    absolute_pos_embed: nn.Parameter | None

    def make_positions(self, grid: tuple[int, int], dim: int, learned: bool) -> None:
        """Set both attributes; the vectors are N(0, 0.02^2), cut off."""
        self.grid = grid
        self.absolute_pos_embed = None
        if learned:
            table = torch.empty(1, grid[0] * grid[1], dim)
            self.absolute_pos_embed = nn.Parameter(trunc_normal_(table, std=0.02))

    def add_positions(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) of any size -> the same, plus its positions."""
        if self.absolute_pos_embed is None:
            return x
        size = (x.shape[1], x.shape[2])
        embed = resize_position_grid(self.absolute_pos_embed, 0, self.grid, size)
        return x + embed.unflatten(1, size)

    def position_tables(self) -> dict[str, tuple[int, tuple[int, int], str]]:
        if self.absolute_pos_embed is None:
            return {}
        return {"absolute_pos_embed": (0, self.grid, "bicubic")}
