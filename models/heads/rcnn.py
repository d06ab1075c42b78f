"""Faster and Mask R-CNN: proposals, then a closer look at each.

Papers:     arXiv:1506.01497 (Faster R-CNN), arXiv:1612.03144 (with a feature pyramid), arXiv:1703.06870
            (Mask R-CNN)
Reference:  mmdet 2, configs/_base_/models/mask_rcnn_r50_fpn.py, which the published recipes started from
Deviations: from torchvision's `RoIHeads`: L1 instead of smooth L1 losses, and those of `proposals.py` and
            `roi.py`. As in mmdet the background is the last class, so labels are 0 ... K-1 everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import (
    clip,
    count_nan,
    decode,
    encode,
    has_area,
    image_sizes,
    map_shapes,
    match,
    sample,
)
from .detector import DetectionHead
from .proposals import ProposalNetwork
from .registry import register_head
from .roi import BoxHead, MaskHead, mask_targets, pool

# What detection papers count: so many proposals and detections, whatever the image holds.
COUNTED_PROPOSALS, COUNTED_DETECTIONS = 1000, 100


@dataclass(frozen=True)
class Stage:
    """One look at the proposals: what counts as found, how boxes are encoded, and what its losses count."""

    iou: float
    weights: tuple[float, float, float, float]
    loss_weight: float


@dataclass(frozen=True)
class Sampled:
    """Proposals of one image that a stage trains on.

    Attributes:
        boxes: (n, 4).
        index: (n,) the ground truth that each is to find, or BACKGROUND.
        is_truth: (n,) bool, ground truths that were added to the proposals.
    """

    boxes: Tensor
    index: Tensor
    is_truth: Tensor


class TwoStageHead(DetectionHead):
    """Feature pyramid, proposals, and one or more stages that look at them; subclasses say which.

    Papers count 1000 proposals and 100 masks per image, whatever is in it.

    Args:
        features, num_classes, num_maps, extra_levels, shared: as in `DetectionHead`.
        fpn_channels: width of pyramid, proposal network and mask heads.
        anchor_scale: side of the anchors, in strides.
        rpn_convs: convolutions before the proposal network's outputs.
        rpn_positive_iou, rpn_negative_iou: as in `boxes.match`; the anchors that overlap a box most count as
            positive from the negative one on.
        rpn_batch, rpn_positive_fraction: anchors per image in the loss, and how many may be positive.
        rpn_candidates: boxes that a level proposes before suppression, in training and evaluation.
        rpn_proposals: proposals per image after it, in training and evaluation.
        rpn_nms_threshold: IoU from which on a proposal counts as made before.
        roi_size: side of the pooled features for boxes; masks have 14.
        roi_sampling: samples per bin of RoIAlign in each direction, 0 as many as the bin has pixels.
        fc_dim: width of the layers on pooled features.
        roi_batch, roi_positive_fraction: proposals per image in the losses, and how many may be positive.
    """

    # What the paper fixes: the stages, one box per proposal or one per class and proposal, where smooth L1
    # losses of stages and proposals become linear (0 is L1), and whether there are masks.
    stages: ClassVar[tuple[Stage, ...]]
    class_agnostic: ClassVar[bool] = False
    smooth_l1_beta: ClassVar[float] = 0.0
    rpn_smooth_l1_beta: ClassVar[float] = 0.0
    mask_roi_size: ClassVar[int] = 14

    def __init__(
        self,
        features: list[dict[str, int]],
        num_classes: int,
        *,
        fpn_channels: int = 256,
        anchor_scale: float = 8.0,
        rpn_convs: int = 1,
        rpn_positive_iou: float = 0.7,
        rpn_negative_iou: float = 0.3,
        rpn_batch: int = 256,
        rpn_positive_fraction: float = 0.5,
        rpn_candidates: Sequence[int] = (2000, 1000),
        rpn_proposals: Sequence[int] = (1000, 1000),
        rpn_nms_threshold: float = 0.7,
        roi_size: int = 7,
        roi_sampling: int = 0,
        fc_dim: int = 1024,
        roi_batch: int = 512,
        roi_positive_fraction: float = 0.25,
        **shared: Any,
    ) -> None:
        super().__init__(features, num_classes, fpn_channels=fpn_channels, **shared)
        for key, pair in (("RPN_CANDIDATES", rpn_candidates), ("RPN_PROPOSALS", rpn_proposals)):
            if len(pair) != 2:
                raise ValueError(
                    f"{key}={[*pair]} must be two numbers: in training and in evaluation"
                )
        self.rpn = ProposalNetwork(
            fpn_channels,
            self.anchor_grid([anchor_scale]),
            num_convs=rpn_convs,
            positive_iou=rpn_positive_iou,
            negative_iou=rpn_negative_iou,
            batch=rpn_batch,
            positive_fraction=rpn_positive_fraction,
            candidates=tuple(rpn_candidates),
            proposals=tuple(rpn_proposals),
            nms_threshold=rpn_nms_threshold,
            smooth_l1_beta=self.rpn_smooth_l1_beta,
        )
        self.box_heads = nn.ModuleList(
            BoxHead(fpn_channels, roi_size, fc_dim, num_classes, self.class_agnostic)
            for _ in self.stages
        )
        self.mask_heads = nn.ModuleList(
            MaskHead(fpn_channels, num_classes) for _ in self.stages if self.needs_masks
        )
        self.roi_size, self.roi_sampling = roi_size, roi_sampling
        self.roi_batch, self.roi_positive_fraction = roi_batch, roi_positive_fraction

    def forward(
        self, maps: list[Tensor], images: Tensor, targets: list[dict[str, Any]] | None = None
    ) -> Any:
        """Maps of `features`, images (B, C, H, W) -> losses by name, or detections in evaluation.

        Losses: "rpn_cls", "rpn_box", and "cls", "box", "mask" (with the stage's number if there are several).
        Detections: per image boxes (n, 4) in pixels of `images`, clipped to its `size`, scores (n,), labels
        (n,), 0 ... K-1, the highest score first, and with masks their probabilities (n, 28, 28) in the boxes;
        bad, the number of outputs that are nan.
        """
        levels = self.levels(maps)
        logits, deltas = self.rpn(levels)
        if self._counting:
            return self._counted(levels, logits, deltas)
        anchors = self.rpn.anchors(levels)
        sizes = image_sizes(images, targets)
        proposals = self._propose(logits, deltas, anchors, sizes, map_shapes(levels))
        if not self.training:
            detections = self._detect(levels, proposals, sizes)
            for i, found in enumerate(detections):
                found["bad"] = found["bad"] + count_nan(level[i] for level in (*logits, *deltas))
            return detections
        with torch.autocast(images.device.type, enabled=False):
            losses = self._rpn_losses(logits, deltas, anchors, targets, sizes)
        return losses | self._stage_losses(levels, proposals, targets, sizes)

    @torch.compiler.disable
    def _propose(self, *args: Any) -> list[Tensor]:
        return self.rpn.propose(*args)

    @torch.compiler.disable
    def _rpn_losses(self, *args: Any) -> dict[str, Tensor]:
        return self.rpn.losses(*args)

    def _counted(
        self, levels: list[Tensor], *outputs: list[Tensor]
    ) -> tuple[list[Tensor | list[Tensor]], ...]:
        """All outputs for pooled features of a fixed number, which cost nothing to pool."""
        batch, channels = levels[0].shape[:2]
        shape = (batch * COUNTED_PROPOSALS, channels, self.roi_size, self.roi_size)
        pooled = levels[0].new_zeros(shape)
        boxes = [head(pooled) for head in self.box_heads]
        shape = (batch * COUNTED_DETECTIONS, channels, self.mask_roi_size, self.mask_roi_size)
        pooled = levels[0].new_zeros(shape)
        return [*outputs], boxes, [head(pooled) for head in self.mask_heads]

    def _stage_losses(
        self,
        levels: list[Tensor],
        proposals: list[Tensor],
        targets: list[dict[str, Any]],
        sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        losses = {}
        for number, (stage, head) in enumerate(zip(self.stages, self.box_heads, strict=True)):
            samples = [
                self._sample(stage, boxes, target)
                for boxes, target in zip(proposals, targets, strict=True)
            ]
            pooled = self._pool(levels, [s.boxes for s in samples], self.roi_size)
            logits, deltas = head(pooled)
            with torch.autocast(pooled.device.type, enabled=False):
                found = self._box_losses(stage, logits, deltas, samples, targets)
            if self.needs_masks:
                found["mask"] = self._mask_loss(self.mask_heads[number], levels, samples, targets)
            suffix = f"_{number}" if len(self.stages) > 1 else ""
            losses |= {name + suffix: stage.loss_weight * x for name, x in found.items()}
            if number + 1 < len(self.stages):
                proposals = self._refined(stage, deltas, samples, sizes)
        return losses

    @torch.compiler.disable
    @torch.no_grad()
    def _sample(self, stage: Stage, proposals: Tensor, target: dict[str, Any]) -> Sampled:
        """Match and sample proposals (n, 4) of an image and its ground truths, which count as proposals."""
        truths = target["boxes"].float()
        boxes = torch.cat((truths, proposals))
        matched = match(truths, boxes, positive=stage.iou, negative=stage.iou)
        chosen = torch.cat(sample(matched, self.roi_batch, self.roi_positive_fraction))
        return Sampled(boxes[chosen], matched[chosen], chosen < len(truths))

    @torch.compiler.disable
    def _pool(self, levels: list[Tensor], boxes: list[Tensor], size: int) -> Tensor:
        """Levels and boxes (n_i, 4) per image -> features (sum of n_i, C, size, size), in the maps' type."""
        levels = levels[: len(self.map_strides)]
        return pool(levels, self.map_strides, boxes, size, self.roi_sampling)

    @torch.compiler.disable
    def _box_losses(
        self,
        stage: Stage,
        logits: Tensor,
        deltas: Tensor,
        samples: list[Sampled],
        targets: list[dict[str, Any]],
    ) -> dict[str, Tensor]:
        """Logits (n, K + 1) and deltas (n, K or 1, 4) of all samples -> losses over their number."""
        labels, truths = [], []
        for s, target in zip(samples, targets, strict=True):
            (positive,) = torch.where(s.index >= 0)  # of a mask each use would wait for the device
            index = s.index[positive]
            label = torch.full_like(s.index, self.num_classes)
            label[positive] = target["labels"][index]
            labels.append(label)
            truths.append(target["boxes"][index].float())
        label = torch.cat(labels)
        (positive,) = torch.where(label < self.num_classes)
        boxes = torch.cat([s.boxes for s in samples])[positive]
        wanted = encode(torch.cat(truths), boxes, stage.weights)
        column = torch.zeros_like(positive) if self.class_agnostic else label[positive]
        found = deltas[positive, column]
        count = max(1, len(label))
        box = F.smooth_l1_loss(found, wanted, reduction="sum", beta=self.smooth_l1_beta)
        return {"cls": F.cross_entropy(logits, label, reduction="sum") / count, "box": box / count}

    def _mask_loss(
        self,
        head: nn.Module,
        levels: list[Tensor],
        samples: list[Sampled],
        targets: list[dict[str, Any]],
    ) -> Tensor:
        """Mean cross entropy of the positive samples' masks, each of the class of its ground truth."""
        positive = [torch.where(s.index >= 0)[0] for s in samples]
        boxes = [s.boxes[p] for s, p in zip(samples, positive, strict=True)]
        if not sum(len(b) for b in boxes):
            # Every parameter takes part in every step.
            return sum((p.sum() for p in head.parameters()), torch.zeros(())).float() * 0
        logits = head(self._pool(levels, boxes, self.mask_roi_size)).float()
        index = [s.index[p] for s, p in zip(samples, positive, strict=True)]
        label = torch.cat([t["labels"][i] for t, i in zip(targets, index, strict=True)])
        wanted = [
            mask_targets(t["masks"], i, b, logits.shape[-1])
            for t, i, b in zip(targets, index, boxes, strict=True)
        ]
        logits = logits[torch.arange(len(label), device=label.device), label]
        with torch.autocast(logits.device.type, enabled=False):
            return F.binary_cross_entropy_with_logits(logits, torch.cat(wanted))

    @torch.no_grad()
    def _refined(
        self,
        stage: Stage,
        deltas: Tensor,
        samples: list[Sampled],
        sizes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """Where a stage without classes moves its samples: the next stage's proposals, per image."""
        parts = deltas.split([len(s.boxes) for s in samples])
        return [
            clip(decode(part[:, 0], s.boxes, stage.weights), size)[~s.is_truth]
            for part, s, size in zip(parts, samples, sizes, strict=True)
        ]

    @torch.compiler.disable
    def _detect(
        self, levels: list[Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Proposals (n_i, 4) of each image -> its detections."""
        counts = [len(boxes) for boxes in proposals]
        logits, bad = [], [0] * len(counts)
        for number, (stage, head) in enumerate(zip(self.stages, self.box_heads, strict=True)):
            logit, deltas = head(self._pool(levels, proposals, self.roi_size))
            logits.append(logit)
            parts = deltas.split(counts)
            outputs = zip(logit.split(counts), parts, strict=True)
            bad = [before + count_nan(both) for before, both in zip(bad, outputs, strict=True)]
            boxes = [
                clip(decode(part, b[:, None], stage.weights), size)
                for part, b, size in zip(parts, proposals, sizes, strict=True)
            ]
            if number + 1 < len(self.stages):
                proposals = [b[:, 0] for b in boxes]
        # The stages' logits are averaged, as in mmdet (Detectron: their probabilities).
        scores = torch.stack(logits).mean(dim=0).softmax(dim=-1).split(counts)
        detections = [
            self._select(b, s) | dict(bad=n) for b, s, n in zip(boxes, scores, bad, strict=True)
        ]
        if self.needs_masks:
            self._add_masks(levels, detections)
        return detections

    def _select(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """Boxes (n, K or 1, 4) and probabilities (n, K + 1) of an image -> its detections."""
        boxes = boxes.expand(-1, self.num_classes, 4)
        proposal, label = torch.where(scores[:, :-1] > self.score_threshold)
        boxes, scores = boxes[proposal, label], scores[proposal, label]
        (kept,) = torch.where(has_area(boxes))
        boxes, scores, label = boxes[kept], scores[kept], label[kept]
        kept, scores = self.suppress(boxes, scores, label)
        return dict(boxes=boxes[kept], scores=scores, labels=label[kept])

    def _add_masks(self, levels: list[Tensor], detections: list[dict[str, Tensor]]) -> None:
        """Give the detections of each image their "masks"; stages are averaged."""
        pooled = self._pool(levels, [d["boxes"] for d in detections], self.mask_roi_size)
        label = torch.cat([d["labels"] for d in detections])
        row = torch.arange(len(label), device=label.device)
        masks = [head(pooled).float().sigmoid()[row, label] for head in self.mask_heads]
        masks = torch.stack(masks).mean(dim=0)
        for d, part in zip(
            detections, masks.split([len(d["boxes"]) for d in detections]), strict=True
        ):
            d["masks"] = part


@register_head("faster_rcnn", task="detection")
class FasterRCNNHead(TwoStageHead):
    """Faster R-CNN: one stage, boxes per class."""

    stages = (Stage(iou=0.5, weights=(10.0, 10.0, 5.0, 5.0), loss_weight=1.0),)


@register_head("mask_rcnn", task="detection")
class MaskRCNNHead(FasterRCNNHead):
    """Mask R-CNN: Faster R-CNN with a mask per class and box."""

    needs_masks = True
