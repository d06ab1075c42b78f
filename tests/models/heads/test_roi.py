"""Features and masks cut out by boxes."""

import math

import pytest
import torch

from models.heads.roi import mask_targets, pool


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16)])
def test_pooled_coordinates_are_the_boxes_own_at_every_level(strides):
    """Maps that hold x, y and the level's number at the centre of each pixel of the image."""
    side = 1024
    levels = []
    for number, stride in enumerate(strides):
        centre = (torch.arange(side // stride) + 0.5) * stride
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        level = torch.stack((x, y, torch.full_like(x, number)))
        levels.append(torch.stack((level, level + 10_000)))  # the second image's are told apart
    sides = torch.tensor([20.0, 111, 113, 223, 225, 447, 449, 900])
    corner = torch.tensor([64.0, 56.0])
    boxes = torch.cat((corner.expand(8, 2), corner + sides[:, None]), dim=1)
    pooled = pool(levels, strides, [boxes, boxes[:3]], 7)
    assert pooled.shape == (11, 3, 7, 7)
    step = (torch.arange(7) + 0.5) / 7
    for i, (box, length) in enumerate(zip(boxes[:, :2], sides, strict=True)):
        x = (box[0] + step * length).expand(7, 7)
        y = (box[1] + step * length)[:, None].expand(7, 7)
        torch.testing.assert_close(pooled[i, :2], torch.stack((x, y)), rtol=0, atol=0.1)
        level = max(0, min(len(strides) - 1, math.floor(math.log2(length / (14 * strides[0])))))
        torch.testing.assert_close(pooled[i, 2], torch.full((7, 7), float(level)))
    torch.testing.assert_close(pooled[8:], pooled[:3] + 10_000)


def test_pooling_nothing_gives_nothing():
    levels = [torch.rand(1, 3, 8, 8, requires_grad=True)]
    pooled = pool(levels, [4], [torch.zeros(0, 4)], 7)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()  # an image without proposals must not stop training
    assert not levels[0].grad.any()


def test_mask_targets_are_the_masks_within_the_boxes():
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 10:30, 20:40] = True
    masks[1, :, 30:] = True
    boxes = torch.tensor([[20.0, 10, 40, 30], [20, 10, 60, 30], [20, 0, 40, 40], [0, 0, 10, 10]])
    found = mask_targets(masks, torch.tensor([0, 0, 1, 1]), boxes, 28)
    half = torch.zeros(28, 28)
    half[:, :14] = 1
    assert found.shape == (4, 28, 28)
    for part, expected in zip(found, [torch.ones(28, 28), half, 1 - half, half * 0], strict=True):
        assert torch.equal(part, expected)
