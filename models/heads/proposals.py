"""The proposal network of two-stage detectors: where there is any object, found from anchors.

Papers:     arXiv:1506.01497, Sec. 3.1 (Faster R-CNN), arXiv:1612.03144, Sec. 4.1 (on all levels of a pyramid)
Reference:  mmdet 2, RPNHead
Deviations: from torchvision's `RegionProposalNetwork`, whose convolutions are used here without its
            bookkeeping: L1 instead of smooth L1 losses, anchors in the padding ignored; see `boxes.py` for
            anchors and matching.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from .boxes import AnchorGrid, best_candidates, check_overlaps, encode, flatten_level, match, sample
from .nms import Suppression

UNIT_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class ProposalNetwork(nn.Module):
    """Where there is any object, from all levels of a pyramid; arguments as in `TwoStageHead`, with rpn_."""

    def __init__(
        self,
        channels: int,
        anchors: AnchorGrid,
        *,
        num_convs: int,
        positive_iou: float,
        negative_iou: float,
        batch: int,
        positive_fraction: float,
        candidates: tuple[int, int],
        proposals: tuple[int, int],
        nms_threshold: float,
        smooth_l1_beta: float,
    ) -> None:
        super().__init__()
        self.anchors = anchors
        self.smooth_l1_beta = smooth_l1_beta
        self.head = RPNHead(channels, anchors.num_anchors, num_convs)
        check_overlaps(negative_iou, positive_iou, "RPN_")
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.batch, self.positive_fraction = batch, positive_fraction
        # In training, and in evaluation.
        self.candidates = dict(zip((True, False), candidates, strict=True))
        self.suppress = {
            training: Suppression(nms_threshold, limit)
            for training, limit in zip((True, False), proposals, strict=True)
        }

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels (B, C, h, w) -> logits (B, A_l, 1) and deltas (B, A_l, 4) per level, float32."""
        logits, deltas = self.head(levels)
        return [flatten_level(x, 1) for x in logits], [flatten_level(x, 4) for x in deltas]

    @torch.no_grad()
    def propose(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        sizes: list[tuple[int, int]],
        shapes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """Outputs of `forward` on levels of `shapes` (h, w) -> proposals (n, 4) per image, the best first."""
        proposals = []
        for i, size in enumerate(sizes):
            boxes, scores, _, levels = best_candidates(
                [level[i].detach() for level in logits],
                [level[i].detach() for level in deltas],
                anchors,
                self.anchors.valid_parts(shapes, size),
                size,
                limit=self.candidates[self.training],
            )
            kept, _ = self.suppress[self.training](boxes, scores, levels)
            proposals.append(boxes[kept])
        return proposals

    def losses(
        self,
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        targets: list[dict[str, Any]],
        sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Outputs of `forward` -> "rpn_cls" and "rpn_box", both over the number of sampled anchors."""
        all_anchors, all_logits = torch.cat(anchors), torch.cat(logits, dim=1)[..., 0]
        all_deltas = torch.cat(deltas, dim=1)
        cls, box, count = all_logits.sum() * 0, all_deltas.sum() * 0, 0
        for i, (target, size) in enumerate(zip(targets, sizes, strict=True)):
            matched = match(
                target["boxes"],
                all_anchors,
                positive=self.positive_iou,
                negative=self.negative_iou,
                low_quality=self.negative_iou,
                valid=self.anchors.is_valid(all_anchors, size),
            )
            found, empty = sample(matched, self.batch, self.positive_fraction)
            chosen = torch.cat((found, empty))
            truth = (matched[chosen] >= 0).float()
            cls = cls + F.binary_cross_entropy_with_logits(
                all_logits[i, chosen], truth, reduction="sum"
            )
            wanted = encode(
                target["boxes"][matched[found]].float(), all_anchors[found], UNIT_WEIGHTS
            )
            box = box + F.smooth_l1_loss(
                all_deltas[i, found], wanted, reduction="sum", beta=self.smooth_l1_beta
            )
            count += len(chosen)
        return {"rpn_cls": cls / max(1, count), "rpn_box": box / max(1, count)}
