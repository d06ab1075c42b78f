"""Swin, Swin V2 and Swin-MLP: windows that shift between blocks, in a pyramid of four stages.

Papers:     Swin, arXiv:2103.14030, Sec. 3 and Table 7; Swin V2, arXiv:2111.09883, Sec. 3
Reference:  github.com/microsoft/Swin-Transformer @ f82860b, models/swin_{transformer,transformer_v2,mlp}.py
Deviations: any input size instead of multiples of the window (`layers/window.py`); a Swin V2 window
            of one token has bias 8 instead of 0/0. Without a classifier every stage has a norm of its
            own, as in the authors' detection backbone.
Shapes:     B batch, C channels, H/W map; maps are (B, H, W, C) from stem to head
"""

from collections.abc import Callable, Sequence

from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from .backbone import Backbone
from .layers.eager import channels_last
from .layers.init import init_vit_, new_classifier
from .layers.layer_norm import LayerNorm
from .layers.linear import Linear
from .layers.mlp import Mlp
from .layers.patch_embed import PatchEmbed
from .layers.stages import (
    AbsolutePositions,
    StagePlan,
    plan_stages,
    set_stage_norms,
    stage_prefixes,
)
from .layers.tokens import space_to_depth
from .layers.window import CosineWindowAttention, WindowAttention
from .layers.window_mlp import WindowMlp
from .registry import register


class PatchMerging(nn.Module):
    """Concatenate 2x2 neighbours, normalise, project: (B, H, W, C) -> (B, H/2, W/2, 2C), rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(space_to_depth(x)))


class PostNormPatchMerging(nn.Module):
    """`PatchMerging` that normalises after the projection (Swin V2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(space_to_depth(x)))


class WindowBlock(nn.Module):
    """Mixing within windows and MLP, each behind a norm (Swin, Eq. 3): (B, H, W, C) -> (B, H, W, C)."""

    # What the published state dict calls the layer that mixes.
    mixer_name: str

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.add_module(self.mixer_name, mixer)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio, drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        mixer, inputs = self.mixing(x)
        x = x + self.drop_path(mixer(*inputs))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mixing(self, x: Tensor) -> tuple[nn.Module, tuple[Tensor | None, ...]]:
        """The layer that mixes, and what it is given."""
        return self.get_submodule(self.mixer_name), (self.norm1(x),)


class SwinBlock(WindowBlock):
    """`WindowBlock` with attention."""

    mixer_name = "attn"

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__(dim, attn, mlp_ratio, drop, drop_path)
        self.register_buffer("attn_mask", attn.shift_mask())

    def constants(self) -> dict[str, Tensor | None]:
        """The buffers that follow from the arguments, made anew."""
        return {"attn_mask": self.attn.shift_mask()}

    def mixing(self, x: Tensor) -> tuple[nn.Module, tuple[Tensor | None, ...]]:
        return self.attn, (self.norm1(x), self.attn_mask)


class PostNormSwinBlock(SwinBlock):
    """`SwinBlock` that normalises what each branch adds (Swin V2, Sec. 3.2)."""

    def forward(self, x: Tensor) -> Tensor:
        attn, inputs = self.mixing(x)
        x = x + self.drop_path(self.norm1(attn(*inputs)))
        return x + self.drop_path(self.norm2(self.mlp(x)))

    def mixing(self, x: Tensor) -> tuple[nn.Module, tuple[Tensor | None, ...]]:
        return self.attn, (x, self.attn_mask)


class SwinMlpBlock(WindowBlock):
    """`WindowBlock` with one matrix per head in place of attention."""

    mixer_name = "spatial_mlp"


