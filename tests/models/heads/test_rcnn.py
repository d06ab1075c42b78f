"""Two-stage detectors: their losses against literal loops, and what they sample and propose."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.heads.boxes import BACKGROUND, IGNORED, encode, map_shapes, match
from models.heads.rcnn import FasterRCNNHead, MaskRCNNHead, Sampled
from models.heads.roi import mask_targets, pool
from tests.operators import Operators

FEATURES = [dict(channels=8 * 2**i, stride=4 * 2**i) for i in range(4)]
SMALL = dict(fpn_channels=16, fc_dim=24)


def maps_and_images(hw=(64, 96)) -> tuple[list[torch.Tensor], torch.Tensor]:
    maps = [torch.randn(2, f["channels"], *(side // f["stride"] for side in hw)) for f in FEATURES]
    return maps, torch.zeros(2, 3, *hw)


def target(boxes: list[list[float]], labels: list[int], size=(64, 96)) -> dict:
    return dict(
        boxes=torch.tensor(boxes).view(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        size=size,
    )


def test_proposal_losses_equal_a_literal_loop():
    """All anchors are sampled, as a batch of 100000 has room for them."""
    head = FasterRCNNHead(
        FEATURES, 3, **SMALL, rpn_batch=100_000, anchor_scale=4.0, num_maps=2, extra_levels="none"
    )
    maps, images = maps_and_images()
    batch = [
        target([[0, 0, 90, 60], [10, 0, 96, 64]], [0, 2]),
        target([], [], size=(64, 64)),
    ]
    levels = head.fpn(maps[2:])
    logits, deltas = head.rpn(levels)
    anchors = head.rpn.anchors(levels)
    sizes = [t["size"] for t in batch]
    found = head.rpn.losses(logits, deltas, anchors, batch, sizes)
    logits, deltas = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)
    anchors = torch.cat(anchors)
    cls = box = count = 0.0
    for i, t in enumerate(batch):
        matched = match(t["boxes"], anchors, positive=0.7, negative=0.3, low_quality=0.3)
        for a, m in enumerate(matched.tolist()):
            centre = (anchors[a, 0] + anchors[a, 2]).item() / 2
            if m == IGNORED or centre > t["size"][1] - 0.5:
                continue
            count += 1
            p = logits[i, a, 0].sigmoid().item()
            cls -= math.log(p if m >= 0 else 1 - p)
            if m >= 0:
                wanted = encode(t["boxes"][m], anchors[a], (1,) * 4)
                box += (deltas[i, a] - wanted).abs().sum().item()
    assert box > 0
    assert found["rpn_cls"].item() == pytest.approx(cls / count, rel=1e-4)
    assert found["rpn_box"].item() == pytest.approx(box / count, rel=1e-4)
    # The same through the whole head.
    torch.testing.assert_close(head(maps, images, batch)["rpn_box"], found["rpn_box"])


@pytest.mark.parametrize("positives", [True, False])
def test_box_losses_equal_a_literal_loop(positives):
    head = FasterRCNNHead(FEATURES, 3, **SMALL)
    batch = [target([[10, 12, 42, 50], [60, 20, 95, 60]], [0, 2]), target([], [])]
    boxes = [torch.rand(5, 4) * 20 + torch.tensor([0.0, 0, 30, 30]) for _ in batch]
    index = torch.tensor([1, 0, BACKGROUND, 1, BACKGROUND] if positives else [BACKGROUND] * 5)
    samples = [
        Sampled(boxes[0], index, index < -9),
        Sampled(boxes[1], torch.full((5,), BACKGROUND), index < -9),
    ]
    logits, deltas = torch.randn(10, 4), torch.randn(10, 3, 4)
    (stage,) = head.stages
    found = head._box_losses(stage, logits, deltas, samples, batch)
    cls = box = 0.0
    for row in range(10):
        truth = index[row].item() if row < 5 else BACKGROUND
        label = batch[0]["labels"][truth].item() if truth >= 0 else 3
        cls -= logits[row].log_softmax(0)[label].item()
        if truth >= 0:
            wanted = encode(batch[0]["boxes"][truth], boxes[0][row], (10, 10, 5, 5))
            box += (deltas[row, label] - wanted).abs().sum().item()
    assert found["cls"].item() == pytest.approx(cls / 10, rel=1e-4)
    assert found["box"].item() == pytest.approx(box / 10, rel=1e-4)


def test_ground_truths_are_proposals_and_their_overlap_decides():
    head = FasterRCNNHead(FEATURES, 3, **SMALL)
    t = target([[10, 10, 30, 30], [50, 10, 70, 30]], [0, 2])
    proposals = torch.tensor([[10.0, 10, 30, 22], [50, 10, 70, 18], [0, 0, 5, 5]])
    found = head._sample(head.stages[0], proposals, t)
    rows = {
        tuple(b.tolist()): (i.item(), g.item())
        for b, i, g in zip(found.boxes, found.index, found.is_truth, strict=True)
    }
    assert rows == {
        (10, 10, 30, 30): (0, True),
        (50, 10, 70, 30): (1, True),
        (10, 10, 30, 22): (0, False),  # IoU 0.6
        (50, 10, 70, 18): (BACKGROUND, False),  # IoU 0.4
        (0, 0, 5, 5): (BACKGROUND, False),
    }


def test_mask_loss_is_the_mean_over_the_masks_of_the_true_classes():
    head = MaskRCNNHead(FEATURES, 3, **SMALL)
    maps, _ = maps_and_images()
    levels = head.fpn(maps)
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[0, 12:30, 10:42] = True
    masks[1, 20:60, 70:95] = True
    batch = [
        target([[10, 12, 42, 50], [60, 20, 95, 60]], [0, 2]) | dict(masks=masks),
        target([], []) | dict(masks=masks[:0]),
    ]
    boxes = torch.tensor([[60.0, 20, 95, 60], [0, 0, 9, 9], [8, 12, 40, 52]])
    index = torch.tensor([1, BACKGROUND, 0])
    none = Sampled(boxes[:0], index[:0], index[:0] > 0)
    found = head._mask_loss(
        head.mask_heads[0], levels, [Sampled(boxes, index, index > 9), none], batch
    )
    pooled = pool(levels[:4], [4, 8, 16, 32], [boxes[[0, 2]], boxes[:0]], 14)
    logits = head.mask_heads[0](pooled)
    assert logits.shape == (2, 3, 28, 28)
    wanted = mask_targets(masks, index[[0, 2]], boxes[[0, 2]], 28)
    expected = [
        F.binary_cross_entropy_with_logits(logits[0, 2], wanted[0]),
        F.binary_cross_entropy_with_logits(logits[1, 0], wanted[1]),
    ]
    torch.testing.assert_close(found, sum(expected) / 2)


@pytest.mark.parametrize("images", [1, 3])
def test_training_waits_for_the_device_a_few_times_per_image(images):
    """For lengths that images decide: candidates, suppression, samples, and those that found something."""
    # Of many candidates torchvision suppresses level by level on a CPU, and all at once on a GPU.
    head = MaskRCNNHead(FEATURES, 3, **SMALL, rpn_candidates=[100, 100])
    maps = [
        torch.randn(images, f["channels"], 64 // f["stride"], 96 // f["stride"]) for f in FEATURES
    ]
    found = target([[10, 12, 42, 50], [60, 20, 95, 60]], [0, 2], (60, 90))
    batch = [found | dict(masks=torch.ones(2, 64, 96, dtype=torch.bool))] * images
    head(maps, torch.zeros(images, 3, 64, 96), batch)  # makes what is made once
    with Operators() as operators:
        head(maps, torch.zeros(images, 3, 64, 96), batch)
    assert (
        operators.waits <= 8 * images + 9
    )  # 41 per image, when each level and each use of a mask asked


def test_proposals_are_as_many_as_said_in_training_and_evaluation():
    head = FasterRCNNHead(FEATURES, 3, **SMALL, rpn_candidates=[60, 30], rpn_proposals=[50, 20])
    maps, _ = maps_and_images()
    levels = head.fpn(maps)
    outputs = head.rpn(levels)
    anchors = head.rpn.anchors(levels)
    for training, expected in ((True, 50), (False, 20)):
        head.train(training)
        proposals = head.rpn.propose(*outputs, anchors, [(64, 96), (64, 64)], map_shapes(levels))
        assert [len(p) for p in proposals] == [expected] * 2
        assert proposals[1].max() <= 64


def test_the_published_head_has_the_published_size():
    """By hand for 256 channels, 80 classes and maps of 8, 16, 32 and 64 channels."""
    head = MaskRCNNHead(FEATURES, 80)
    conv = 256 * 256 * 9 + 256
    pyramid = (8 + 16 + 32 + 64 + 4) * 256 + 4 * conv
    rpn = conv + 3 * (1 + 4) * 257
    boxes = (256 * 49 + 1) * 1024 + 1025 * 1024 + 1025 * (81 + 320)
    masks = 4 * conv + (256 * 256 * 4 + 256) + 257 * 80
    assert sum(p.numel() for p in head.parameters()) == pyramid + rpn + boxes + masks
    assert head.rpn.anchors.strides == [4, 8, 16, 32, 64]
    assert head.rpn.anchors([torch.zeros(1, 1, 1, 1)] * 5)[4][1].tolist() == [-256, -256, 256, 256]


@pytest.mark.parametrize("key", ["rpn_candidates", "rpn_proposals"])
def test_numbers_for_training_and_evaluation_are_two(key):
    with pytest.raises(ValueError, match=rf"{key.upper()}=\[100\] must be two numbers"):
        FasterRCNNHead(FEATURES, 3, **SMALL, **{key: [100]})
