"""The lab's attentions as mixers of maps: thin frames around `models/layers`."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.attention import MapAttention
from ..layers.dilated import DilatedAttention
from ..layers.head_interaction import HIAttention
from ..layers.point_sampling import PointSampledAttention
from ..layers.spatial_reduction import SpatialReductionAttention
from ..layers.window import WindowAttention
from .queries import GrainedAttention, GrainedReducedAttention, KeptTokenAttention
from .registry import register_mixer

# Splits, budget and its weight, as of the published models with grained queries.
SPLITS, BUDGET, BUDGET_WEIGHT = (4, 2, 1), 0.5, 1.0


class GlobalAttention(MapAttention):
    """`MapAttention` with the names of the lab's options."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)


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
        keep_rate: share of the tokens that run the block, see `KeptTokenAttention`.
        grained: see `GrainedMixer`, also for the arguments after it.

    Raises:
        ValueError: options that exclude each other, or that need `grained`.
    """
    if not 0 < keep_rate <= 1:
        raise ValueError(f"attention: keep_rate={keep_rate} must be in (0, 1]; 1 keeps all tokens")
    if grained:
        if keep_rate < 1 or attn_drop:
            raise ValueError("attention: grained=True excludes keep_rate and attn_drop")
        return GrainedAttention(dim, num_heads, qkv_bias, drop, splits, budget, budget_weight)
    _refuse_grains("attention", splits, budget, budget_weight)
    if keep_rate < 1:
        return KeptTokenAttention(dim, num_heads, keep_rate, qkv_bias, attn_drop, drop)
    return GlobalAttention(
        dim, num_heads=num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, drop=drop
    )


def _refuse_grains(mixer: str, splits: Sequence[int], budget: float, budget_weight: float) -> None:
    """ValueError for options that would have no effect."""
    if (tuple(splits), budget, budget_weight) != (SPLITS, BUDGET, BUDGET_WEIGHT):
        raise ValueError(
            f"{mixer}: splits, budget and budget_weight belong to grained queries; add grained=True"
        )


@register_mixer("head_token")
class HeadTokenAttention(HIAttention):
    """DHVT's global attention: one more key and value per head, pooled from that head's channels."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2))[0].unflatten(1, x.shape[1:3])


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


@register_mixer("spatial_reduction")
def spatial_reduction(
    dim: int,
    *,
    num_heads: int,
    stage: int,
    reduction: int | None = None,
    qkv_bias: bool = True,
    drop: float = 0.0,
    grained: bool = False,
    splits: Sequence[int] = SPLITS,
    budget: float = BUDGET,
    budget_weight: float = BUDGET_WEIGHT,
) -> nn.Module:
    """PVT's attention, for all tokens or with grained queries.

    Args:
        reduction: how much coarser keys and values are per side; None takes PVT's 8, 4, 2, 1 by stage.
        grained: see `GrainedMixer`, also for the arguments after it.
    """
    if reduction is None:
        reduction = max(1, 8 // 2**stage)
    if grained:
        return GrainedReducedAttention(
            dim, num_heads, reduction, qkv_bias, drop, splits, budget, budget_weight
        )
    _refuse_grains("spatial_reduction", splits, budget, budget_weight)
    return ReducedAttention(dim, num_heads, reduction, qkv_bias, drop)


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
