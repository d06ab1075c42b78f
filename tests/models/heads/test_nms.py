"""Hard and soft suppression against literal loops."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from models.heads.nms import Suppression


def candidates(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes that overlap a lot, scores, and three groups, one of them of one box."""
    corner = torch.rand(n, 2) * 30
    boxes = torch.cat((corner, corner + 5 + torch.rand(n, 2) * 30), dim=1)
    groups = torch.randint(0, 2, (n,)) * 7
    groups[n // 2] = 3
    return boxes, torch.rand(n), groups


def literal(boxes, scores, groups, kind, threshold, sigma, min_score, limit):
    """Fig. 2 of arXiv:1704.04503, group by group."""
    iou = box_iou(boxes, boxes).tolist()
    kept = []
    for group in set(groups.tolist()):
        left = {i: scores[i].item() for i in range(len(boxes)) if groups[i] == group}
        while left:
            best = max(left, key=left.get)
            score = left.pop(best)
            if score < min_score:
                continue
            kept.append((score, best))
            for i in list(left):
                overlap = iou[best][i]
                if kind == "none" and overlap > threshold:
                    del left[i]
                elif kind == "linear" and overlap > threshold:
                    left[i] *= 1 - overlap
                elif kind == "gaussian":
                    left[i] *= math.exp(-(overlap**2) / sigma)
    return sorted(kept, reverse=True)[:limit]


@pytest.mark.parametrize("limit", [10, 1000])
@pytest.mark.parametrize("min_score", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["none", "linear", "gaussian"])
def test_suppression_equals_the_literal_loop(kind, min_score, limit):
    boxes, scores, groups = candidates(60)
    if kind == "none":
        min_score = 0.0
    options = dict(threshold=0.4, limit=limit, sigma=0.3, min_score=min_score)
    kept, kept_scores = Suppression(soft_nms=kind, **options)(boxes, scores, groups)
    expected = literal(boxes, scores, groups, kind, **options)
    assert kept.tolist() == [i for _, i in expected]
    torch.testing.assert_close(kept_scores, torch.tensor([s for s, _ in expected]))
    assert 0 < len(kept) <= (60 if min_score == 0 and kind != "none" else 59)


@pytest.mark.parametrize("kind", ["none", "linear", "gaussian"])
def test_no_candidates_give_no_detections(kind):
    kept, scores = Suppression(0.5, 10, kind)(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    )
    assert kept.shape == scores.shape == (0,)


@pytest.mark.parametrize("kind", ["linear", "gaussian"])
def test_equal_boxes_leave_finite_scores(kind):
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(3, 1)
    boxes[2, 2:] = 0  # and one without area
    rule = Suppression(0.5, 10, kind, min_score=0.0)
    kept, scores = rule(boxes, torch.tensor([0.5, 0.9, 0.3]), torch.zeros(3, dtype=torch.int64))
    second = 0.5 * math.exp(-2) if kind == "gaussian" else 0.0
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.3, second]))
    assert kept.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(soft_nms="soft"), r"SOFT_NMS='soft' .* \['none', 'linear', 'gaussian'\]"),
        (dict(sigma=0.0), r"SOFT_NMS_SIGMA=0.0 .* positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Suppression(0.5, 10, **options)
