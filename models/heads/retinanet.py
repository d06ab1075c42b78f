"""RetinaNet: one stage, dense anchors, and a loss that does not drown in easy background.

Paper:      arXiv:1708.02002, Secs. 3 and 4
Reference:  mmdet 2, configs/_base_/models/retinanet_r50_fpn.py, which the published recipes of the lines of
            work started from: L1 instead of smooth L1, losses over all positive anchors of the batch
Deviations: from torchvision's `RetinaNet`, whose losses are the mean over images of each image's own, whose
            heads have four convolutions always, and which reads anchors in the padding too; see
            `boxes.py` for anchors and matching.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from .boxes import (
    IGNORED,
    best_candidates,
    check_overlaps,
    count_nan,
    encode,
    flatten_level,
    image_sizes,
    map_shapes,
    match,
)
from .detector import DetectionHead
from .registry import register_head


@register_head("retinanet", task="detection")
class RetinaNetHead(DetectionHead):
    """Feature pyramid, and two towers of convolutions that all levels share.

    Papers count all of it but the choice of boxes.

    Args:
        features, num_classes, num_maps, fpn_channels, extra_levels, shared: as in `DetectionHead`.
        num_convs: length of each tower.
        norm: "none", or "group" for group norms in the towers, which training from scratch needs
            (arXiv:1811.08883).
        anchor_scale: side of the smallest anchors, in strides (mmdet: octave base scale).
        scales_per_octave: anchor sizes per level, 2^(1 / scales_per_octave) apart.
        positive_iou, negative_iou: as in `boxes.match`.
        focal_alpha, focal_gamma: weight of the positive examples, and how little easy ones count.
        box_weight: weight of the L1 loss.
        prior: probability that every class starts with at every anchor.
        candidates_per_level: boxes that a level proposes before suppression.
    """

    def __init__(
        self,
        features: list[dict[str, int]],
        num_classes: int,
        *,
        num_maps: int = 3,
        fpn_channels: int = 256,
        extra_levels: str = "convs",
        num_convs: int = 4,
        norm: str = "none",
        anchor_scale: float = 4.0,
        scales_per_octave: int = 3,
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_weight: float = 1.0,
        prior: float = 0.01,
        candidates_per_level: int = 1000,
        **shared: Any,
    ) -> None:
        super().__init__(
            features,
            num_classes,
            num_maps=num_maps,
            fpn_channels=fpn_channels,
            extra_levels=extra_levels,
            **shared,
        )
        scales = [anchor_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        self.anchors = self.anchor_grid(scales)
        num_anchors = self.anchors.num_anchors
        self.cls_tower = _tower(fpn_channels, num_convs, norm)
        self.box_tower = _tower(fpn_channels, num_convs, norm)
        self.cls_output = nn.Conv2d(fpn_channels, num_anchors * num_classes, 3, padding=1)
        self.box_output = nn.Conv2d(fpn_channels, num_anchors * 4, 3, padding=1)
        for part in (self.cls_tower, self.box_tower, self.cls_output, self.box_output):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, std=0.01)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_output.bias, -math.log((1 - prior) / prior))
        check_overlaps(negative_iou, positive_iou)
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.box_weight = box_weight
        self.candidates_per_level = candidates_per_level

    def forward(
        self, maps: list[Tensor], images: Tensor, targets: list[dict[str, Any]] | None = None
    ) -> Any:
        """Maps of `features`, images (B, C, H, W) -> losses "cls" and "box", or detections in evaluation.

        Detections: per image boxes (n, 4) in pixels of `images`, clipped to its `size`, scores (n,) and
        labels (n,), 0 ... K-1, the highest score first; bad, the number of outputs that are nan.
        """
        levels = self.levels(maps)
        logits, deltas = [], []
        for x in levels:
            logits.append(flatten_level(self.cls_output(self.cls_tower(x)), self.num_classes))
            deltas.append(flatten_level(self.box_output(self.box_tower(x)), 4))
        if self._counting:
            return logits, deltas
        anchors = self.anchors(levels)
        sizes = image_sizes(images, targets)
        if not self.training:
            return self._detect(logits, deltas, anchors, sizes, map_shapes(levels))
        labels, wanted = self._assign(torch.cat(anchors), targets, sizes)
        with torch.autocast(images.device.type, enabled=False):
            return self._losses(torch.cat(logits, dim=1), torch.cat(deltas, dim=1), labels, wanted)

    @torch.compiler.disable
    @torch.no_grad()
    def _assign(
        self, anchors: Tensor, targets: list[dict[str, Any]], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """What anchors (A, 4) are to say of each image: labels (B, A), as in `match`; deltas (B, A, 4)."""
        labels, deltas = [], []
        for target, size in zip(targets, sizes, strict=True):
            boxes = target["boxes"]
            matched = match(
                boxes,
                anchors,
                positive=self.positive_iou,
                negative=self.negative_iou,
                low_quality=0.0,
                valid=self.anchors.is_valid(anchors, size),
            )
            found = matched >= 0
            label, wanted = matched, anchors
            if len(boxes):
                index = matched.clamp(min=0)
                label = torch.where(found, target["labels"][index], matched)
                wanted = torch.where(found[:, None], boxes[index].float(), anchors)
            labels.append(label)
            deltas.append(encode(wanted, anchors, (1.0,) * 4))
        return torch.stack(labels), torch.stack(deltas)

    def _losses(
        self, logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor
    ) -> dict[str, Tensor]:
        """Losses over the positive anchors of the whole batch; an image without any counts as one of them.

        Args:
            logits: (B, A, K).
            deltas: (B, A, 4).
            labels, wanted: as of `_assign`.
        """
        positive = labels >= 0
        count = positive.sum(dim=1).clamp(min=1).sum()
        # Background becomes column K, which is cut off.
        column = torch.where(positive, labels, self.num_classes)
        truth = F.pad(torch.zeros_like(logits), (0, 1)).scatter_(2, column[..., None], 1.0)
        focal = sigmoid_focal_loss(
            logits, truth[..., : self.num_classes], self.focal_alpha, self.focal_gamma
        )
        l1 = (deltas - wanted).abs()
        return {
            "cls": (focal * (labels != IGNORED)[..., None]).sum() / count,
            "box": self.box_weight * (l1 * positive[..., None]).sum() / count,
        }

    @torch.compiler.disable
    def _detect(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        sizes: list[tuple[int, int]],
        shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Outputs (B, A_l, K) and (B, A_l, 4) per level of `shapes` (h, w) -> detections of each image."""
        detections = []
        for i, size in enumerate(sizes):
            boxes, scores, labels, _ = best_candidates(
                [level[i] for level in logits],
                [level[i] for level in deltas],
                anchors,
                self.anchors.valid_parts(shapes, size),
                size,
                limit=self.candidates_per_level,
                threshold=self.score_threshold,
            )
            kept, scores = self.suppress(boxes, scores, labels)
            bad = count_nan(level[i] for level in (*logits, *deltas))
            found = dict(boxes=boxes[kept], scores=scores, labels=labels[kept], bad=bad)
            detections.append(found)
        return detections


def _tower(channels: int, num_convs: int, norm: str) -> nn.Sequential:
    """3x3 convolutions with ReLU, and group norms if wanted."""
    if norm not in ("none", "group"):
        raise ValueError(f"MODEL.HEAD.RETINANET.NORM={norm!r} must be one of ['none', 'group']")
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=norm == "none"))
        if norm == "group":
            # 32 groups of 8 channels at the usual width; fewer groups, not narrower ones, in a small tower.
            layers.append(nn.GroupNorm(math.gcd(32, max(1, channels // 8)), channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
