"""What looks at single boxes: features pooled from a pyramid, and heads for classes, corners and masks.

Papers:     arXiv:1612.03144, Sec. 4.2 (levels and box heads), arXiv:1703.06870, Sec. 3 (RoIAlign, masks)
Reference:  mmdet 2, SingleRoIExtractor, Shared2FCBBoxHead, FCNMaskHead
Deviations: RoIAlign moved by half a pixel ("aligned") and mask targets rounded, as in the reference, unlike
            torchvision's `RoIHeads`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align


class BoxHead(nn.Module):
    """Two shared layers, then classes (the last one background) and box deltas of pooled features."""

    def __init__(
        self, channels: int, size: int, fc_dim: int, num_classes: int, class_agnostic: bool
    ) -> None:
        super().__init__()
        self.shared = TwoMLPHead(channels * size**2, fc_dim)
        self.cls = nn.Linear(fc_dim, num_classes + 1)
        self.box = nn.Linear(fc_dim, 4 if class_agnostic else 4 * num_classes)
        for layer in (self.shared.fc6, self.shared.fc7):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.001)
        for layer in (self.shared.fc6, self.shared.fc7, self.cls, self.box):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C, size, size) -> logits (n, K + 1) and deltas (n, K or 1, 4), float32."""
        x = self.shared(x)
        return self.cls(x).float(), self.box(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Sequential):
    """Four convolutions, twice the resolution, and one mask per class: (n, C, s, s) -> (n, K, 2s, 2s)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            MaskRCNNHeads(channels, [channels] * 4, dilation=1),
            MaskRCNNPredictor(channels, channels, num_classes),
        )


def pool(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Sequence[Tensor],
    size: int,
    sampling: int = 0,
) -> Tensor:
    """RoIAlign of boxes (n_i, 4) per image, each from one level (B, C, h, w) -> (sum of n_i, C, size, size).

    A box of 14 strides (56 pixels at stride 4) or less reads the finest level, one twice as large the next
    (arXiv:1612.03144, Eq. 1: 224 pixels at stride 16).
    """
    index = [torch.full((len(b), 1), i, device=b.device) for i, b in enumerate(boxes)]
    rois = torch.cat((torch.cat(index), torch.cat(list(boxes)).float()), dim=1)  # (n, 5)
    side = (rois[:, 3:] - rois[:, 1:3]).prod(dim=1).sqrt()
    level = (side / (14 * strides[0]) + 1e-6).log2().floor().clamp(0, len(levels) - 1)
    pooled = levels[0].new_zeros(len(rois), levels[0].shape[1], size, size)
    for i, (x, stride) in enumerate(zip(levels, strides, strict=True)):
        (chosen,) = torch.where(level == i)
        found = roi_align(x.float(), rois[chosen], size, 1 / stride, sampling, aligned=True)
        pooled.index_copy_(0, chosen, found.to(pooled.dtype))
    return pooled


def mask_targets(masks: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Masks (m, H, W) bool, number `index` (n,) cut out by boxes (n, 4) -> (n, size, size) of 0.0 and 1.0."""
    rois = torch.cat((index[:, None].to(boxes), boxes), dim=1)
    found = roi_align(masks[:, None].to(boxes), rois, size, aligned=True)
    return (found[:, 0] >= 0.5).float()
