"""The lab's attentions as mixers of maps: thin frames around `models/layers`."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from ..layers.attention import MapAttention
from ..layers.dilated import DilatedAttention
from ..layers.head_interaction import HIAttention
from ..layers.point_sampling import PointSampledAttention
from ..layers.spatial_reduction import SpatialReductionAttention
from ..layers.window import WindowAttention
from .queries import (
    GrainedAttention,
    GrainedHeadTokenAttention,
    GrainedReducedAttention,
    KeptHeadTokenAttention,
    KeptReducedAttention,
    KeptTokenAttention,
    check_keep_rate,
)
from .registry import register_mixer

# Splits, budget and its weight, as of the published models with grained queries.
SPLITS, BUDGET, BUDGET_WEIGHT = (4, 2, 1), 0.5, 1.0


@register_mixer("global")
@register_mixer("attention")
def global_attention(
    dim: int,
    *,
    num_heads: int,
    qkv_bias: bool = False,
    attn_drop: float = 0.0,
    drop: float = 0.0,
    keep_rate: float = 1.0,
    grained: bool = False,
    splits: Sequence[int] = SPLITS,
    budget: float = BUDGET,
    budget_weight: float = BUDGET_WEIGHT,
) -> nn.Module:
    """Global attention; for all tokens, for the most attended ones, or with grained queries.

    Args:
        keep_rate, grained, splits, budget, budget_weight: see `_with_queries`.
    """
    build = _with_queries(
        (MapAttention, KeptTokenAttention, GrainedAttention),
        *(keep_rate, grained, splits, budget, budget_weight),
    )
    return build(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)


class HeadTokenAttention(HIAttention):
    """DHVT's global attention on maps: (B, H, W, C) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2))[0].unflatten(1, x.shape[1:3])


@register_mixer("head_token")
def head_token_attention(
    dim: int,
    *,
    num_heads: int,
    qkv_bias: bool = True,
    attn_drop: float = 0.0,
    drop: float = 0.0,
    keep_rate: float = 1.0,
    grained: bool = False,
    splits: Sequence[int] = SPLITS,
    budget: float = BUDGET,
    budget_weight: float = BUDGET_WEIGHT,
) -> nn.Module:
    """DHVT's global attention: one more key and value per head, pooled from that head's channels.

    Args:
        keep_rate, grained, splits, budget, budget_weight: see `_with_queries`.
    """
    build = _with_queries(
        (HeadTokenAttention, KeptHeadTokenAttention, GrainedHeadTokenAttention),
        *(keep_rate, grained, splits, budget, budget_weight),
    )
    return build(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)


@register_mixer("dilated")
class MultiScaleDilatedAttention(DilatedAttention):
    """DilateFormer's local attention.

    Args:
        dilation: one per group of heads; None takes the longest of (1, 2, 3), (1, 2) and (1,) whose
            length divides the heads.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kernel_size: int = 3,
        dilation: Sequence[int] | None = None,
        qkv_bias: bool = True,
        drop: float = 0.0,
    ):
        if dilation is None:
            dilation = next(tuple(range(1, n + 1)) for n in (3, 2, 1) if num_heads % n == 0)
        super().__init__(dim, num_heads, kernel_size, dilation, qkv_bias)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(super().forward(x))


@register_mixer("window")
class LocalWindowAttention(WindowAttention):
    """Swin's attention within fixed windows."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int = 7,
        shift: int = 0,
        qkv_bias: bool = True,
        drop: float = 0.0,
    ):
        super().__init__(
            dim, num_heads, grid, window_size, shift, qkv_bias=qkv_bias, proj_drop=drop
        )


@register_mixer("shifted_window")
class ShiftedWindowAttention(LocalWindowAttention):
    """Swin's attention within windows that every second block of the stage shifts by half of one."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        grid: tuple[int, int],
        index: int,
        window_size: int = 7,
        qkv_bias: bool = True,
        drop: float = 0.0,
    ):
        super().__init__(
            dim,
            num_heads=num_heads,
            grid=grid,
            window_size=window_size,
            shift=window_size // 2 if index % 2 else 0,
            qkv_bias=qkv_bias,
            drop=drop,
        )


class ReducedAttention(SpatialReductionAttention):
    """PVT's global attention with keys and values from a coarser map, (B, H, W, C) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        return super().forward(x.flatten(1, 2), size).unflatten(1, size)

    def attention_maps(self, x: Tensor) -> dict[str, Tensor]:
        return super().attention_maps(x.flatten(1, 2), (x.shape[1], x.shape[2]))


@register_mixer("spatial_reduction")
def spatial_reduction(
    dim: int,
    *,
    num_heads: int,
    stage: int,
    reduction: int | None = None,
    qkv_bias: bool = True,
    drop: float = 0.0,
    keep_rate: float = 1.0,
    grained: bool = False,
    splits: Sequence[int] = SPLITS,
    budget: float = BUDGET,
    budget_weight: float = BUDGET_WEIGHT,
) -> nn.Module:
    """PVT's attention; for all tokens, for the most attended ones, or with grained queries.

    Args:
        reduction: how much coarser keys and values are per side; None takes PVT's 8, 4, 2, 1 by stage.
        keep_rate, grained, splits, budget, budget_weight: see `_with_queries`.
    """
    if reduction is None:
        reduction = max(1, 8 // 2**stage)
    build = _with_queries(
        (ReducedAttention, KeptReducedAttention, GrainedReducedAttention),
        *(keep_rate, grained, splits, budget, budget_weight),
    )
    return build(dim, num_heads, reduction, qkv_bias, proj_drop=drop)


def _with_queries(
    variants: tuple[Callable[..., nn.Module], ...],
    keep_rate: float,
    grained: bool,
    splits: Sequence[int],
    budget: float,
    budget_weight: float,
) -> Callable[..., nn.Module]:
    """What builds an attention over global keys with the queries that the options ask for.

    Args:
        variants: of the attention, for all tokens, for the most attended ones, with grained queries.
        keep_rate: share of the tokens that run the block, see `KeptTokens`.
        grained: see `GrainedMixer`, also for the arguments after it.

    Raises:
        ValueError: options that exclude each other, or that need `grained`.
    """
    every, kept, grains = variants
    if check_keep_rate(keep_rate) < 1 and grained:
        raise ValueError(f"grained=True excludes keep_rate={keep_rate}: leave one of them out")
    if grained:
        return partial(grains, splits=splits, budget=budget, budget_weight=budget_weight)
    if (tuple(splits), budget, budget_weight) != (SPLITS, BUDGET, BUDGET_WEIGHT):
        raise ValueError(
            f"splits={list(splits)}, budget={budget} and budget_weight={budget_weight} belong to grained "
            "queries; add grained=True"
        )
    return partial(kept, keep_rate=keep_rate) if keep_rate < 1 else every


@register_mixer("point_sampled")
class PointAttention(PointSampledAttention):
    """DPVT's attention to a few learned positions per query."""

    def __init__(self, dim: int, *, num_heads: int, num_points: int = 4, drop: float = 0.0):
        super().__init__(dim, num_heads, num_points, drop)

    def init_(self) -> None:
        self.init_ring_()

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        return super().forward(x.flatten(1, 2), size).unflatten(1, size)

    def attention_maps(self, x: Tensor) -> dict[str, Tensor]:
        return super().attention_maps(x.flatten(1, 2), (x.shape[1], x.shape[2]))
