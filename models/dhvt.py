"""DHVT: a vision transformer with convolutional biases for small datasets.

Paper:      arXiv:2210.05958, Sec. 3 (SOPE, DAFF, HI-MHSA)
Reference:  github.com/ArieSeirack/DHVT
Deviations: any image size and number of channels; the release always synchronises the batch norms of the
            stem, and no others, over its processes: here TRAIN.SYNC_BN does, which the recipes set
Shapes:     B batch, H/W map of patches, C channels; x is the map (B, H, W, C), cls the class token (B, 1, C)

The class token lives apart from the map, so that only attention joins the two.
"""

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from .backbone import Backbone
from .layers.conv_stem import ConvStem
from .layers.daff import DAFF
from .layers.head_interaction import HIAttention
from .layers.init import LAYER_NORM_EPS, drop_path_rates, init_vit_, new_classifier
from .layers.layer_norm import LayerNorm
from .registry import register


class Block(nn.Module):
    """Pre-norm head-interacted attention and DAFF; one drop-path draw per branch for map and class token."""

    def __init__(self, dim: int, attn: HIAttention, mlp: DAFF, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, cls: Tensor) -> tuple[Tensor, Tensor]:
        y, y_cls = self.attn(self.norm1(x).flatten(1, 2), self.norm1(cls))
        x, cls = self._add(x, cls, y.view_as(x), y_cls)
        y = self.mlp(self.norm2(x))
        y_cls = None if self.mlp.compress is None else self.mlp.reweight(self.norm2(cls), y)
        return self._add(x, cls, y, y_cls)

    def mixing(self, x: Tensor, cls: Tensor) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The attention, and what it gets for map and class token."""
        return self.attn, (self.norm1(x), self.norm1(cls))

    def _add(
        self, x: Tensor, cls: Tensor, y: Tensor, y_cls: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.training and self.drop_path.drop_prob:
            keep = self.drop_path(y.new_ones(y.shape[0], 1, 1))
            y = y * keep[..., None]
            y_cls = None if y_cls is None else y_cls * keep
        return x + y, cls if y_cls is None else cls + y_cls


@register("dhvt", node="DHVT")
class DHVT(Backbone):
    """Isotropic transformer of arXiv:2210.05958; any image size of at least one patch.

    Without a classifier (num_classes=0) nothing reads the class token after the last attention, so the last
    block has no class gate (`mlp.compress`, `mlp.excitation`), and the pooled features are the mean of the
    map. `forward_head(..., pre_logits=True)` of a classifier gives its class token.

    `token_maps`: of the last block `attention` (B, heads, H, W) of the class token to the patches. It also
    attends to itself and to the head tokens, so that rows sum to less than 1.

    Args:
        img_size: no parameter depends on it.
        drop_rate: dropout after the attention's projection, the only place that the paper's code has.
        patch_size: 2, 4, 8 or 16, the stride of the only feature map.
    """

    synchronised = ("patch_embed",)

    def __init__(
        self,
        *,
        img_size: int | list[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_features = embed_dim
        self.feature_info = [dict(channels=embed_dim, stride=patch_size)]
        self.patch_embed = ConvStem(embed_dim, patch_size, in_chans)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                HIAttention(embed_dim, num_heads, qkv_bias, qk_scale, attn_drop_rate, drop_rate),
                DAFF(embed_dim, mlp_ratio, class_gate=num_classes > 0 or i < depth - 1),
                rate,
            )
            for i, rate in enumerate(drop_path_rates(drop_path_rate, [depth])[0])
        )
        self.watch(self.blocks[-1])
        self.norm = LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.apply(init_vit_)
        trunc_normal_(self.cls_token, std=0.02)
        self.head = new_classifier(embed_dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> normalised tokens (B, 1 + H*W, C), class token first; (B, H*W, C) for 0 classes."""
        x, cls = self._forward_blocks(x)
        x = x.flatten(1, 2)
        return self.norm(torch.cat([cls, x], dim=1) if self.num_classes else x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x[:, 0] if self.num_classes else x.mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        x, _ = self._forward_blocks(x)
        return [self.norm(x).permute(0, 3, 1, 2)]

    def get_classifier(self) -> nn.Module:
        return self.head

    def _reset_classifier(self, num_classes: int) -> None:
        like, mlp = self.norm.weight, self.blocks[-1].mlp
        if (num_classes > 0) != (self.num_classes > 0):
            mlp.set_class_gate(num_classes > 0)
            for layer in filter(None, (mlp.compress, mlp.excitation)):
                init_vit_(layer.to(like))
        self.num_classes = num_classes
        self.head = new_classifier(self.num_features, num_classes).to(like)

    def no_weight_decay(self) -> set[str]:
        # The head tokens' `attn.pos_embed` do decay, as in the published runs.
        return {"cls_token"}

    def dense_differences(self) -> tuple[str, ...]:
        last = f"blocks.{len(self.blocks) - 1}.mlp"
        return ("head", f"{last}.compress", f"{last}.excitation")

    def layer_prefixes(self) -> list[tuple[str, ...]]:
        return [("cls_token", "patch_embed"), *((f"blocks.{i}",) for i in range(len(self.blocks)))]

    def _forward_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> map (B, H, W, C) and class token (B, 1, C), not normalised."""
        x = self.run_block(self.patch_embed, x).permute(0, 2, 3, 1).contiguous()  # B H W C
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            x, cls = self.run_block(block, x, cls)
        return x, cls
