"""Dynamic Grained Encoder: DeiT and PVT whose blocks ask fewer queries where the image is simple.

Paper:      arXiv:2301.03831, Sec. 3.1 (encoder), 3.2 (router), 3.3 (budget), Table 1
Reference:  the release of the paper (NeurIPS 2021), trained at 256 px
Deviations: any input size, see `layers/grained.py`, `vit.py` and `pvt.py`; the release leaves tokens
            undefined where a region does not fit. Evaluation needs no CUDA kernel, and has a gradient.
Shapes:     B batch, C channels, H/W map, E extra tokens, N = E + H*W tokens, R regions, S granularities,
            T candidate queries of an image, L queries of a batch
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .layers.eager import may_keep
from .layers.grained import GrainedQueries, Routing, ragged_attention
from .layers.init import LAYER_NORM_EPS, drop_path_rates, init_vit_
from .layers.layer_norm import LayerNorm
from .layers.mlp import Mlp
from .layers.spatial_reduction import SpatialReductionAttention
from .layers.table_cache import Constants
from .layers.tokens import Size
from .pvt import PyramidTransformer, check_sr_ratios
from .registry import register
from .vit import VisionTransformer

# What a query costs in each block, by numbers and device.
_COLUMNS = Constants(limit=64)


class Complexity(NamedTuple):
    """Multiply-adds per image (B,), double, by the formula of the release."""

    static: Tensor  # if every token were a query
    dynamic: Tensor  # with the queries that were chosen

    @property
    def ratio(self) -> Tensor:
        return self.dynamic / self.static.clamp(min=1.0)


class GrainedBlock(nn.Module):
    """Transformer block whose queries are patch means, as fine in each region as its router says (Sec. 3.1).

    Attention and MLP work on the queries; what they change is added to all tokens that a query stands
    for, see `GrainedQueries`.
    Shapes: (B, N, C) -> (B, N, C) and the `Routing`. The map has `size`; extra tokens precede it and
    are queries of their own.
    """

    def __init__(
        self,
        dim: int,
        attn: SpatialReductionAttention,
        mlp_ratio: float,
        splits: Sequence[int],
        drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.dge = GrainedQueries(dim, splits)
        self.norm1 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_ratio, drop=drop)
        # Rows come as (L, C), so it drops single queries, not images: so were the published models trained.
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Routing]:
        def change(rows: Tensor, lengths: Tensor | None) -> Tensor:
            k, v = self.attn.keys_values(self.norm1(x), size)
            mixed = ragged_attention(self.attn.q(self.norm1(rows)), k, v, lengths)
            mixed = self.drop_path(self.attn.project(mixed))
            return mixed + self.drop_path(self.mlp(self.norm2(rows + mixed)))

        return self.dge.ask(x, size, change)

    def macs(self, inputs: int, counted_products: int) -> tuple[float, float]:
        """Multiply-adds of the block for `inputs` tokens, by the formula of the release.

        Returns:
            Those that any number of queries takes, and those of each query.
        """
        dim, hidden = self.dge.dim, self.mlp.hidden
        reduction = self.attn.reduction
        keys = inputs / reduction**2
        shared = 2 * inputs * dim + 2 * keys * dim**2
        if reduction > 1:
            shared += inputs * dim**2 + keys * dim
        router = inputs / self.dge.region**2 * dim * (1 + len(self.dge.steps))
        attention = 2 * dim**2 + counted_products * keys * dim + 3 * keys * self.attn.num_heads
        mlp = 2 * dim * hidden + hidden
        return shared + router, attention + mlp


@dataclass
class _LastForward:
    """What `aux_losses`, `complexity` and `token_maps` are computed from, when they are asked for."""

    image_shape: torch.Size
    training: bool
    # Name of the block, its routing, size of the map, number of extra tokens.
    blocks: list[tuple[str, Routing, Size, int]] = field(default_factory=list)
    means: Complexity | None = None  # over the batch, once they were asked for


class DynamicGrained:
    """What the two architectures share: running grained blocks, and what they did (Sec. 3.3).

    A mixin before the class of the frame.
    """

    cost_depends_on_images = True
    # Of the two matrix products of attention, how many the release counts.
    counted_products: ClassVar[int]
    budget: float
    budget_weight: float
    official_area: bool
    _last: _LastForward | None

    def begin_record(self, images: Tensor) -> None:
        """Forget the last forward pass: another one begins, of images (B, in_chans, H, W)."""
        if may_keep(compiled=True):  # the budget is for compiled training too
            self._last = _LastForward(images.shape, self.training)

    def run_grained(self, name: str, blocks: Iterable[nn.Module], x: Tensor, size: Size) -> Tensor:
        """Tokens (B, N, C) through the blocks `name`.0, `name`.1, ...; their routing is recorded."""
        extra = x.shape[1] - size[0] * size[1]
        for index, block in enumerate(blocks):
            x, routing = self.run_block(block, x, size)
            if may_keep(compiled=True):
                self._last.blocks.append((f"{name}.{index}", routing, size, extra))
        return x

    def complexity(self) -> Complexity:
        """Multiply-adds per image of the last forward pass; in training mode with a graph to the routers.

        It is the estimate that the budget is defined on: norms, attention, MLP, router, patch
        embeddings, classifier. For counts of what really runs use `utils/complexity.py`.

        Raises:
            RuntimeError: there was no forward pass since the last `train()` or `eval()`.
        """
        last = self._last
        if last is None:
            raise RuntimeError("complexity() describes the last forward pass, and there was none")
        height, width = last.image_shape[2:]
        # The release takes H * W from axes 1 and 2 of (B, C, H, W), which changes the ratio slightly.
        area = last.image_shape[1] * height if self.official_area else height * width
        stages: dict[tuple[Size, int], list[tuple[GrainedBlock, Tensor]]] = {}
        for name, routing, size, extra in last.blocks:
            block = self.get_submodule(name)
            stages.setdefault((size, extra), []).append((block, routing.gates))
        # Few operators for all blocks: each is a launch in every training step, and computes next to nothing.
        shared, of_all_tokens = self.fixed_macs(area), 0.0
        queries, of_query = [], []
        for (size, extra), members in stages.items():
            blocks, gates = zip(*members, strict=True)
            inputs = extra + size[0] * size[1]
            for block in blocks:
                of_any, of_each = block.macs(inputs, self.counted_products)
                shared, of_all_tokens = shared + of_any, of_all_tokens + inputs * of_each
                of_query.append(of_each)
            counts = blocks[0].dge.num_queries(torch.cat(gates), size, extra)
            queries.append(counts.view(len(blocks), len(gates[0])))
        counts = torch.cat(queries).double()  # blocks, B
        dynamic = (counts * _column(tuple(of_query), counts.device)).sum(0) + shared
        return Complexity(torch.full_like(dynamic, shared + of_all_tokens), dynamic)

    def fixed_macs(self, area: int) -> float:
        """Multiply-adds outside the blocks, for images of `area` pixels."""
        raise NotImplementedError

    def aux_losses(self) -> dict[str, Tensor]:
        """`dge_budget`: weight * (dynamic / static - budget)^2 of the last training forward (Eq. 7)."""
        if self._last is None or not self._last.training or not self.budget_weight:
            return {}
        excess = self._mean_complexity().ratio - self.budget
        return {"dge_budget": (self.budget_weight * excess.square()).float()}

    def log_values(self) -> dict[str, Tensor | float]:
        """`dge_static_gmacs` and `dge_dynamic_gmacs` per image, and `dge_ratio`, of means over the batch."""
        if self._last is None or not self._last.training:
            return {}
        means = _complexity_values(self._mean_complexity())
        return {name: value.detach() for name, value in means.items()}

    def image_values(self) -> dict[str, Tensor]:
        """`dge_static_gmacs`, `dge_dynamic_gmacs` and `dge_ratio` of each image."""
        if self._last is None or self._last.training:
            return {}
        return _complexity_values(self.complexity())

    def _mean_complexity(self) -> Complexity:
        """Means over the batch, with a graph; computed once, as both the loss and the log want them."""
        if self._last.means is None:
            with torch.enable_grad():  # the log may ask first, and not care
                self._last.means = Complexity(*(macs.mean() for macs in self.complexity()))
        return self._last.means

    def token_maps(self) -> dict[str, Tensor]:
        """Per block of the last evaluation forward, one cell per region.

        `grain::<block>.dge` (B, rows, columns) indexes SPLITS; `gate_logits::<block>.dge` has an
        axis of granularities more.
        """
        maps = {}
        if self._last is not None and not self._last.training:
            for name, routing, *_ in self._last.blocks:
                logits = routing.logits.detach()
                maps[f"grain::{name}.dge"] = logits.argmax(-1)
                maps[f"gate_logits::{name}.dge"] = logits
        return maps

    def train(self, mode: bool = True) -> Self:
        self._last = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles do not need the last forward pass, and its graph cannot be copied.
        return {**self.__dict__, "_last": None}


@register("deit_dge")
class DeiTDGE(DynamicGrained, VisionTransformer):
    """DeiT with grained blocks: one map of stride `patch_size`, and a class token.

    Args:
        splits: granularities to choose from, as queries per side of a region; the largest is the side
            of a region in tokens.
        budget: share of the static complexity that training aims at.
        budget_weight: weight of the budget loss; 0 leaves it out.
        official_area: count in_chans * height pixels in the patch embedding, as the release did by
            mistake, so that budgets mean the same; False counts height * width.
    """

    counted_products = 2

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        splits: Sequence[int] = (4, 2, 1),
        budget: float = 0.5,
        budget_weight: float = 1.0,
        official_area: bool = True,
    ):
        # Without blocks: these here have another attention, and a router.
        super().__init__(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=0,
        )
        self.blocks = nn.ModuleList(
            GrainedBlock(
                embed_dim,
                SpatialReductionAttention(embed_dim, num_heads, 1, qkv_bias, drop_rate),
                mlp_ratio,
                splits,
                drop_rate,
                drop_path,
            )
            for drop_path in drop_path_rates(drop_path_rate, [depth])[0]
        )
        self.blocks.apply(init_vit_)
        _init_routers_(self)
        self.budget, self.budget_weight = budget, budget_weight
        self.official_area = official_area
        self._last = None

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, N, C), the class token first."""
        self.begin_record(x)
        return self.norm(self.run_grained("blocks", self.blocks, self.embed(x), self.grid_of(x)))

    def fixed_macs(self, area: int) -> float:
        in_chans = self.patch_embed.in_chans
        return area * self.num_features * in_chans + self.num_features * self.num_classes


