"""DFvT: a window-attention path at half resolution, fused in every block with a convolution path.

Paper:      Doubly-Fused ViT (DFvT), ECCV 2022, doi:10.1007/978-3-031-20050-2_43, Sec. 3
Reference:  DFvT @ d49f2f1, models/DFvT.py; its Object-Detection branch for `num_classes=0`
Deviations: any input size; `patch_norm=False` leaves out the norms of the stem (the reference fails);
            upsampled maps of odd levels are cropped (the reference pads H by what W lacks).
Shapes:     B batch, C channels, H/W map; convolutions see (B, C, H, W) laid out channels last,
            attention sees the same memory as (B, H, W, C)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .backbone import Backbone
from .layers.activations import SiLU
from .layers.batch_norm import BatchNorm2d
from .layers.depthwise import DepthwiseConv2d
from .layers.eager import channels_last, in_pieces_if_idle, may_keep
from .layers.init import init_vit_, new_classifier
from .layers.layer_norm import LayerNorm
from .layers.linear import Linear
from .layers.mlp import Mlp
from .layers.plain import is_plain
from .layers.precision import autocast_dtype
from .layers.stages import (
    AbsolutePositions,
    StagePlan,
    plan_stages,
    set_stage_norms,
    stage_prefixes,
)
from .layers.tokens import pad_to_multiple, space_to_depth
from .layers.window import WindowAttention
from .registry import register

# Channels per hidden unit of the gate's channel branch.
GATE_REDUCTION = 16


def pointwise(in_chans: int, out_chans: int) -> list[nn.Module]:
    """1x1 convolution and batch norm."""
    return [nn.Conv2d(in_chans, out_chans, 1, bias=False), BatchNorm2d(out_chans)]


def depthwise(channels: int, stride: int = 1) -> list[nn.Module]:
    """3x3 convolution per channel and batch norm."""
    return [DepthwiseConv2d(channels, 3, stride, bias=False), BatchNorm2d(channels)]


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2: (B, in_chans, H, W) -> (B, C, ceil(H/4), ceil(W/4))."""

    conv_norm_pairs = (("proj1", "norm1"), ("proj2", "norm"))

    def __init__(self, in_chans: int, embed_dim: int, patch_norm: bool):
        super().__init__()
        self.first_width = half = embed_dim // 2
        self.proj1 = nn.Conv2d(in_chans, half, 3, 2, 1)
        self.proj2 = nn.Conv2d(half, embed_dim, 3, 2, 1)
        # The first norm is `norm1` and the second one `norm`, as in the released weights.
        self.norm = BatchNorm2d(embed_dim) if patch_norm else nn.Identity()
        self.norm1 = BatchNorm2d(half) if patch_norm else nn.Identity()
        self.act = SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(pad_to_multiple(x, 4))
        values = self.first_width * x.shape[2] * x.shape[3] // 4
        return in_pieces_if_idle(self, self._layers, x, values)

    def _layers(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.proj1(x)))
        return self.act(self.norm(self.proj2(x)))


