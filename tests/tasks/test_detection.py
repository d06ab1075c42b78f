import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from tasks import detection
from tasks.detection import DetectionTask, build_task, encode_masks
from utils.pictures import palette


class Fixed(nn.Module):
    """A model that gives what it was made with, and keeps what it was called with."""

    task = "detection"

    def __init__(self, output, auxiliary=None):
        super().__init__()
        self.output, self.auxiliary, self.calls = output, auxiliary or {}, []

    def forward(self, images, targets=None):
        self.calls.append((images, targets))
        return self.output

    def aux_losses(self):
        return self.auxiliary


def pixels_of(codes):
    """Run-length codes -> (N, H, W) bool."""
    assert all(isinstance(code["counts"], str) for code in codes), "as JSON has them"
    return torch.from_numpy(np.stack([coco_mask.decode(code) for code in codes])).bool()


def test_the_loss_is_the_sum_of_the_heads_losses_and_the_models_own():
    parts = dict(cls=torch.tensor(2.0), box=torch.tensor(0.5))
    model = Fixed(parts, dict(budget=torch.tensor(0.25)))
    images, targets = torch.rand(1, 3, 8, 8), [{}]
    losses = DetectionTask(3).losses(model, (images, targets))
    assert {name: value.item() for name, value in losses.items()} == dict(
        loss=2.75, loss_cls=2, loss_box=0.5, loss_budget=0.25
    )
    assert model.calls == [(images, targets)]


def test_boxes_and_masks_go_to_the_stored_image_as_a_loop_puts_them_there():
    """Each axis has its own ratio, since sides are rounded when an image is resized."""
    sizes = [((60, 45), (121, 88)), ((50, 64), (33, 47)), ((20, 20), (20, 20))]
    outputs, targets = [], []
    for size, original_size in sizes:
        corners = torch.rand(9, 2, 2).sort(dim=1).values * torch.tensor(size[::-1])
        boxes = corners.flatten(1)
        boxes[0] = torch.tensor([0.0, 0.0, size[1], size[0]])  # all of it
        boxes[1, 2:] = boxes[1, :2]  # nothing
        outputs.append(
            dict(
                boxes=boxes,
                scores=torch.rand(9).sort(descending=True).values,
                labels=torch.randint(0, 3, (9,)),
                masks=torch.rand(9, 28, 28),
            )
        )
        targets.append(dict(size=size, original_size=original_size))
    outputs.append({k: v[:0] for k, v in outputs[0].items()})
    targets.append(targets[0])
    images = torch.rand(4, 3, 64, 64)
    model = Fixed(outputs)
    predicted = DetectionTask(3).predict(model, (images, targets))
    assert model.calls == [(images, targets)]
    for found, output, (size, original_size) in zip(predicted, outputs, sizes, strict=False):
        assert found["bad"] == 0
        assert torch.equal(found["scores"], output["scores"])
        assert torch.equal(found["labels"], output["labels"])
        masks = pixels_of(found["masks"])
        for index in range(9):
            box = [
                value * original_size[1 - axis % 2] / size[1 - axis % 2]
                for axis, value in enumerate(output["boxes"][index].tolist())
            ]
            assert found["boxes"][index].tolist() == pytest.approx(box, rel=1e-5, abs=1e-4)
            pasted = paste_masks_in_image(
                output["masks"][index][None, None], found["boxes"][index][None], original_size
            )[0, 0]
            assert torch.equal(masks[index], pasted >= 0.5)
    assert predicted[0]["boxes"][0].tolist() == [0, 0, 88, 121]
    assert predicted[0]["masks"][0] != predicted[0]["masks"][2]
    assert predicted[3]["masks"] == []
    assert predicted[3]["boxes"].shape == (0, 4)


def test_masks_in_pieces_are_the_same_masks(monkeypatch):
    masks = torch.rand(7, 28, 28)
    boxes = torch.tensor([[5.0, 8.0, 30.0, 20.0]]).repeat(7, 1) + torch.arange(7)[:, None]
    whole = encode_masks(masks, boxes, (40, 50))
    monkeypatch.setattr(detection, "_MASK_BYTES", 3 * 40 * 50)
    assert encode_masks(masks, boxes, (40, 50)) == whole
    monkeypatch.setattr(detection, "_MASK_BYTES", 1)
    assert encode_masks(masks, boxes, (40, 50)) == whole


def test_masks_that_reach_over_the_edge_are_cut_there():
    masks = torch.ones(2, 28, 28)
    boxes = torch.tensor([[-10.0, -10.0, 20.0, 20.0], [30.0, 30.0, 300.0, 60.0]])
    found = pixels_of(encode_masks(masks, boxes, (40, 50)))
    expected = paste_masks_in_image(masks[:, None], boxes, (40, 50))[:, 0] >= 0.5
    assert torch.equal(found, expected)
    assert found[0, 0, 0]
    assert found[1, 39, 49]
    assert not found[1, 39, 20]


def test_half_precision_goes_in_and_single_comes_out():
    output = dict(
        boxes=torch.tensor([[1.0, 2.0, 3.0, 4.0]]).half(),
        scores=torch.tensor([0.5]).bfloat16(),
        labels=torch.tensor([1]),
        masks=torch.ones(1, 28, 28).half(),
    )
    target = dict(size=(8, 8), original_size=(16, 24))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = DetectionTask(3).predict(Fixed([output]), (torch.rand(1, 3, 8, 8), [target]))
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert found["boxes"].tolist() == [[3, 4, 9, 8]]


