"""UPerNet: pooled context on the last map, a feature pyramid from there, and all of its levels fused.

Paper:      arXiv:1807.10221, Sec. 3.1 and Fig. 4 (scene parsing); the pooling is PSPNet's, arXiv:1612.01105
Deviations: widths, dropout, and the auxiliary head are those of the models on ADE20K of Swin and DilateFormer
            (mmsegmentation's UPerHead and FCNHead)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.layers.resize import pooled

from .fcn import FCNHead
from .pixels import PixelHead, conv_norm_act, pixel_loss, resized
from .registry import register_head


class PyramidPooling(nn.Module):
    """Means over 1x1, 2x2 ... cells of a map, beside the map itself: (B, C, h, w) -> (B, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.branches = nn.ModuleList(conv_norm_act(in_channels, channels, 1) for _ in self.scales)
        self.fuse = conv_norm_act(in_channels + len(self.scales) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        parts = [x]
        for scale, branch in zip(self.scales, self.branches, strict=True):
            norm = branch[1]
            if scale * len(x) == 1 and isinstance(norm, nn.BatchNorm2d) and norm.training:
                raise ValueError(
                    "UPerNet pools the last map to one value per channel, whose batch norm needs more than "
                    "one image: set DATA.BATCH_SIZE to 2 or more, or TRAIN.SYNC_BN True with several GPUs"
                )
            parts.append(resized(branch(pooled(x, scale)), size))
        return self.fuse(torch.cat(parts, dim=1))


@register_head("upernet", task="segmentation")
class UPerNet(PixelHead):
    """Logits have the size of the first map.

    Args:
        features: channels and stride of each map.
        channels: of all levels.
        pool_scales: cells per side that the last map is pooled to.
        aux_stage: map that an FCN head learns the same labels from while training, counted from 1.
        aux_channels: of that head.
        aux_weight: factor on its loss; 0 leaves it out.

    Attributes:
        min_batch: images that a training step needs, for a batch norm to have more than one value.
    """

    def __init__(
        self,
        features: list[dict[str, int]],
        num_classes: int,
        *,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        aux_stage: int = 3,
        aux_channels: int = 256,
        aux_weight: float = 0.4,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        if aux_weight < 0:
            raise ValueError(f"aux_weight={aux_weight} must be at least 0")
        if aux_weight and not 1 <= aux_stage <= len(features):
            raise ValueError(f"aux_stage={aux_stage} must be from 1 to {len(features)}")
        *lower, last = [info["channels"] for info in features]
        self.laterals = nn.ModuleList(conv_norm_act(width, channels, 1) for width in lower)
        self.pooling = PyramidPooling(last, channels, pool_scales)
        self.outputs = nn.ModuleList(conv_norm_act(channels, channels) for _ in lower)
        self.fuse = conv_norm_act(len(features) * channels, channels)
        self.min_batch = 2 if 1 in self.pooling.scales else 1
        self.aux_stage, self.aux_weight = aux_stage, aux_weight
        self.auxiliary = None
        if aux_weight:
            self.auxiliary = FCNHead(
                features[:aux_stage], num_classes, channels=aux_channels, dropout=dropout
            )

    def losses(self, maps: list[Tensor], masks: Tensor) -> dict[str, Tensor]:
        losses = super().losses(maps, masks)
        if self.auxiliary is not None:
            logits = self.auxiliary.logits(maps[: self.aux_stage])
            losses["aux"] = self.aux_weight * pixel_loss(logits, masks)
        return losses

    def features(self, maps: list[Tensor]) -> Tensor:
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps[:-1], strict=True)]
        levels.append(self.pooling(maps[-1]))
        for index in reversed(range(len(levels) - 1)):
            levels[index] = levels[index] + resized(levels[index + 1], levels[index].shape[-2:])
        outputs = [output(x) for output, x in zip(self.outputs, levels[:-1], strict=True)]
        size = levels[0].shape[-2:]
        return self.fuse(torch.cat([resized(x, size) for x in [*outputs, levels[-1]]], dim=1))
