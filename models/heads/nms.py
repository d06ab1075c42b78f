"""Non-maximum suppression of detections: hard by torchvision, soft as in the paper.

Paper: arXiv:1704.04503 (soft-NMS), Fig. 2, Eqs. 1-3: a box that overlaps a better one of its class keeps a
       smaller score instead of being dropped
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

KINDS = ("none", "linear", "gaussian")


@dataclass(frozen=True)
class Suppression:
    """What is kept of the overlapping boxes of one image.

    Attributes:
        threshold: IoU from which on a box counts as found before (soft_nms="gaussian" has no use for it).
        limit: boxes kept in all.
        soft_nms: "none" drops such boxes, "linear" multiplies their scores by 1 - IoU, "gaussian" all
            scores by exp(-IoU^2 / sigma).
        sigma: of "gaussian".
        min_score: a box whose score has become smaller is dropped (soft only).

    Raises:
        ValueError: another `soft_nms`, or `sigma` is not positive.
    """

    threshold: float
    limit: int
    soft_nms: str = "none"
    sigma: float = 0.5
    min_score: float = 0.001

    def __post_init__(self) -> None:
        if self.soft_nms not in KINDS:
            raise ValueError(
                f"SOFT_NMS={self.soft_nms!r} of the detection head must be one of {[*KINDS]}"
            )
        if self.sigma <= 0:
            raise ValueError(f"SOFT_NMS_SIGMA={self.sigma} of the detection head must be positive")

    def __call__(self, boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (n, 4), scores (n,), and what never suppresses one another, (n,) -> what is kept.

        Returns:
            Indices (k,), the highest score first, and the scores (k,).
        """
        if self.soft_nms == "none":
            kept = batched_nms(boxes, scores, groups, self.threshold)[: self.limit]
            return kept, scores[kept]
        scores = soft_nms(boxes, scores, groups, self.soft_nms, self.threshold, self.sigma)
        scores, kept = scores.sort(descending=True, stable=True)
        kept = kept[scores >= self.min_score][: self.limit]
        return kept, scores[: len(kept)]


def soft_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, kind: str, threshold: float, sigma: float
) -> Tensor:
    """Scores (n,) after soft-NMS within each group, in the order given; arguments as in `Suppression`.

    All groups take their next best box at the same time: as many steps as the largest group has boxes, and
    no step waits for the device.
    """
    if not len(boxes):
        return scores
    _, group = groups.unique(return_inverse=True)
    order = group.argsort(stable=True)
    count = torch.bincount(group)
    first = count.cumsum(0) - count
    slot = torch.arange(len(boxes), device=boxes.device) - first[group[order]]
    rows, steps = len(count), int(count.max())
    table = boxes.new_zeros(rows, steps, 4)
    table[group[order], slot] = boxes[order]
    current = scores.new_full((rows, steps), -torch.inf)
    current[group[order], slot] = scores[order]
    final = torch.zeros_like(current)
    row = torch.arange(rows, device=boxes.device)
    for _ in range(steps):
        score, best = current.max(dim=1)
        final[row, best] = torch.where(score > -torch.inf, score, final[row, best])
        current[row, best] = -torch.inf
        iou = _row_iou(table[row, best], table)
        if kind == "linear":
            decay = torch.where(iou > threshold, 1 - iou, 1.0)
        else:
            decay = torch.exp(-iou.square() / sigma)
        # Where a box is taken, or there never was one, 0 times infinity would be no number.
        current = torch.where(current > -torch.inf, current * decay, current)
    result = torch.empty_like(scores)
    result[order] = final[group[order], slot]
    return result


def _row_iou(box: Tensor, boxes: Tensor) -> Tensor:
    """IoU of box (g, 4) and boxes (g, n, 4) of the same group -> (g, n)."""
    box = box[:, None]
    low = torch.maximum(box[..., :2], boxes[..., :2])
    high = torch.minimum(box[..., 2:], boxes[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    area = (box[..., 2:] - box[..., :2]).prod(dim=-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    return shared / (area + areas - shared).clamp(min=torch.finfo(boxes.dtype).tiny)
