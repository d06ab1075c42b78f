"""PVT: a pyramid of transformer stages whose keys and values come from a reduced map.

Paper:      arXiv:2102.12122, Sec. 3 (stages, spatial reduction), Table 1 (layout)
Reference:  the baselines of the Dynamic Grained Encoder release (NeurIPS 2021), trained at 256 px
Deviations: any input size from 32 px up. Maps have ceil(H / stride) rows, by zeros at the right and
            the bottom; each stage compares its map with its own native grid, where the release
            compares with that of the first stage and fails, for example, at twice the native size.
Shapes:     B batch, C width of a stage, H/W map, N tokens, the class token (last stage) first
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from .backbone import Backbone
from .layers.init import LAYER_NORM_EPS, drop_path_rates, init_vit_, new_classifier
from .layers.layer_norm import LayerNorm
from .layers.mlp import Mlp
from .layers.patch_embed import PatchEmbed
from .layers.resize import resize_position_grid, same_size
from .layers.spatial_reduction import SpatialReductionAttention
from .layers.table_cache import TableCache
from .layers.tokens import Size, to_map, to_pair, to_tokens
from .registry import register

NUM_STAGES = 4


class PyramidBlock(nn.Module):
    """Pre-norm transformer block around a mixer that needs the size of the map.

    Shapes: (B, N, C) -> (B, N, C).
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float = 0.0, drop_path: float = 0.0
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_ratio, drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mixing(self, x: Tensor, size: Size) -> tuple[nn.Module, tuple[Tensor, Size]]:
        """The attention, and what it gets for tokens (B, N, C) of a map of `size`."""
        return self.attn, (self.norm1(x), size)