@register("pvt_dge")
class PVTDGE(DynamicGrained, PyramidTransformer):
    """PVT with grained blocks in all four stages.

    Args:
        sr_ratios, splits, budget, budget_weight, official_area: as in `PVT` and `DeiTDGE`.
    """

    counted_products = 1

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        depths: Sequence[int] = (2, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        splits: Sequence[int] = (4, 2, 1),
        budget: float = 0.5,
        budget_weight: float = 1.0,
        official_area: bool = True,
    ):
        check_sr_ratios("PVT_DGE", sr_ratios)

        def make_block(stage: int, drop_path: float) -> nn.Module:
            dim = embed_dims[stage]
            attn = SpatialReductionAttention(
                dim, num_heads[stage], sr_ratios[stage], qkv_bias, drop_rate
            )
            return GrainedBlock(dim, attn, mlp_ratios[stage], splits, drop_rate, drop_path)

        super().__init__(
            "PVT_DGE",
            make_block,
            dict(
                EMBED_DIMS=embed_dims,
                NUM_HEADS=num_heads,
                MLP_RATIOS=mlp_ratios,
                DEPTHS=depths,
                SR_RATIOS=sr_ratios,
            ),
            patch_size,
            True,
            img_size,
            in_chans,
            num_classes,
            drop_rate,
            drop_path_rate,
        )
        _init_routers_(self)
        self.budget, self.budget_weight = budget, budget_weight
        self.official_area = official_area
        self._last = None

    def encode(self, x: Tensor) -> list[tuple[Tensor, Size]]:
        self.begin_record(x)
        return super().encode(x)

    def run_stage(self, stage: int, x: Tensor, size: Size) -> Tensor:
        name = f"block{stage + 1}"
        return self.run_grained(name, getattr(self, name), x, size)

    def fixed_macs(self, area: int) -> float:
        total = float(self.num_features * self.num_classes)
        for stage in range(len(self.feature_info)):
            stem = getattr(self, f"patch_embed{stage + 1}")
            patches = area / stem.patch_size**2
            # Product of the convolution, then the norm.
            total += area * stem.in_chans * stem.embed_dim + patches * stem.embed_dim
            area = patches
        return total

    def no_weight_decay(self) -> set[str]:
        """The class token; the published runs decay the position tables, and so do we."""
        return {"cls_token"}


def _column(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """(len(numbers), 1) double, copied to the device once: each copy to a GPU waits for it."""

    def make() -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]

    return _COLUMNS.get((numbers, device), make)


def _complexity_values(macs: Complexity) -> dict[str, Tensor]:
    """Multiply-adds as they are reported, in 1e9, and their ratio."""
    return {
        "dge_static_gmacs": macs.static / 1e9,
        "dge_dynamic_gmacs": macs.dynamic / 1e9,
        "dge_ratio": macs.ratio,
    }


def _init_routers_(model: nn.Module) -> None:
    """The routers' own initialisation, which the model-wide one has overwritten."""
    for module in model.modules():
        if isinstance(module, GrainedQueries):
            module.router.init_()