def test_detections_that_are_not_finite_are_left_out_and_counted():
    output = dict(
        boxes=torch.tensor(
            [[1.0, 2.0, 3.0, 4.0], [1.0, torch.inf, 3.0, 4.0], [0.0, 0.0, 5.0, 5.0]]
        ),
        scores=torch.tensor([torch.nan, 0.5, 0.25]),
        labels=torch.tensor([0, 1, 2]),
        masks=torch.ones(3, 28, 28),
    )
    target = dict(size=(8, 8), original_size=(8, 8), image_id=4, annotations=[])
    task, batch = DetectionTask(3), (torch.rand(1, 3, 8, 8), [target])
    (found,) = task.predict(Fixed([output]), batch)
    assert (found["bad"], found["labels"].tolist(), len(found["masks"])) == (2, [2], 1)
    evaluator = task.evaluator()
    evaluator.update([found], batch)
    with pytest.raises(FloatingPointError, match="1 of 1 images"):
        evaluator.compute()


def test_a_prediction_is_scored_and_described():
    boxes = torch.tensor([[4.0, 4.0, 12.0, 12.0]])
    output = dict(
        boxes=boxes,
        scores=torch.tensor([0.9]),
        labels=torch.tensor([1]),
        masks=torch.ones(1, 28, 28),
    )
    polygon = [[8, 8, 24, 8, 24, 24, 8, 24]]
    annotation = dict(category_id=1, bbox=[8, 8, 16, 16], area=256, iscrowd=0, segmentation=polygon)
    target = dict(size=(16, 16), original_size=(32, 32), image_id=1, annotations=[annotation])
    task = DetectionTask(2, evaluator="pycocotools")
    batch = (torch.rand(1, 3, 16, 16), [target])
    evaluator = task.evaluator(classes=["cat", "dog"], category_ids=[5, 6])
    evaluator.update(task.predict(Fixed([output]), batch), batch)
    metrics = evaluator.compute()
    assert metrics[task.metric] == 100
    assert evaluator.backend == "pycocotools"
    assert (evaluator.classes, evaluator.category_ids) == (["cat", "dog"], [5, 6])
    line = task.describe(metrics)
    assert line == (
        " * AP 100.000 AP50 100.000 AP75 100.000 mask AP 100.000 mask AP50 100.000 (1 images)"
    )
    assert task.describe({"images": 3}) == " * (3 images)"


def test_another_model_and_no_classes_are_refused():
    task = DetectionTask(1)
    task.check(Fixed(None))
    with pytest.raises(ValueError, match="TASK='detection' cannot train Linear, which is made for"):
        task.check(nn.Linear(1, 1))
    other = Fixed(None)
    other.task = "segmentation"
    with pytest.raises(ValueError, match="cannot train Fixed, which is made for segmentation"):
        task.check(other)
    with pytest.raises(ValueError, match=r"MODEL.NUM_CLASSES=0: detection needs at least 1"):
        DetectionTask(0)


def test_the_config_names_the_evaluator(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, expected in (("auto", "pycocotools"), ("pycocotools", "pycocotools")):
        config = SimpleNamespace(TEST=SimpleNamespace(DETECTION=SimpleNamespace(EVALUATOR=name)))
        assert build_task(config, 4).evaluator().backend == expected
    config.TEST.DETECTION.EVALUATOR = "faster"
    with pytest.raises(ValueError, match="pip install faster-coco-eval"):
        build_task(config, 4)


def test_a_picture_shows_what_is_there_beside_what_was_found():
    image = torch.full((3, 60, 80), 100, dtype=torch.uint8)
    polygon = [[20, 30, 50, 30, 50, 55, 20, 55]]
    annotations = [
        dict(category_id=0, bbox=[20, 30, 30, 25], area=750, iscrowd=0, segmentation=polygon),
        dict(category_id=2, bbox=[0, 0, 80, 60], area=4800, iscrowd=1, segmentation=polygon),
    ]
    boxes = torch.tensor([[60.0, 35.0, 75.0, 50.0], [5.0, 5.0, 15.0, 50.0]])
    found = dict(
        boxes=boxes,
        scores=torch.tensor([0.9, 0.2]),
        labels=torch.tensor([1, 2]),
        masks=encode_masks(torch.ones(2, 28, 28), boxes, (60, 80)),
    )
    task, target = DetectionTask(3), dict(annotations=annotations)
    picture = task.picture(image, found, target, classes=["a", "b", "c"])
    assert picture.shape == (3, 60, 168)
    left, right = picture[:, :, :80], picture[:, :, 88:]
    first, second, third = (torch.tensor(colour) for colour in palette(3))
    assert torch.equal(left[:, 54, 35], first)
    assert torch.equal(right[:, 49, 70], second)
    assert right[:, 42, 67].tolist() == pytest.approx(((100 + second) / 2).tolist(), abs=1)
    assert left[:, 42, 35].tolist() == pytest.approx(((100 + first) / 2).tolist(), abs=1)
    assert (left[:, 55:] == 100).all(), "no crowd"
    assert (right[:, :, :20] == 100).all(), "too low a score"
    low = task.picture(image, found, target, threshold=0.1)[:, :, 88:]
    assert torch.equal(low[:, 49, 10], third)
    plain = {name: value for name, value in found.items() if name != "masks"}
    assert (task.picture(image, plain, target)[:, 42, [35, 155]] == 100).all()