class PyramidTransformer(Backbone):
    """The frame that PVT, DPVT and PVT-DGE fill with their blocks.

    Args:
        node: config node of the architecture, for error messages.
        make_block: stage (from 0), drop path rate -> block that maps (tokens, size of the map).
        per_stage: options that must have one entry per stage, by config key; EMBED_DIMS and DEPTHS at least.
        patch_size: stride of the first stage; each further stage halves the map.
        class_token: prepend one in the last stage and classify it, instead of the mean of the tokens.
            It stays when num_classes is 0: the maps depend on it through keys and values.
        img_size: size that the position tables are stored for; other sizes are accepted.
        num_classes: 0 also leaves out the final norm, which the maps do not pass.

    `token_maps` has the last `PyramidBlock` of each stage.
    """

    def __init__(
        self,
        node: str,
        make_block: Callable[[int, float], nn.Module],
        per_stage: dict[str, Sequence[Any]],
        patch_size: int,
        class_token: bool,
        img_size: int | Sequence[int],
        in_chans: int,
        num_classes: int,
        drop_rate: float,
        drop_path_rate: float,
    ):
        super().__init__()
        for key, values in per_stage.items():
            if len(values) != NUM_STAGES:
                raise ValueError(
                    f"MODEL.{node}.{key}={list(values)} needs {NUM_STAGES} entries, one per stage"
                )
        dims, depths = per_stage["EMBED_DIMS"], per_stage["DEPTHS"]
        self.feature_info = [
            dict(channels=dim, stride=patch_size * 2**stage) for stage, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.num_special = [0, 0, 0, int(class_token)]
        height, width = to_pair(img_size)
        self.grids = [
            (-(-height // info["stride"]), -(-width // info["stride"]))
            for info in self.feature_info
        ]

        def table(tokens: int, dim: int) -> nn.Parameter:
            return nn.Parameter(trunc_normal_(torch.empty(1, tokens, dim), std=0.02))

        if class_token:
            self.cls_token = table(1, dims[-1])
        rates = drop_path_rates(drop_path_rate, list(depths))
        for stage, (dim, grid) in enumerate(zip(dims, self.grids, strict=True)):
            stem = (in_chans, dim, patch_size) if stage == 0 else (dims[stage - 1], dim, 2)
            blocks = [make_block(stage, rate) for rate in rates[stage]]
            # Numbered from 1, as the published names are.
            self.add_module(f"patch_embed{stage + 1}", PatchEmbed(*stem, norm_eps=1e-5))
            positions = table(self.num_special[stage] + grid[0] * grid[1], dim)
            self.register_parameter(f"pos_embed{stage + 1}", positions)
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.watch(*(block for block in blocks[-1:] if isinstance(block, PyramidBlock)))
        self.pos_drop = nn.Dropout(drop_rate)
        self.norm: nn.Module = nn.Identity()
        self._reset_classifier(num_classes)
        self.apply(init_vit_)
        self._resized = TableCache()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, N, C) of the last stage."""
        return self.norm(self.encode(x)[-1][0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) -> logits (B, num_classes), or the features (B, C) that are classified."""
        x = x[:, 0] if self.num_special[-1] else x.mean(1)
        return x if pre_logits else self.head(x)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Images -> the output (B, C, ceil(H/s), ceil(W/s)) of each stage, not normalised."""
        stages = zip(self.encode(x), self.num_special, strict=True)
        return [to_map(tokens[:, special:], size) for (tokens, size), special in stages]

    def encode(self, x: Tensor) -> list[tuple[Tensor, Size]]:
        """Images -> per stage its tokens (B, N, C), the special one first, and the size of its map."""
        outputs = []
        for stage in range(NUM_STAGES):
            x, size = self.embed(x, stage)
            x = self.run_stage(stage, x, size)
            outputs.append((x, size))
            if stage < NUM_STAGES - 1:
                x = to_map(x, size)
        return outputs

    def embed(self, x: Tensor, stage: int) -> tuple[Tensor, Size]:
        """Images or the map of the stage before -> tokens with positions, and the size of the map."""
        x = getattr(self, f"patch_embed{stage + 1}")(x)
        size = (x.shape[2], x.shape[3])
        x = to_tokens(x)
        if self.num_special[stage]:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + self._positions(stage, size)), size

    def run_stage(self, stage: int, x: Tensor, size: Size) -> Tensor:
        """Tokens through the blocks of a stage (from 0)."""
        for block in getattr(self, f"block{stage + 1}"):
            x = self.run_block(block, x, size)
        return x

    def _positions(self, stage: int, size: Size) -> Tensor:
        """Position table for maps of `size`; without gradient the last one made is kept."""
        name, special, native = f"pos_embed{stage + 1}", self.num_special[stage], self.grids[stage]
        table = getattr(self, name)
        if same_size(native, size):
            return table
        return self._resized.get(
            name,
            table,
            size,
            lambda table: resize_position_grid(table, special, native, size, "bilinear"),
        )

    def train(self, mode: bool = True) -> "PyramidTransformer":
        # Writes through `.data` leave no trace that the cache could see.
        self._resized.clear()
        return super().train(mode)

    def get_classifier(self) -> nn.Module:
        return self.head

    def _reset_classifier(self, num_classes: int) -> None:
        """The norm before the classifier comes and goes with it."""
        self.num_classes = num_classes
        if not num_classes:
            self.norm = nn.Identity()
        elif isinstance(self.norm, nn.Identity):
            self.norm = LayerNorm(self.num_features, eps=LAYER_NORM_EPS).to(self.pos_embed1)
        self.head = new_classifier(self.num_features, num_classes).to(self.pos_embed1)

    def dense_differences(self) -> tuple[str, ...]:
        return ("norm", "head")

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        prefixes: list[tuple[str, ...]] = [("patch_embed1", "pos_embed1")]
        for stage in range(1, NUM_STAGES + 1):
            for index in range(len(getattr(self, f"block{stage}"))):
                entry: tuple[str, ...] = ()
                if index == 0 and stage > 1:
                    entry = (f"patch_embed{stage}", f"pos_embed{stage}")
                if index == 0 and stage == NUM_STAGES:
                    entry = (*entry, "cls_token")
                prefixes.append((*entry, f"block{stage}.{index}"))
        return prefixes

    def position_tables(self) -> dict[str, tuple[int, Size, str]]:
        return {
            f"pos_embed{stage + 1}": (special, grid, "bilinear")
            for stage, (special, grid) in enumerate(zip(self.num_special, self.grids, strict=True))
        }


@register("pvt")
class PVT(PyramidTransformer):
    """Four stages of blocks with spatial-reduction attention; the class token of the last is classified.

    `token_maps`: of the last block of each stage `attention` (B, heads, ceil(H/R), ceil(W/R)), what a cell of
    the reduced map gets from all tokens, on average; in the last stage the class token, which is left out,
    gets the rest.

    Args:
        sr_ratios: per stage, how many times the map of keys and values is smaller per side.
    """

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
    ):
        check_sr_ratios("PVT", sr_ratios)

        def make_block(stage: int, drop_path: float) -> nn.Module:
            dim = embed_dims[stage]
            attn = SpatialReductionAttention(
                dim, num_heads[stage], sr_ratios[stage], qkv_bias, drop_rate
            )
            return PyramidBlock(dim, attn, mlp_ratios[stage], drop_rate, drop_path)

        super().__init__(
            "PVT",
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

    def no_weight_decay(self) -> set[str]:
        """The class token; the published runs decay the position tables, and so do we."""
        return {"cls_token"}


def check_sr_ratios(node: str, sr_ratios: Sequence[int]) -> None:
    """ValueError unless the stage of the class token has ratio 1: that token is not part of a map."""
    if sr_ratios[-1] != 1:
        raise ValueError(
            f"MODEL.{node}.SR_RATIOS={list(sr_ratios)}: the last entry must be 1, because the "
            "class token of that stage is a key that no convolution over the map can reduce"
        )
