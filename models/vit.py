"""DeiT: the plain vision transformer, with or without distillation token.

Paper:      arXiv:2012.12877, Sec. 4 (distillation token), Table 1 (variants); network: arXiv:2010.11929
Reference:  the DeiT release, and the DeiT-256 baselines of Dynamic Grained Encoder (NeurIPS 2021)
Deviations: any input size. The release asserts its training size; here the positions are resized
            bicubically to the grid at hand, and sides that are no multiple of the patch are padded
            with zeros at the right and the bottom.
Shapes:     B batch, C channels, H/W image, h/w patch grid, N tokens with the special ones first
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from .backbone import Backbone
from .layers.attention import Attention
from .layers.init import LAYER_NORM_EPS, drop_path_rates, init_vit_, new_classifier
from .layers.layer_norm import LayerNorm
from .layers.mlp import Mlp
from .layers.patch_embed import PatchEmbed
from .layers.resize import resize_position_grid
from .layers.tokens import to_map, to_pair, to_tokens
from .registry import register


class Block(nn.Module):
    """Pre-norm transformer block (arXiv:2010.11929, Eq. 2 and 3).

    Shapes: (B, N, C) -> (B, N, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, proj_drop=drop)
        self.norm2 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, mlp_ratio, drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mixing(self, x: Tensor, size: tuple[int, int]) -> tuple[nn.Module, tuple]:
        """The attention, and what it gets for tokens (B, N, C) of a map of `size`."""
        return self.attn, (self.norm1(x), size)


@register("deit", node="DEIT")
class VisionTransformer(Backbone):
    """Patch tokens and special tokens through equal blocks; the special tokens are classified.

    `token_maps`: of the last block `attention` (B, heads, h, w) of the class token to the patches, without
    class token the mean over all patches.

    Args:
        img_size: size that `pos_embed` is stored for; other sizes are accepted.
        qk_scale: replaces the factor head_dim ** -0.5 on the attention logits.
        class_token: without it the mean of the patch tokens is classified.
        distilled: a second special token with a classifier of its own, taught by another network.
    """

    block_type: ClassVar[type[Block]] = Block

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        class_token: bool = True,
        distilled: bool = False,
    ):
        super().__init__()
        if distilled and not class_token:
            raise ValueError(
                "MODEL.DEIT.DISTILLED=True needs MODEL.DEIT.CLASS_TOKEN=True: the prediction is the "
                "mean of both tokens' classifiers"
            )
        self.num_classes, self.num_features = num_classes, embed_dim
        self.feature_info = [dict(channels=embed_dim, stride=patch_size)]
        height, width = to_pair(img_size)
        self.grid = (-(-height // patch_size), -(-width // patch_size))
        self.num_special = int(class_token) + int(distilled)
        self.distilled = distilled
        if distilled:
            self.training_outputs = ("logits", "distilled")

        def table(tokens: int) -> nn.Parameter:
            return nn.Parameter(trunc_normal_(torch.empty(1, tokens, embed_dim), std=0.02))

        if class_token:
            self.cls_token = table(1)
        if distilled:
            self.dist_token = table(1)
        self.pos_embed = table(self.num_special + self.grid[0] * self.grid[1])
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            self.block_type(
                embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, drop_rate, drop_path
            )
            for drop_path in drop_path_rates(drop_path_rate, [depth])[0]
        )
        self.norm = LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.apply(init_vit_)
        self._reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, N, C), special ones first."""
        grid = self.grid_of(x)
        *blocks, last = self.blocks
        x = self.run_blocks(blocks, self.embed(x))
        self.remember(last, x, grid)
        return self.norm(self.run_block(last, x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Tokens (B, N, C) -> logits (B, num_classes), or features (B, C) of the special tokens.

        A distilled model in training mode gives two logits, those of the class token and those of
        the distillation token, because they have different targets; else their mean.
        """
        if not self.num_special:
            x = x.mean(1)
            return x if pre_logits else self.head(x)
        if pre_logits:
            return x[:, : self.num_special].mean(1)
        if not self.distilled:
            return self.head(x[:, 0])
        logits = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return logits if self.training else (logits[0] + logits[1]) / 2

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """Images -> the normalised patch tokens as one map (B, C, ceil(H/p), ceil(W/p)).

        Special tokens take part in the attention, so that no parameter is without a gradient.
        """
        return [to_map(self.forward_features(x)[:, self.num_special :], self.grid_of(x))]

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> tokens with positions (B, N, C), special ones first."""
        grid = self.grid_of(x)
        x = to_tokens(self.patch_embed(x))
        # Resized anew in each forward: about 1 % of one image's time, never older than the weights.
        positions = resize_position_grid(self.pos_embed, self.num_special, self.grid, grid)
        names = ("cls_token", "dist_token")[: self.num_special]
        special = [getattr(self, name).expand(x.shape[0], -1, -1) for name in names]
        return self.pos_drop(torch.cat([*special, x], dim=1) + positions)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patches along H and W of images (B, in_chans, H, W)."""
        size = self.patch_embed.patch_size
        return -(-images.shape[2] // size), -(-images.shape[3] // size)

    def get_classifier(self) -> nn.Module:
        """The Linear of the class token; a ModuleList with that of both tokens when distilled."""
        if self.distilled and self.num_classes:
            return nn.ModuleList([self.head, self.head_dist])
        return self.head

    def _reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        like = self.norm.weight
        self.head = new_classifier(self.num_features, num_classes).to(like)
        if self.distilled:
            self.head_dist = new_classifier(self.num_features, num_classes).to(like)

    def no_weight_decay(self) -> set[str]:
        """Positions and class token. The published runs decay `dist_token`, and so do we."""
        return {name for name in ("pos_embed", "cls_token") if hasattr(self, name)}

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        stem = ("patch_embed", "pos_embed", "cls_token", "dist_token")
        return [stem, *((f"blocks.{i}",) for i in range(len(self.blocks)))]

    def position_tables(self) -> dict[str, tuple[int, tuple[int, int], str]]:
        """Tables that follow the input size: name -> (special tokens, grid, interpolation)."""
        return {"pos_embed": (self.num_special, self.grid, "bicubic")}
