"""DilateFormer: dilated local attention in the two shallow stages, global attention in the two deep ones.

Paper:      arXiv:2302.01791, Sec. 3.1 and 3.2 (attention), Sec. 3.3 (network, position encoding)
Reference:  the DilateFormer release
Deviations: trains in float32 (the release writes into a tensor that its backward pass needs) and takes
            any input size (the release asserts one, though no parameter depends on it). The released
            dilateformer_small has 24.06 M parameters where the paper says 21 M; we follow the release.
            Two of its merging ways crash and are not offered.
Shapes:     B batch, C channels, H/W feature height/width; blocks work on (B, H, W, C)
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from utils.spelling import choose

from .backbone import Backbone
from .layers.activations import GELU
from .layers.attention import MapAttention
from .layers.batch_norm import BatchNorm2d
from .layers.depthwise import DepthwiseConv2d
from .layers.dilated import DilatedAttention
from .layers.eager import channels_last, in_pieces_if_idle
from .layers.init import LAYER_NORM_EPS, drop_path_rates, init_vit_, new_classifier
from .layers.layer_norm import LayerNorm
from .layers.mlp import Mlp
from .layers.tokens import pad_to_multiple
from .registry import register

# Kernel size, stride and padding of the four convolutions of a stem.
STEMS = {
    "overlapping": ((3, 1, 1), (3, 2, 1), (3, 1, 1), (3, 2, 1)),
    "pointconv": ((3, 2, 1), (1, 1, 0), (3, 2, 1), (1, 1, 0)),
}
PATCH_WAYS = STEMS | {"nonoverlapping": ()}  # one convolution without a norm
MERGINGS = {"conv3_2": (3, 2, 1), "conv2_2": (2, 2, 0)}


class ConvStem(nn.Module):
    """Four convolutions, batch norm and GELU between them, to a quarter of the size.

    Shapes: (B, in_chans, H, W) -> (B, embed_dim, ceil(H/4), ceil(W/4)).
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_way: str):
        super().__init__()
        self.overlaps = patch_way != "nonoverlapping"
        if not self.overlaps:
            self.proj: nn.Module = nn.Conv2d(in_chans, embed_dim, 4, stride=4)
            return
        layers: list[nn.Module] = []
        widths = (in_chans, 16, 32, 64, embed_dim)
        self.first = (widths[1], STEMS[patch_way][0][1] ** 2)  # width, pixels per position
        for i, (kernel, stride, padding) in enumerate(STEMS[patch_way]):
            layers.append(nn.Conv2d(*widths[i : i + 2], kernel, stride, padding, bias=False))
            if i < 3:
                layers += [BatchNorm2d(widths[i + 1]), GELU()]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        # Channels last from the first convolution on: the blocks then take the map as it is.
        x = channels_last(x)
        if not self.overlaps:
            return self.proj(pad_to_multiple(x, 4))
        width, area = self.first
        values = width * x.shape[2] * x.shape[3] // area
        return in_pieces_if_idle(self, self.proj, x, values)


class PatchMerging(nn.Module):
    """Strided convolution and batch norm: (B, C, H, W) -> (B, 2C, ceil(H/2), ceil(W/2))."""

    def __init__(self, dim: int, merging_way: str):
        super().__init__()
        kernel, stride, padding = MERGINGS[merging_way]
        self.overlaps = padding > 0
        self.proj = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, kernel, stride, padding), BatchNorm2d(2 * dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x if self.overlaps else pad_to_multiple(x, 2))


