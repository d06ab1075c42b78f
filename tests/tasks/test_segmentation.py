"""Losses, predictions and scores of segmentation, on models whose output is known and on a small real one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from config import load_config
from engine import evaluate
from models import CONFIG_DIR, create_model
from models.heads import DenseModel
from models.heads.pixels import MAX_CLASSES
from models.heads.semantic_fpn import SemanticFPN
from tasks import build_task
from tasks.segmentation import SegmentationTask
from tasks.windows import Looks
from tests.small_models import SMALL
from utils.amp import Amp


class Known(nn.Module):
    """Quarter-size logits that are the means of an image's channels; knows losses of its own."""

    task = "segmentation"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images, targets=None):
        logits = F.avg_pool2d(images, 4) * self.scale
        if not self.training:
            return logits
        return {"seg": logits.square().mean(), "aux": 0.4 * logits.mean()}

    def aux_losses(self):
        return {"budget": self.scale * 3}


def eval_batch(size, original, classes=3, padded=(64, 96)):
    """One image with the channel of the class switched on, and its mask at the original size."""
    mask = torch.zeros(original, dtype=torch.int64)
    mask[: original[0] // 2] = 1
    mask[:, : original[1] // 3] = 2
    shown = F.interpolate(mask[None, None].float(), size, mode="nearest")[0, 0].long()
    image = torch.zeros(classes, *padded)
    image[:, : size[0], : size[1]] = F.one_hot(shown, classes).permute(2, 0, 1).float()
    target = dict(size=size, original_size=original, image_id=5, file="5.png", mask=mask)
    return image[None], [target]


def test_the_loss_is_the_sum_of_the_heads_and_the_models_own():
    images, model = torch.rand(2, 3, 8, 8), Known()
    losses = SegmentationTask(3).losses(model, (images, [{}, {}]))
    logits = F.avg_pool2d(images, 4)
    assert set(losses) == {"loss", "loss_seg", "loss_aux", "loss_budget"}
    assert losses["loss_budget"].item() == 3
    expected = logits.square().mean() + 0.4 * logits.mean() + 3
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("size", [(64, 96), (52, 61)])
@pytest.mark.parametrize("original", [(64, 96), (130, 153), (31, 40)])
@torch.no_grad()
def test_labels_come_back_at_the_original_size(size, original):
    """Trap: padding that is not cut off shifts all labels towards the top left."""
    images, targets = eval_batch(size, original)
    (labels,) = SegmentationTask(3).predict(Known().eval(), (images, targets))
    assert labels.shape == original
    wrong = (labels != targets[0]["mask"]).float().mean()
    assert wrong < 0.1, f"{wrong:.1%} of the pixels are wrong, more than the borders of stride 4"


@torch.no_grad()
def test_every_image_of_a_batch_is_predicted_alone():
    batches = [eval_batch((64, 96), (64, 96)), eval_batch((40, 50), (80, 100))]
    images = torch.cat([images for images, _ in batches])
    targets = [target for _, (target,) in batches]
    model, task = Known().eval(), SegmentationTask(3)
    together = task.predict(model, (images, targets))
    for labels, batch in zip(together, batches, strict=True):
        assert torch.equal(labels, task.predict(model, batch)[0])


def test_the_picture_shows_labels_predictions_and_their_names():
    _, (target,) = eval_batch((64, 96), (64, 96))
    target["mask"][0] = 255
    image = torch.full((3, 64, 96), 128, dtype=torch.uint8)
    found = torch.full((64, 96), 1, dtype=torch.uint8)
    picture = SegmentationTask(3).picture(image, found, target, ["sky", "road", "car"])
    truth, prediction = picture[:, :64, :96], picture[:, :64, 104:200]
    assert truth[:, 0].eq(128).all(), "the image where a pixel does not count"
    assert len(truth[:, 1:].flatten(1).unique(dim=1).T) == 3
    assert len(prediction.flatten(1).unique(dim=1).T) == 1
    assert picture.shape[2] > 208, "names of the classes"


def squares(count, size, seed):
    """Images with a red and a green square on noise, and masks 1, 2, 0, with a border that is ignored."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, *size, generator=generator) * 0.5
    masks = torch.zeros(count, *size, dtype=torch.int64)
    for image, mask in zip(images, masks, strict=True):
        for label in (1, 2):
            top, left = (torch.randint(side - 28, (), generator=generator).item() for side in size)
            area = (slice(top, top + 28), slice(left, left + 28))
            mask[area] = label
            image[:, *area] = 0
            image[label - 1][area] = 2
        mask[:2] = 255
    return images, masks


def small_segmenter(classes=3):
    name, options = SMALL["pvt"]
    backbone = create_model(name, **options, num_classes=0, drop_path_rate=0.0)
    head = SemanticFPN(backbone.feature_info, classes, fpn_channels=16, channels=16, dropout=0.0)
    return DenseModel(backbone, None, head, "segmentation")


def test_a_few_images_can_be_learnt_by_heart():
    images, masks = squares(4, (64, 96), seed=1)
    model, task = small_segmenter(), SegmentationTask(3)
    task.check(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model.train()
    targets = [dict(mask=mask) for mask in masks]
    for _ in range(80):
        loss = task.losses(model, (images, targets))["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    size = dict(size=(64, 96), original_size=(64, 96))
    batches = [
        (image[None], [dict(**size, mask=mask, image_id=number)])
        for number, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    metrics = evaluate(model, task, batches, device=torch.device("cpu"), amp=Amp(enabled=False))
    assert metrics["images"] == 4
    assert metrics["mIoU"] > 90, task.describe(metrics)
    assert task.describe(metrics).startswith(f" * mIoU {metrics['mIoU']:.2f} mAcc")


def test_a_batch_without_a_pixel_that_counts_trains_nothing():
    model, task = small_segmenter().train(), SegmentationTask(3)
    targets = [dict(mask=torch.full((64, 64), 255)) for _ in range(2)]
    before = copy.deepcopy(dict(model.named_parameters()))
    losses = task.losses(model, (torch.rand(2, 3, 64, 64), targets))
    losses["loss"].backward()
    assert losses["loss"].item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(), True),
        (dict(scales=(0.5,)), True),
        (dict(flip=True), False),
        (dict(scales=(0.5, 1.0)), False),
        (dict(mode="slide", crop=(32, 32), stride=(32, 32)), False),
    ],
)
def test_what_a_model_tells_of_an_image_is_left_out_where_it_looked_several_times(options, told):
    """It would be that of the last window, scale or mirror image."""

    class Telling(Known):
        def forward(self, images, targets=None):
            self.seen = images.sum((1, 2, 3))
            return super().forward(images, targets)

        def image_values(self):
            return {"seen": self.seen}

    task = SegmentationTask(3, Looks(**options))
    batches = [eval_batch((64, 96), (64, 96))]
    scores = evaluate(Telling(), task, batches, device=torch.device("cpu"), amp=Amp())
    assert ("seen_mean" in scores) is told
    assert scores["images"] == 1


def test_models_of_another_task_are_refused():
    SegmentationTask(3).check(Known())
    with pytest.raises(ValueError, match="TASK='segmentation' cannot train Linear"):
        SegmentationTask(3).check(nn.Linear(2, 2))


@pytest.mark.parametrize("classes", [1, 255])
def test_numbers_of_classes_that_masks_cannot_hold_are_refused(classes):
    with pytest.raises(
        ValueError, match=f"NUM_CLASSES={classes}: segmentation needs from 2 to 254"
    ):
        SegmentationTask(classes)
    SegmentationTask(MAX_CLASSES)


def test_the_config_says_how_images_are_looked_at(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(
        f"BASE: [{CONFIG_DIR / '_base_' / 'dense.yaml'}]\n"
        "TASK: segmentation\n"
        "DATA: {SIZE_DIVISOR: 16}\n"
        "MODEL: {HEAD: {TYPE: semantic_fpn}}\n"
        "TEST: {SEGMENTATION: {MODE: slide, CROP: [96, 128], STRIDE: [64, 96],"
        " SCALES: [0.5, 1.0], FLIP: True}}\n"
    )
    looks = build_task(load_config(path), 7).looks
    assert vars(looks) == dict(
        slides=True, crop=(96, 128), stride=(64, 96), scales=(0.5, 1.0), flip=True, divisor=16
    )
    with pytest.raises(ValueError, match=r"STRIDE=\[64, 129\] leaves gaps"):
        build_task(load_config(path, ["TEST.SEGMENTATION.STRIDE", [64, 129]]), 7)