class ConvBlock(nn.Module):
    """Convolution path of a level: (B, C, H, W) -> map of that size, and one of 1 / stride."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        act = SiLU()
        self.conv1x1_1 = nn.Sequential(
            *pointwise(dim, dim), act, *depthwise(dim), act, *depthwise(dim), act
        )
        self.conv1 = nn.Sequential(*depthwise(dim, stride), act)
        self.conv1x1_2 = nn.Sequential(*pointwise(dim, dim), act)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.shape[1:].numel()
        x = in_pieces_if_idle(self, self.conv1x1_1, x, values)
        return x, in_pieces_if_idle(self, self._to_context, x, values)

    def _to_context(self, x: Tensor) -> Tensor:
        return self.conv1x1_2(self.conv1(x))


class Dane(nn.Module):
    """Gate that mixes the two paths per token and channel (DANE).

    The token's part of the gate comes from the convolution path, the channel's part from the mean of
    the attention path.
    """

    def __init__(self, dim: int):
        super().__init__()
        hidden = max(dim // GATE_REDUCTION, 1)
        self.fc_spatial = nn.Sequential(LayerNorm(dim), nn.Linear(dim, 1, bias=False))
        self.fc_channel = nn.Sequential(
            nn.Linear(dim, hidden, bias=False),
            nn.SiLU(),
            LayerNorm(hidden),
            nn.Linear(hidden, dim, bias=False),
        )
        self._parts: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, y: Tensor, y_hat: Tensor) -> Tensor:
        """Mix attention path x with convolution path y, all (B, H, W, C); y_hat is normalised y."""
        norm, score = self.fc_spatial
        if is_plain(norm, LayerNorm) and is_plain(score, nn.Linear):
            # The affine part of the norm folds into the score: one dot product per token.
            weight = norm.weight * score.weight
            spatial = F.linear(y_hat, weight, F.linear(norm.bias, score.weight))  # B H W 1
        else:
            spatial = self.fc_spatial(y)
        channel = self.fc_channel(x.mean((1, 2)))[:, None, None]  # B 1 1 C
        if not self.training and may_keep():
            self._parts = (spatial.detach(), channel.detach())
        return x.lerp(y, (spatial + channel).sigmoid().to(x.dtype))

    def gate(self) -> Tensor | None:
        """Mean weight of the convolution path in the last evaluation forward: (B, H, W)."""
        if self._parts is None:
            return None
        spatial, channel = self._parts
        return (spatial + channel).sigmoid().mean(-1)

    def train(self, mode: bool = True) -> "Dane":
        self._parts = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": None}  # a copy has had no forward pass


class DFvTBlock(nn.Module):
    """Window attention, gate and MLP: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self, dim: int, attn: WindowAttention, mlp_ratio: float, drop: float, drop_path: float
    ):
        super().__init__()
        self.select = Dane(dim)
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio, drop=drop)
        self.register_buffer("attn_mask", attn.shift_mask())

    def constants(self) -> dict[str, Tensor | None]:
        """The buffers that follow from the arguments, made anew."""
        return {"attn_mask": self.attn.shift_mask()}

    def forward(self, x: Tensor, y: Tensor, y_hat: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), self.attn_mask))
        x = self.select(x, y, y_hat)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def set_fixed_windows(self, fixed: bool) -> None:
        """Change how the map is cut into windows, see `Windowed`."""
        self.attn.set_fixed_windows(fixed)
        mask = self.attn.shift_mask()
        self.attn_mask = None if mask is None else mask.to(self.norm1.weight.device)


class Widen(nn.Module):
    """Twice the channels between levels, (B, H, W, C) -> (B, H, W, 2C); the map keeps its size."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.reduction = Linear(dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(x))


class AttentionLevel(nn.Module):
    """Blocks of a level; `downsample` leads to the next one (Identity after the last)."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