class SwinStage(nn.Module):
    """Blocks on one map size; `downsample` leads to the next stage (Identity after the last)."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinBackbone(AbsolutePositions, Backbone):
    """Stem, stages, norm and head, which the three architectures share.

    `forward_features` gives (B, H/32, W/32, C). `forward_pyramid` gives the output of each stage
    before merging: normalised by `norm0`, `norm1`, ... if built with `num_classes=0`, where these
    take the place of `norm`, and as it is otherwise.

    `token_maps`: of the last block of each stage `attention` (B, heads, H, W), what a position gets from
    those of its window, on average. Positions are those of the map: unshifted, and without padding.

    Args:
        make_block: (plan, index of the block in its stage) -> block.
        merging: class of the layer between stages, built from its width.
    """

    # Parts of names of parameters that take no weight decay.
    no_decay_keywords: tuple[str, ...] = ()

    def __init__(
        self,
        make_block: Callable[[StagePlan, int], nn.Module],
        merging: type[nn.Module],
        *,
        num_classes: int,
        in_chans: int,
        img_size: int | Sequence[int],
        drop_rate: float,
        drop_path_rate: float,
        patch_size: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        ape: bool,
        patch_norm: bool,
    ):
        super().__init__()
        grid, plans = plan_stages(
            img_size, patch_size, embed_dim, depths, num_heads, window_size, drop_path_rate
        )
        dims = [plan.dim for plan in plans]
        self.num_classes = num_classes
        self.num_features = dims[-1]
        self.feature_info = [
            dict(channels=dim, stride=patch_size * 2**i) for i, dim in enumerate(dims)
        ]
        self.patch_embed = PatchEmbed(
            in_chans, embed_dim, patch_size, norm_eps=1e-5 if patch_norm else None
        )
        self.make_positions(grid, embed_dim, ape)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            SwinStage(
                [make_block(plan, j) for j in range(len(plan.drop_paths))],
                merging(plan.dim) if plan is not plans[-1] else nn.Identity(),
            )
            for plan in plans
        )
        last_blocks = [stage.blocks[-1] for stage in self.layers]
        self.watch(*(block for block in last_blocks if isinstance(block, SwinBlock)))
        self.stage_norms = num_classes == 0
        set_stage_norms(self, dims, self.stage_norms)
        self.head = nn.Identity()
        self.apply(init_vit_)
        self.head = new_classifier(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised features (B, H/32, W/32, C)."""
        x = self._stem(x)
        for stage in self.layers:
            x = stage.downsample(self.run_blocks(stage.blocks, x))
        return self.final_norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        x = self._stem(x)
        maps = []
        for i, stage in enumerate(self.layers):
            x = self.run_blocks(stage.blocks, x)
            normalised = self.get_submodule(f"norm{i}")(x) if self.stage_norms else x
            maps.append(normalised.permute(0, 3, 1, 2))
            x = stage.downsample(x)
        return maps

    def map_layers(self, index: int) -> tuple[str, ...]:
        return (f"norm{index}",)

    def _stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H/4, W/4, C)."""
        x = self.patch_embed(channels_last(x)).permute(0, 2, 3, 1)
        return self.pos_drop(self.add_positions(x))

    @property
    def final_norm(self) -> nn.Module:
        """The norm of `forward_features`."""
        return self.get_submodule(f"norm{len(self.layers) - 1}" if self.stage_norms else "norm")

    def get_classifier(self) -> nn.Module:
        return self.head

    def _reset_classifier(self, num_classes: int) -> None:
        """0 classes make `norm` that of the last stage, another number brings it back."""
        self.num_classes = num_classes
        if self.stage_norms != (num_classes == 0):
            self.stage_norms = num_classes == 0
            dims = [info["channels"] for info in self.feature_info]
            set_stage_norms(self, dims, self.stage_norms)
        self.head = new_classifier(self.num_features, num_classes).to(self.patch_embed.proj.weight)

    def no_weight_decay(self) -> set[str]:
        return {
            name
            for name, _ in self.named_parameters()
            if name == "absolute_pos_embed" or any(key in name for key in self.no_decay_keywords)
        }

    def dense_differences(self) -> tuple[str, ...]:
        return ("norm", "head", *(f"norm{i}" for i in range(len(self.layers))))

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        return stage_prefixes(self.layers)


@register("swin", node="SWIN")
class Swin(SwinBackbone):
    """Swin Transformer (arXiv:2103.14030).

    Args:
        qk_scale: replaces head_dim ** -0.5.
        ape: adds a learned absolute position embedding, resized on maps of another size.
    """

    no_decay_keywords = ("relative_position_bias_table",)

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        ape: bool = False,
        patch_norm: bool = True,
    ):
        def make_block(plan: StagePlan, j: int) -> nn.Module:
            attn = WindowAttention(
                plan.dim,
                plan.num_heads,
                plan.grid,
                window_size,
                shift=window_size // 2 if j % 2 else 0,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                proj_drop=drop_rate,
            )
            return SwinBlock(plan.dim, attn, mlp_ratio, drop_rate, plan.drop_paths[j])

        super().__init__(
            make_block,
            PatchMerging,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            ape=ape,
            patch_norm=patch_norm,
        )


@register("swinv2", node="SWINV2")
class SwinV2(SwinBackbone):
    """Swin Transformer V2 (arXiv:2111.09883): cosine attention, norms after the branches.

    Args:
        ape: adds a learned absolute position embedding, resized on maps of another size.
        pretrained_window_sizes: per stage, the window that the weights to load were trained with;
            0 stands for the window at hand.
    """

    no_decay_keywords = ("cpb_mlp", "logit_scale")

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ape: bool = False,
        patch_norm: bool = True,
        pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
    ):
        if len(pretrained_window_sizes) != len(depths):
            raise ValueError(
                f"PRETRAINED_WINDOW_SIZES={list(pretrained_window_sizes)} needs one entry per stage, "
                f"as DEPTHS={list(depths)} has"
            )

        def make_block(plan: StagePlan, j: int) -> nn.Module:
            attn = CosineWindowAttention(
                plan.dim,
                plan.num_heads,
                plan.grid,
                window_size,
                shift=window_size // 2 if j % 2 else 0,
                qkv_bias=qkv_bias,
                pretrained_window=pretrained_window_sizes[plan.index],
                proj_drop=drop_rate,
            )
            return PostNormSwinBlock(plan.dim, attn, mlp_ratio, drop_rate, plan.drop_paths[j])

        super().__init__(
            make_block,
            PostNormPatchMerging,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            ape=ape,
            patch_norm=patch_norm,
        )
        for stage in self.layers:
            for block in stage.blocks:
                # Every block starts as the identity.
                nn.init.zeros_(block.norm1.weight)
                nn.init.zeros_(block.norm2.weight)


@register("swin_mlp", node="SWIN_MLP")
class SwinMlp(SwinBackbone):
    """Swin-MLP: one matrix over the tokens of a window per head takes the place of attention.

    The matrices keep their window at every input size, so small maps are padded up to it.

    `token_maps`: of the last block of each stage its matrices `filters` (heads, N, N), what each of the N
    positions of a window takes from each, row by row; they need no forward.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        ape: bool = False,
        patch_norm: bool = True,
    ):
        def make_block(plan: StagePlan, j: int) -> nn.Module:
            mixer = WindowMlp(plan.num_heads, plan.grid, window_size, shifted=bool(j % 2))
            return SwinMlpBlock(plan.dim, mixer, mlp_ratio, drop_rate, plan.drop_paths[j])

        super().__init__(
            make_block,
            PatchMerging,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            ape=ape,
            patch_norm=patch_norm,
        )
        for module in self.modules():
            if isinstance(module, WindowMlp):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def token_maps(self) -> dict[str, Tensor]:
        maps = {}
        for i, stage in enumerate(self.layers):
            mixer = stage.blocks[-1].spatial_mlp
            name = f"filters::layers.{i}.blocks.{len(stage.blocks) - 1}.spatial_mlp"
            maps[name] = mixer.weight.detach().unflatten(0, (mixer.groups, -1))[..., 0]
        return maps