class Block(nn.Module):
    """Position encoding by a depth-wise convolution, attention, MLP (Sec. 3.3).

    Shapes: (B, H, W, C) -> (B, H, W, C), contiguous: the convolution sees a channels-last view.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.pos_embed = DepthwiseConv2d(dim, 3)
        self.norm1 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_ratio, drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self._with_positions(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mixing(self, x: Tensor) -> tuple[nn.Module, tuple[Tensor]]:
        """The attention, and what it gets for a map (B, H, W, C)."""
        return self.attn, (self.norm1(self._with_positions(x)),)

    def _with_positions(self, x: Tensor) -> Tensor:
        return x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Blocks of one resolution, and the merging that follows them; keys as published."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


@register("dilateformer", node="DILATEFORMER")
class DilateFormer(Backbone):
    """Four stages of widths embed_dim * (1, 2, 4, 8) at strides 4, 8, 16 and 32.

    `token_maps`: of the last block of each stage `attention`. In the first two stages it is (B, heads, k * k,
    H, W), from each position to its neighbours, row by row; heads come in groups of one dilation, and
    neighbours outside the image count. In the others it is (B, heads, H, W), what a position gets from all,
    on average.

    Args:
        img_size: not used, no parameter depends on it.
        drop_rate: dropout of the MLPs; the published network has no other.
        kernel_size: side of the dilated windows, odd.
        dilation: of the head groups; its length divides num_heads of the first two stages.
        patch_way: stem, one of `PATCH_WAYS` (the release's "overlaping", "nonoverlaping" too).
        merging_way: between stages, one of `MERGINGS`.
        aux_head: for token labels (LV-ViT, arXiv:2104.10858): a second classifier, for each position of the
            last map. Training gives both logits; evaluation adds half of the largest score that a position
            gives a class, as the LV-ViT release does. Published weights have no such head.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        embed_dim: int = 72,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        kernel_size: int = 3,
        dilation: Sequence[int] = (1, 2, 3),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_way: str = "overlapping",
        merging_way: str = "conv3_2",
        aux_head: bool = False,
    ):
        super().__init__()
        patch_way = patch_way.replace("overlaping", "overlapping")
        choose("MODEL.DILATEFORMER.PATCH_WAY", patch_way, PATCH_WAYS)
        choose("MODEL.DILATEFORMER.MERGING_WAY", merging_way, MERGINGS)
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(
                f"MODEL.DILATEFORMER.DEPTHS={list(depths)} and NUM_HEADS={list(num_heads)} must have "
                "four entries, one per stage"
            )
        dims = [embed_dim * 2**i for i in range(4)]
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.feature_info = [dict(channels=dim, stride=4 * 2**i) for i, dim in enumerate(dims)]
        self.has_aux_head = aux_head
        if aux_head:
            self.training_outputs = ("logits", "tokens")
        rates = drop_path_rates(drop_path_rate, list(depths))

        def attention(stage: int) -> nn.Module:
            dim, heads = dims[stage], num_heads[stage]
            if stage < 2:
                return DilatedAttention(dim, heads, kernel_size, dilation, qkv_bias)
            return MapAttention(dim, heads, qkv_bias)

        self.patch_embed = ConvStem(in_chans, embed_dim, patch_way)
        self.stages = nn.ModuleList(
            Stage(
                [Block(dims[i], attention(i), mlp_ratio, drop_rate, rate) for rate in rates[i]],
                PatchMerging(dims[i], merging_way) if i < 3 else nn.Identity(),
            )
            for i in range(4)
        )
        self.watch(*(stage.blocks[-1] for stage in self.stages))
        self.norm = LayerNorm(dims[-1], eps=LAYER_NORM_EPS)
        self.apply(init_vit_)
        self._reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, ceil(H/32) * ceil(W/32), 8C)."""
        return self._stage_outputs(x)[-1].flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Tokens (B, N, C) -> logits (B, num_classes), or features (B, C).

        With an auxiliary head, training gives its logits (B, N, num_classes) too.
        """
        features = x.mean(1)
        if pre_logits or not self.num_classes:
            return features
        logits = self.head(features)
        if not self.has_aux_head:
            return logits
        tokens = self.aux_head(x)
        return (logits, tokens) if self.training else logits + tokens.amax(1) / 2

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Images -> the four stages' maps; the last one has been through `norm`, as the classifier
        sees it, so that the published state dict loads in full and no parameter is without gradient.
        """
        return [y.permute(0, 3, 1, 2) for y in self._stage_outputs(x)]

    def _stage_outputs(self, x: Tensor) -> list[Tensor]:
        """The residual stream (B, H, W, C) at the end of each stage, the last one normalised."""
        outputs = []
        x = self.run_block(self.patch_embed, x)  # its maps are the largest
        for i, stage in enumerate(self.stages):
            x = x.permute(0, 2, 3, 1).contiguous()  # B H W C
            x = self.run_blocks(stage.blocks, x)
            outputs.append(x if i < 3 else self.norm(x))
            x = stage.downsample(x.permute(0, 3, 1, 2))
        return outputs

    def get_classifier(self) -> nn.Module:
        """The Linear of the mean; a ModuleList with that of the positions too, if there is one."""
        if self.has_aux_head and self.num_classes:
            return nn.ModuleList([self.head, self.aux_head])
        return self.head

    def _reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        like = self.norm.weight
        self.head = new_classifier(self.num_features, num_classes).to(like)
        if self.has_aux_head:
            self.aux_head = new_classifier(self.num_features, num_classes).to(like)

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        prefixes: list[tuple[str, ...]] = [("patch_embed",)]
        for i, stage in enumerate(self.stages):
            # A merging belongs to the first block of the stage that it leads to.
            merging = [f"stages.{i - 1}.downsample"] if i else []
            for j in range(len(stage.blocks)):
                prefixes.append((*merging, f"stages.{i}.blocks.{j}"))
                merging = []
        return prefixes
