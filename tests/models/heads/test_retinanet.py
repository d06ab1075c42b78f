"""RetinaNet's losses against literal loops, its start, and what its keywords build."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from models.heads.retinanet import RetinaNetHead

FEATURES = [dict(channels=8 * 2**i, stride=4 * 2**i) for i in range(4)]


def head_and_maps(hw=(64, 96), **options) -> tuple[RetinaNetHead, list[torch.Tensor], torch.Tensor]:
    head = RetinaNetHead(FEATURES, 3, **dict(fpn_channels=16, num_convs=1) | options)
    maps = [torch.randn(2, f["channels"], *(side // f["stride"] for side in hw)) for f in FEATURES]
    return head, maps, torch.zeros(2, 3, *hw)


def targets(*numbers: int, size=(64, 96)) -> list[dict]:
    """One target per image with that many boxes."""
    found = []
    for n in numbers:
        corner = torch.rand(n, 2) * 40
        boxes = torch.cat((corner, corner + 8 + torch.rand(n, 2) * 40), dim=1)
        boxes = boxes.clamp(max=torch.tensor([size[1], size[0]] * 2))
        found.append(dict(boxes=boxes, labels=torch.randint(0, 3, (n,)), size=size))
    return found


def literal_losses(logits, deltas, anchors, batch):
    """Matching and losses anchor by anchor, class by class."""
    cls = box = count = 0.0
    for image, target in enumerate(batch):
        boxes = target["boxes"]
        iou = box_iou(boxes, anchors)
        positives = 0
        for a, anchor in enumerate(anchors.tolist()):
            if anchor[0] + anchor[2] >= 2 * target["size"][1] - 1:
                continue  # centred in the padding
            best = iou[:, a].max().item() if len(boxes) else 0.0
            found = iou[:, a].argmax().item() if best >= 0.5 else None
            for b in range(len(boxes)):
                if iou[b, a] == iou[b].max() > 0:
                    found = b
            if found is None and best >= 0.4:
                continue
            positives += found is not None
            for k in range(3):
                p = logits[image, a, k].sigmoid().item()
                if found is not None and target["labels"][found] == k:
                    cls += -0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    cls += -0.75 * p**2 * math.log(1 - p)
            if found is not None:
                aw, ah = anchor[2] - anchor[0], anchor[3] - anchor[1]
                x1, y1, x2, y2 = boxes[found].tolist()
                wanted = [
                    ((x1 + x2) / 2 - (anchor[0] + anchor[2]) / 2) / aw,
                    ((y1 + y2) / 2 - (anchor[1] + anchor[3]) / 2) / ah,
                    math.log((x2 - x1) / aw),
                    math.log((y2 - y1) / ah),
                ]
                box += sum(
                    abs(d - t) for d, t in zip(deltas[image, a].tolist(), wanted, strict=True)
                )
        count += max(1, positives)
    return cls / count, box / count


@pytest.mark.parametrize("numbers", [(3, 2), (2, 0), (0, 0)])
def test_losses_equal_a_literal_loop(numbers):
    head, maps, images = head_and_maps(num_maps=2, extra_levels="none", prior=0.3)
    batch = targets(*numbers)
    batch[1]["size"] = (64, 64)  # the right third is padding
    batch[1]["boxes"].clamp_(max=64)
    found = head(maps, images, batch)
    with torch.no_grad(), head.eval().counting():
        logits, deltas = (torch.cat(part, dim=1) for part in head(maps, images))
        anchors = torch.cat(head.anchors(head.fpn(maps[2:])))
    cls, box = literal_losses(logits, deltas, anchors, batch)
    torch.testing.assert_close(found["cls"].item(), cls, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["box"].item(), box, rtol=1e-4, atol=1e-6)
    assert (box > 0) == (numbers != (0, 0))


def test_every_class_starts_at_the_prior():
    head, maps, images = head_and_maps(prior=0.02)
    with torch.no_grad(), head.eval().counting():
        logits = torch.cat(head(maps, images)[0], dim=1)
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.02), rtol=0.2, atol=0)


def test_the_published_head_has_the_published_size():
    """By hand for 256 channels, 80 classes and maps of 16, 32 and 64 channels."""
    head = RetinaNetHead(FEATURES, 80)
    conv = 256 * 256 * 9 + 256
    pyramid = (16 + 32 + 64 + 3) * 256 + 3 * conv + (64 * 256 * 9 + 256) + conv
    outputs = 9 * (80 + 4) * (256 * 9 + 1)
    assert sum(p.numel() for p in head.parameters()) == pyramid + 8 * conv + outputs
    assert head.anchors.strides == [8, 16, 32, 64, 128]
    assert head.unused_maps == (0,)


def test_levels_and_anchors_follow_the_keywords():
    head, maps, images = head_and_maps(
        num_maps=4, extra_levels="pool", scales_per_octave=2, anchor_ratios=[1.0], anchor_scale=3
    )
    assert head.anchors.strides == [4, 8, 16, 32, 64]
    assert head.unused_maps == ()
    with torch.no_grad(), head.eval().counting():
        logits, deltas = head(maps, images)
    positions = [16 * 24, 8 * 12, 4 * 6, 2 * 3, 1 * 2]
    assert [x.shape for x in logits] == [(2, 2 * n, 3) for n in positions]
    assert [x.shape for x in deltas] == [(2, 2 * n, 4) for n in positions]
    first = head.anchors(head.fpn(maps))[0]
    sides = (first[:2, 2] - first[:2, 0]).tolist()
    assert sides == pytest.approx([12, 12 * 2**0.5])


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 8), (24, 1), (4, 1)])
def test_group_norms_keep_eight_channels_per_group_where_they_can(channels, groups):
    head = RetinaNetHead(FEATURES, 3, fpn_channels=channels, num_convs=1, norm="group")
    assert head.cls_tower[1].num_groups == groups
    assert head.cls_tower[0].bias is None


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match=r"NORM='batch' must be one of \['none', 'group'\]"):
        RetinaNetHead(FEATURES, 3, norm="batch")
