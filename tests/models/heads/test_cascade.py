"""What three stages do with boxes, scores and masks."""

import pytest
import torch

from models.heads.boxes import BACKGROUND, clip, decode, encode
from models.heads.cascade import CascadeMaskRCNNHead, CascadeRCNNHead
from models.heads.rcnn import Sampled

FEATURES = [dict(channels=8 * 2**i, stride=4 * 2**i) for i in range(4)]
SMALL = dict(fpn_channels=16, fc_dim=24)
# Standard deviations of the paper's box targets, per stage.
DEVIATIONS = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])


@pytest.fixture
def constant():
    """A head whose three stages say the same of every box: (head, class biases, deltas, mask biases)."""
    head = CascadeMaskRCNNHead(FEATURES, 3, **SMALL, score_threshold=0.0, nms_threshold=1.0).eval()
    cls, box = torch.randn(3, 4), torch.randn(3, 4)
    mask = torch.randn(3, 3)
    for i in range(3):
        for layer, bias in (
            (head.box_heads[i].cls, cls[i]),
            (head.box_heads[i].box, box[i]),
            (head.mask_heads[i][1].mask_fcn_logits, mask[i]),
        ):
            torch.nn.init.zeros_(layer.weight)
            layer.bias.data.copy_(bias)
    return head, cls, box, mask


def test_boxes_go_through_all_stages_and_scores_and_masks_are_averaged(constant):
    head, cls, box, mask = constant
    proposals = torch.tensor([[10.0, 10, 40, 50], [30, 5, 90, 60]])
    levels = [torch.randn(1, 16, 64 // s, 96 // s) for s in (4, 8, 16, 32, 64)]
    with torch.no_grad():
        (found,) = head._detect(levels, [proposals], [(64, 96)])
    expected = proposals
    for delta, deviation in zip(box, DEVIATIONS, strict=True):
        moved = decode(delta * torch.tensor(deviation), expected, (1.0,) * 4)
        expected = clip(moved, (64, 96))
    scores = cls.mean(dim=0).softmax(dim=0)
    masks = mask.sigmoid().mean(dim=0)
    assert len(found["boxes"]) == 6  # each box for each class
    for k in range(3):
        of_class = found["labels"] == k
        boxes = found["boxes"][of_class]
        order = boxes[:, 2].argsort()
        torch.testing.assert_close(
            boxes[order], expected[expected[:, 2].argsort()], rtol=1e-4, atol=1e-3
        )
        torch.testing.assert_close(found["scores"][of_class], scores[k].expand(2))
        torch.testing.assert_close(found["masks"][of_class], masks[k].expand(2, 28, 28))


def test_the_next_stage_gets_moved_and_clipped_boxes_without_ground_truths():
    head = CascadeRCNNHead(FEATURES, 3, **SMALL)
    boxes = torch.tensor([[10.0, 10, 40, 50], [30, 5, 90, 60], [0, 0, 9, 9]])
    moved = torch.tensor([[12.0, 10, 44, 50], [30, 5, 99, 66], [0, 0, 9, 9]])
    stage = head.stages[1]
    deltas = encode(moved, boxes, stage.weights)[:, None].requires_grad_()
    samples = [
        Sampled(boxes[:2], torch.tensor([0, 0]), torch.tensor([False, False])),
        Sampled(boxes[2:], torch.tensor([0]), torch.tensor([True])),
    ]
    first, second = head._refined(stage, deltas, samples, [(60, 95), (60, 95)])
    torch.testing.assert_close(first, torch.tensor([[12.0, 10, 44, 50], [30, 5, 95, 60]]))
    assert len(second) == 0
    assert not first.requires_grad


def test_stages_want_ever_better_overlaps():
    head = CascadeRCNNHead(FEATURES, 3, **SMALL)
    target = dict(boxes=torch.tensor([[0.0, 0, 100, 100]]), labels=torch.tensor([1]))
    proposals = torch.tensor([[0.0, 0, 100, h] for h in (45.0, 55.0, 65.0, 75.0)])
    positives = []
    for stage in head.stages:
        found = head._sample(stage, proposals, target)
        positives.append(int((found.index != BACKGROUND).sum()) - 1)  # the box itself
    assert positives == [3, 2, 1]


def test_losses_of_later_stages_count_less():
    torch.manual_seed(0)
    head = CascadeRCNNHead(FEATURES, 3, **SMALL)
    for i in range(1, 3):  # the same logits everywhere
        head.box_heads[i].load_state_dict(head.box_heads[0].state_dict())
    for box_head in head.box_heads:
        torch.nn.init.zeros_(box_head.cls.weight)
    maps = [torch.randn(1, f["channels"], 64 // f["stride"], 96 // f["stride"]) for f in FEATURES]
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), size=(64, 96))
    losses = head(maps, torch.zeros(1, 3, 64, 96), [empty])
    log4 = torch.tensor(4.0).log()
    for number, weight in enumerate((1.0, 0.5, 0.25)):
        torch.testing.assert_close(losses[f"cls_{number}"], weight * log4)
        assert losses[f"box_{number}"] == 0
