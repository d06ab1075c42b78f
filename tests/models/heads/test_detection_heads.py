"""What every detection head keeps to: losses, detections, padding, counting, precision, compilation."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from models.heads.registry import find_head
from tasks.detection import DetectionTask

FEATURES = [dict(channels=8 * 2**i, stride=4 * 2**i) for i in range(4)]
RCNN = dict(
    fpn_channels=16, fc_dim=32, roi_batch=32, rpn_candidates=(100, 100), rpn_proposals=(40, 40)
)
HEADS = {
    "retinanet": dict(fpn_channels=16, num_convs=1),
    "retinanet-group": dict(fpn_channels=16, num_convs=2, norm="group", soft_nms="linear"),
    "faster_rcnn": RCNN,
    "mask_rcnn": RCNN | dict(soft_nms="gaussian"),
    "cascade_rcnn": RCNN,
    "cascade_mask_rcnn": RCNN,
}


class Detector(nn.Module):
    """Four convolutions below a head of three classes."""

    def __init__(self, name: str, **options):
        super().__init__()
        widths = [3] + [f["channels"] for f in FEATURES]
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, *((4, 4) if i == 0 else (3, 2, 1))),
                nn.GroupNorm(4, width),
                nn.ReLU(),
            )
            for i, (before, width) in enumerate(pairwise(widths))
        )
        entry = find_head(name.split("-")[0], "detection")
        self.head = entry.cls(FEATURES, 3, **HEADS[name] | options)

    def forward(self, images, targets=None):
        maps, x = [], images
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return self.head(maps, images, targets)


def make_target(boxes: list[list[int]], labels: list[int], hw: tuple[int, int], size=None) -> dict:
    """A target with a mask that fills each box but for its lower right quarter."""
    masks = torch.zeros(len(boxes), *hw, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
        mask[(y1 + y2) // 2 : y2, (x1 + x2) // 2 : x2] = False
    return dict(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=masks,
        size=size or hw,
    )


HW = (64, 96)
FULL = make_target([[10, 12, 42, 50], [50, 20, 90, 60]], [0, 2], HW)
EMPTY = make_target([], [], HW, size=(50, 70))


@pytest.fixture(params=HEADS)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("with_boxes", [2, 1, 0])
def test_every_parameter_gets_a_finite_gradient_with_and_without_boxes(name, with_boxes):
    model = Detector(name)
    losses = model(torch.randn(2, 3, *HW), ([FULL] * with_boxes + [EMPTY] * 2)[:2])
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad
    if with_boxes:
        assert all(p.grad.any() for n, p in model.head.named_parameters() if "weight" in n)


def test_losses_have_the_names_of_their_parts(name):
    losses = Detector(name)(torch.randn(1, 3, *HW), [FULL])
    parts = ["cls", "box"] + ["mask"] * ("mask" in name)
    if "retinanet" in name:
        expected = parts
    elif "cascade" in name:
        expected = [f"{part}_{i}" for part in parts for i in range(3)]
    else:
        expected = parts
    rpn = [] if "retinanet" in name else ["rpn_cls", "rpn_box"]
    assert sorted(losses) == sorted(expected + rpn)


def detect(model: nn.Module, images: torch.Tensor, targets=None) -> list[dict]:
    with torch.no_grad():
        return model.eval()(images, targets)


def test_nan_is_not_nothing_found(name):
    """Comparisons with nan are false: a broken model would find nothing, and score 0 without an error."""
    model = Detector(name, score_threshold=0.005).eval()
    images = torch.randn(3, 3, *HW)
    images[1] = torch.nan  # what an overflow leaves
    target = dict(size=HW, original_size=HW)
    with torch.no_grad():
        found = DetectionTask(3).predict(model, (images, [target] * 3))
    assert [image["bad"] > 0 for image in found] == [False, True, False]


def test_nan_of_the_box_head_is_seen(name):
    if "retinanet" in name:
        pytest.skip("has one head")
    model = Detector(name, score_threshold=0.005).eval()
    with torch.no_grad():
        model.head.box_heads[-1].cls.bias.fill_(torch.nan)
        (found,) = DetectionTask(3).predict(
            model, (torch.randn(1, 3, *HW), [dict(size=HW, original_size=HW)])
        )
    assert found["bad"] > 0


@pytest.mark.parametrize("sizes", [None, [(64, 96), (33, 47)]])
def test_detections_have_the_agreed_form(name, sizes):
    model = Detector(name, score_threshold=0.005, detections_per_image=30)
    targets = sizes and [dict(size=size) for size in sizes]
    detections = detect(model, torch.randn(2, 3, *HW), targets)
    assert len(detections) == 2
    for found, (h, w) in zip(detections, sizes or [HW, HW], strict=True):
        boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
        n = len(boxes)
        assert 0 < n <= 30
        assert (boxes.shape, scores.shape, labels.shape) == ((n, 4), (n,), (n,))
        assert (boxes.dtype, scores.dtype, labels.dtype) == (
            torch.float32,
            torch.float32,
            torch.int64,
        )
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([w, h])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (scores[:-1] >= scores[1:]).all()
        assert 0 < scores[-1] <= scores[0] <= 1
        assert set(labels.tolist()) <= {0, 1, 2}
        assert len(set(labels.tolist())) > 1
        assert ("masks" in found) == ("mask" in name)
        if "masks" in found:
            assert found["masks"].shape == (n, 28, 28)
            assert (found["masks"] > 0).all()
            assert (found["masks"] < 1).all()


def test_no_detection_above_the_threshold_gives_empty_tensors(name):
    (found,) = detect(Detector(name, score_threshold=0.999), torch.randn(1, 3, *HW))
    assert found["boxes"].shape == (0, 4)
    assert found["scores"].shape == found["labels"].shape == (0,)
    if "mask" in name:
        assert found["masks"].shape == (0, 28, 28)


def test_padding_for_other_images_never_yields_a_box(name):
    """What lies beyond the image padded alone shouts; nothing of it is heard."""
    images = torch.randn(1, 3, 64, 192)
    model = Detector(name, score_threshold=0.005)
    target = [dict(size=(64, 90))]
    before = detect(model, images, target)[0]
    assert (before["boxes"][:, 2] <= 90).all()
    # Outputs at the padding's positions of the single-stage head, or of the proposal network.
    output = model.head.cls_output if "retinanet" in name else model.head.rpn.head.cls_logits

    def shout(_module, _inputs, x):
        x = x.clone()
        x[..., -(-x.shape[-1] // 2) :] = 50.0
        return x

    handle = output.register_forward_hook(shout)
    after = detect(model, images, target)[0]
    handle.remove()
    assert len(before["boxes"])
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)


def test_counting_runs_on_the_meta_device(name):
    with torch.device("meta"):
        model = Detector(name).eval()
        images = torch.empty(1, 3, 128, 160)
    with model.head.counting(), FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = model(images)
    total = counter.get_flop_counts()["Detector.head"]
    if "retinanet" in name:
        assert len(outputs) == 2
        return
    # 1000 proposals through two layers and the outputs, 100 through the mask head, per stage.
    stages = 3 if "cascade" in name else 1
    shared = 16 * 49 * 32 + 32 * 32
    outputs = 32 * (4 + (4 if "cascade" in name else 12))
    boxes = 2 * 1000 * (shared + outputs) * stages
    counts = counter.get_flop_counts()
    parts = [f"Detector.head.box_heads.{i}" for i in range(stages)]
    assert sum(sum(counts[part].values()) for part in parts) == boxes
    if "mask" in name:
        convs = 16 * 16 * 9 * 14**2 * 4
        masks = 2 * 100 * (convs + 16 * 16 * 28**2 + 16 * 3 * 28**2) * stages
        parts = [f"Detector.head.mask_heads.{i}" for i in range(stages)]
        assert sum(sum(counts[part].values()) for part in parts) == masks
    assert sum(total.values()) > boxes


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    # As detection papers print them for a ResNet-50 at 1280 x 800 (37.7 M and 239 G, 44.2 M and 260 G), less
    # what its backbone has: 23.28 M trained parameters, and 83.9 GMACs.
    [("retinanet", 37.74 - 23.28, 239 - 83.9), ("mask_rcnn", 44.18 - 23.28, 260 - 83.9)],
)
def test_published_detectors_count_what_papers_print(name, params, gmacs):
    features = [dict(channels=256 * 2**i, stride=4 * 2**i) for i in range(4)]
    with torch.device("meta"):
        head = find_head(name, "detection").cls(features, 80).eval()
        images = torch.empty(1, 3, 800, 1280)
        maps = [
            torch.empty(1, f["channels"], 800 // f["stride"], 1280 // f["stride"]) for f in features
        ]
    with head.counting(), FlopCounterMode(display=False) as counter, torch.no_grad():
        head(maps, images)
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(params, abs=0.02)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=1.5)


def test_after_counting_detections_come_again(name):
    model = Detector(name).eval()
    images = torch.randn(1, 3, *HW)
    with torch.no_grad(), model.head.counting():
        assert not isinstance(model(images), list)
    assert isinstance(detect(model, images)[0], dict)


def test_bfloat16_autocast_gives_float32_losses_and_boxes(name):
    model = Detector(name, score_threshold=0.005)
    images = torch.randn(2, 3, *HW)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, [FULL, EMPTY])
        found = detect(model, images)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    dtypes = {key: value.dtype for key, value in found[0].items()}
    assert dtypes.pop("labels") == dtypes.pop("bad") == torch.int64
    assert set(dtypes.values()) == {torch.float32}
    assert len(found[0]["boxes"])


def test_channels_last_changes_nothing(name):
    model = Detector(name, score_threshold=0.005)
    images = torch.randn(2, 3, *HW)
    torch.manual_seed(1)
    losses, found = model(images, [FULL, EMPTY]), detect(model, images)
    model = model.to(memory_format=torch.channels_last).train()
    images = images.to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    again, found_again = model(images, [FULL, EMPTY]), detect(model, images)
    for key, value in losses.items():
        torch.testing.assert_close(again[key], value, rtol=1e-3, atol=1e-4)
    for key in ("boxes", "scores"):
        torch.testing.assert_close(found_again[0][key], found[0][key], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "prefix"), [("retinanet", ""), ("faster_rcnn", "rpn_"), ("cascade_mask_rcnn", "rpn_")]
)
def test_background_that_overlaps_more_than_objects_is_refused(name, prefix):
    bounds = {f"{prefix}negative_iou": 0.6, f"{prefix}positive_iou": 0.5}
    upper = prefix.upper()
    with pytest.raises(ValueError, match=rf"{upper}NEGATIVE_IOU=0.6 .* {upper}POSITIVE_IOU=0.5"):
        Detector(name, **bounds)
    Detector(name, **dict.fromkeys(bounds, 0.5))


# After a graph break, the compiler itself looks at gradients of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", ["retinanet", "cascade_mask_rcnn"])
def test_a_compiled_model_trains_and_detects_the_same(name):
    model = Detector(name, score_threshold=0.005)
    images = torch.randn(1, 3, *HW)
    torch.manual_seed(1)
    losses, found = model(images, [FULL]), detect(model, images)
    compiled = torch.compile(model.train(), backend="eager")
    torch.manual_seed(1)
    again = compiled(images, [FULL])
    sum(again.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    for key, value in losses.items():
        torch.testing.assert_close(again[key], value)
    for key, value in detect(compiled, images)[0].items():
        torch.testing.assert_close(value, found[0][key])
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "steps"), [("retinanet-group", 80), ("mask_rcnn", 80), ("cascade_rcnn", 80)]
)
def test_one_image_is_learned_by_heart(name, steps):
    rcnn = dict(fc_dim=128, roi_positive_fraction=0.5)
    options = dict(fpn_channels=32) if "retinanet" in name else rcnn
    model = Detector(name, soft_nms="none", **options)
    images = torch.zeros(1, 3, *HW)
    for box, label in zip(FULL["boxes"].int().tolist(), FULL["labels"].tolist(), strict=True):
        x1, y1, x2, y2 = box
        images[0, label, y1:y2, x1:x2] = 1
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        sum(model(images, [FULL]).values()).backward()
        optimizer.step()
    (found,) = detect(model, images, [dict(size=HW)])
    order = found["labels"][:2].argsort()
    assert found["labels"][:2][order].tolist() == [0, 2]
    assert (found["scores"][:2] > 0.5).all()
    iou = box_iou(found["boxes"][:2][order], FULL["boxes"]).diagonal()
    assert (iou > 0.75).all(), iou
    if "masks" in found:
        masks = found["masks"][:2] > 0.5
        right = torch.ones(28, 28, dtype=torch.bool)
        right[14:, 14:] = False
        assert (masks == right).float().mean() > 0.9