@register("dfvt", node="DFvT")
class DFvT(AbsolutePositions, Backbone):
    """Doubly-Fused ViT.

    `forward_features` gives (B, H/32, W/32, C). Attention works at strides 8, 16, 32, 32; the maps
    of `forward_pyramid` are its outputs, upsampled to strides 4, 8, 16, 32. Built with
    `num_classes=0`, it is the published detection backbone: levels have norms `norm0`, `norm1`, ...
    of their own, upsampled maps are fused with the convolution path by `conv1x1layers`, windows never
    shrink, and padding takes part in attention.

    Args:
        patch_size: 4, the stride of the stem.
        qk_scale: replaces head_dim ** -0.5.
        ape: adds a learned absolute position embedding, resized on maps of another size.
        patch_norm: batch norms in the stem.
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
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        ape: bool = False,
        patch_norm: bool = True,
    ):
        super().__init__()
        if patch_size != 4:
            raise ValueError(
                f"MODEL.DFvT.PATCH_SIZE={patch_size}: the stem of DFvT has stride 4; set it to 4"
            )
        if embed_dim % 2:
            raise ValueError(f"MODEL.DFvT.EMBED_DIM={embed_dim} must be even: the stem halves it")
        grid, plans = plan_stages(
            img_size, patch_size, embed_dim, depths, num_heads, window_size, drop_path_rate
        )
        dims = [plan.dim for plan in plans]
        last = len(plans) - 1
        self.num_classes = num_classes
        self.num_features = dims[-1]
        self.feature_info = [dict(channels=dim, stride=4 * 2**i) for i, dim in enumerate(dims)]
        self.dense = num_classes == 0

        self.patch_embed = ConvStem(in_chans, embed_dim, patch_norm)
        self.make_positions(grid, embed_dim, ape)
        self.pos_drop = nn.Dropout(drop_rate)

        def make_level(plan: StagePlan) -> AttentionLevel:
            # Levels but the last halve their map before attention: they work on the next one's grid.
            grid = plans[min(plan.index + 1, last)].grid
            blocks = []
            for j, drop_path in enumerate(plan.drop_paths):
                attn = WindowAttention(
                    plan.dim,
                    plan.num_heads,
                    grid,
                    window_size,
                    shift=window_size // 2 if j % 2 else 0,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    proj_drop=drop_rate,
                    fixed_windows=self.dense,
                )
                blocks.append(DFvTBlock(plan.dim, attn, mlp_ratio, drop_rate, drop_path))
            return AttentionLevel(blocks, nn.Identity() if plan.index == last else Widen(plan.dim))

        self.layers = nn.ModuleList(make_level(plan) for plan in plans)
        self.convlayers = nn.ModuleList(
            ConvBlock(dim, stride=1 if i == last else 2) for i, dim in enumerate(dims)
        )
        self.multiresolution_conv = nn.ModuleList(
            nn.Sequential(*depthwise(4 * dim), *pointwise(4 * dim, dim)) for dim in dims[:-1]
        )
        set_stage_norms(self, dims, self.dense)
        if self.dense:
            self.conv1x1layers = _fusions(dims)
        self.apply(_init_dfvt_)
        self.head = new_classifier(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised features (B, H/32, W/32, C)."""
        x = self._stem(x)
        for i in range(len(self.layers)):
            x, _ = self._level(i, x)
            x = self._next_level(i, x)
        return self.final_norm(x.permute(0, 2, 3, 1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        x = self._stem(x)
        maps = []
        for i in range(len(self.layers)):
            x, detail = self._level(i, x)
            maps.append(self._pyramid_map(i, x, detail))
            x = self._next_level(i, x)
        return maps

    def map_layers(self, index: int) -> tuple[str, ...]:
        return (f"norm{index}", f"conv1x1layers.{index}")

    def _stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H/4, W/4)."""
        x = self.run_block(self.patch_embed, x)
        x = self.add_positions(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.pos_drop(x)

    def _level(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input of level i (B, C, R, R) -> (B, H, W, C) of the blocks, (B, C, R, R) of the convs."""
        detail, context = self.run_block(self.convlayers[i], x)
        y = x
        if i < len(self.multiresolution_conv):
            x = F.max_pool2d(x, 3, 2, 1)
            mix = partial(self._to_detail, i)
            y = in_pieces_if_idle(self, mix, detail, detail.shape[1:].numel())
        x = (x + context).permute(0, 2, 3, 1)
        y = y.permute(0, 2, 3, 1).to(x.dtype)
        # Shared by the gates of all blocks.
        y_hat = F.layer_norm(y, y.shape[-1:]).to(autocast_dtype(y))
        for block in self.layers[i].blocks:
            x = self.run_block(block, x, y, y_hat)
        return x, detail

    def _to_detail(self, i: int, detail: Tensor) -> Tensor:
        """What the gates of level i take of the convolution path: (B, C, R, R) -> (B, C, R/2, R/2)."""
        folded = space_to_depth(detail.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.run_block(self.multiresolution_conv[i], folded)

    def _next_level(self, i: int, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 2C, H, W), the input of level i + 1."""
        return self.layers[i].downsample(x).permute(0, 3, 1, 2)

    def _pyramid_map(self, i: int, x: Tensor, detail: Tensor) -> Tensor:
        """Output (B, H, W, C) of level i's blocks -> map (B, C, R, R)."""
        if self.dense:
            x = self.get_submodule(f"norm{i}")(x)
        x = x.permute(0, 3, 1, 2)
        if i == len(self.layers) - 1:
            return x
        height, width = detail.shape[2:]
        x = F.interpolate(x, scale_factor=2, mode="nearest")[:, :, :height, :width]
        return self.conv1x1layers[i](torch.cat([x, detail], dim=1)) if self.dense else x

    @property
    def final_norm(self) -> nn.Module:
        """The norm of `forward_features`."""
        return self.get_submodule(f"norm{len(self.layers) - 1}" if self.dense else "norm")

    def get_classifier(self) -> nn.Module:
        return self.head

    def _reset_classifier(self, num_classes: int) -> None:
        """0 classes make the detection backbone of it, and another number brings it back.

        The norm of the last stage keeps its weights, and bias tables are resized where the windows change.
        """
        like = self.patch_embed.proj1.weight
        if self.dense != (num_classes == 0):
            self.dense = num_classes == 0
            dims = [info["channels"] for info in self.feature_info]
            set_stage_norms(self, dims, self.dense)
            if self.dense:
                self.conv1x1layers = _fusions(dims).apply(_init_dfvt_).to(like)
            else:
                del self.conv1x1layers
            for level in self.layers:
                for block in level.blocks:
                    block.set_fixed_windows(self.dense)
        self.num_classes = num_classes
        self.head = new_classifier(self.num_features, num_classes).to(like)

    def no_weight_decay(self) -> set[str]:
        """Bias tables decay in classification, unlike in Swin; the detection recipe exempts them."""
        names = set() if self.absolute_pos_embed is None else {"absolute_pos_embed"}
        if self.dense:
            names |= {n for n, _ in self.named_parameters() if n.endswith("_bias_table")}
        return names

    def dense_differences(self) -> tuple[str, ...]:
        norms = [f"norm{i}" for i in range(len(self.layers))]
        return ("norm", "head", "conv1x1layers", *norms)

    def lr_multipliers(self) -> dict[str, float]:
        """The convolution branch learns twice as fast, in classification only."""
        return {} if self.dense else {"convlayers": 2.0, "multiresolution_conv": 2.0}

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        """As in Swin; the convolutions of a level have the depth of its first block."""
        prefixes = stage_prefixes(self.layers)
        depth = 1
        for i, level in enumerate(self.layers):
            prefixes[depth] += (f"convlayers.{i}", f"multiresolution_conv.{i}")
            depth += len(level.blocks)
        return prefixes

    def token_maps(self) -> dict[str, Tensor]:
        """Per level, how much of a token the last gate took from the convolutions: (B, H, W)."""
        gates = {f"gate{i}": level.blocks[-1].select.gate() for i, level in enumerate(self.layers)}
        return {name: gate for name, gate in gates.items() if gate is not None}


def _fusions(dims: Sequence[int]) -> nn.ModuleList:
    """Convolutions that join attention and convolution path to the maps of all levels but the last."""
    return nn.ModuleList(nn.Conv2d(2 * dim, dim, 1, bias=False) for dim in dims[:-1])


def _init_dfvt_(module: nn.Module) -> None:
    """ViT's initialisation; convolutions N(0, 2 / fan_out), fan_out not divided by the groups."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        init_vit_(module)
