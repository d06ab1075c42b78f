"""Boxes, masks and labels stay with their objects, whatever is done to the image."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate
from torchvision import tv_tensors

from data.dense.detection import (
    DetectionSample,
    RandomSidesCrop,
    ResizeShortest,
    decode_masks,
    eval_transform,
    resize_masks,
    train_transform,
)
from tests.data.coco_files import run_lengths

examples = settings(max_examples=80)

DARK, BRIGHT = 30, 220


def stored(masks, size, crowd=(), **changes):
    """What a format stores for these masks (N, H, W); labels count the objects, so each can be followed."""
    boxes = np.array([tight(mask) for mask in masks], np.float32).reshape(-1, 4)
    found = dict(
        boxes=boxes,
        labels=np.arange(len(masks)),
        iscrowd=np.isin(np.arange(len(masks)), crowd),
        masks=[run_lengths(mask) for mask in masks],
        annotations=[dict(id=1 + number) for number in range(len(masks))],
        image_id=7,
        file="7.png",
        size=tuple(size),
    )
    return found | changes


def tight(mask):
    """The box xyxy around the pixels of a mask."""
    rows, columns = np.nonzero(np.asarray(mask))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def rectangle(size, box):
    mask = np.zeros(size, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def ellipse(size, box):
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    return (2 * x - box[0] - box[2]) ** 2 / (box[2] - box[0]) ** 2 + (
        2 * y - box[1] - box[3]
    ) ** 2 / (box[3] - box[1]) ** 2 <= 1


@st.composite
def pictures(draw, most=4, least_side=1, shapes=(rectangle, ellipse), low=6, high=70):
    """Pixels (H, W, 3) with bright objects, and the masks of these."""
    size = draw(st.integers(low, high)), draw(st.integers(low, high))
    masks = []
    for _ in range(draw(st.integers(0, most))):
        spans = []
        for length in (size[1], size[0]):
            start = draw(st.integers(0, length - least_side))
            spans.append((start, draw(st.integers(start + least_side, length))))
        box = [spans[0][0], spans[1][0], spans[0][1], spans[1][1]]
        masks.append(draw(st.sampled_from(shapes))(size, box))
    masks = [mask for mask in masks if mask.any()]
    pixels = np.full((*size, 3), DARK, np.uint8)
    for mask in masks:
        pixels[mask] = BRIGHT
    return pixels, masks


def sample(transform, pixels, masks, seed=0, training=True, with_masks=True, **changes):
    torch.manual_seed(seed)
    target = stored(masks, pixels.shape[:2], **changes)
    return DetectionSample(transform, training, with_masks)(pixels, target)


def assert_consistent(image, target):
    """What holds of every sample: types, counts, boxes within the image."""
    count = len(target["labels"])
    assert image.dtype == torch.uint8
    assert image.shape[1:] == target["size"]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64
    assert target["boxes"].shape == (count, 4)
    assert type(target["boxes"]) is type(image) is torch.Tensor
    height, width = target["size"]
    x, y = target["boxes"][:, 0::2], target["boxes"][:, 1::2]
    assert ((x >= 0) & (x <= width)).all()
    assert ((y >= 0) & (y <= height)).all()
    assert (x.diff() >= 1).all()
    assert (y.diff() >= 1).all()
    if "masks" in target:
        assert target["masks"].dtype == torch.bool
        assert target["masks"].shape == (count, height, width)
        assert target["masks"].flatten(1).sum(dim=1).ge(1).all()


recipes = st.fixed_dictionaries(
    dict(
        short_sides=st.lists(st.integers(8, 90), min_size=1, max_size=3),
        long_side=st.integers(8, 120),
        hflip=st.sampled_from([0.0, 0.5, 1.0]),
        photometric=st.booleans(),
    )
)


@examples
@given(pictures(), recipes, st.integers(0, 10**6))
def test_boxes_and_masks_are_resized_by_the_real_ratio_and_flipped(picture, recipe, seed):
    pixels, masks = picture
    image, target = sample(train_transform(**recipe), pixels, masks, seed)
    assert_consistent(image, target)
    height, width = pixels.shape[:2]
    ratio = np.array([image.shape[2] / width, image.shape[1] / height] * 2)
    before = np.array([tight(mask) for mask in masks]).reshape(-1, 4)
    straight = before * ratio
    mirrored = np.stack(
        [
            image.shape[2] - straight[:, 2],
            straight[:, 1],
            image.shape[2] - straight[:, 0],
            straight[:, 3],
        ],
        axis=1,
    )
    allowed = {0.0: [straight], 0.5: [straight, mirrored], 1.0: [mirrored]}[recipe["hflip"]]
    kept = target["labels"].numpy()
    assert any(np.allclose(target["boxes"], boxes[kept], atol=1e-3) for boxes in allowed)
    # Only what became less than a pixel wide or high may be gone, or a mask that lies between the pixels.
    large = np.flatnonzero((straight[:, 2:] - straight[:, :2] >= 2).all(axis=1))
    assert set(large) <= set(kept.tolist())


@examples
@given(pictures(least_side=3, shapes=[rectangle]), recipes, st.integers(0, 10**6))
def test_a_mask_fills_its_box_to_half_a_pixel(picture, recipe, seed):
    pixels, masks = picture
    _, target = sample(train_transform(**recipe), pixels, masks, seed)
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        assert np.abs(np.array(tight(mask)) - box.numpy()).max() <= 0.5 + 1e-3


@examples
@given(
    pictures(least_side=12, low=40),
    st.lists(st.integers(40, 90), min_size=1, max_size=2),
    st.integers(0, 10**6),
)
def test_a_mask_stays_in_its_box_and_covers_it(picture, short_sides, seed):
    pixels, masks = picture
    transform = train_transform(short_sides=short_sides, long_side=200)
    _, target = sample(transform, pixels, masks, seed)
    assert target["labels"].tolist() == list(range(len(masks)))
    for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
        assert iou(tight(mask), box) > 0.75


def iou(a, b):
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


@examples
@given(
    pictures(least_side=2),
    st.integers(20, 60),
    st.integers(10, 40),
    st.integers(0, 20),
    st.integers(0, 10**6),
)
def test_what_a_crop_leaves_of_an_object_keeps_its_box_mask_and_label(
    picture, short_side, least, more, seed
):
    pixels, masks = picture
    transform = train_transform(
        short_sides=[short_side],
        long_side=200,
        crop=True,
        crop_short_sides=[30, 50],
        crop_sides=[least, least + more],
    )
    image, target = sample(transform, pixels, masks, seed)
    assert_consistent(image, target)
    labels = target["labels"].tolist()
    assert labels == sorted(set(labels))
    # Half a pixel of the first resize grows with the second one; half a pixel more is the second's own.
    factor = short_side / min(least, 30, *pixels.shape[:2])
    slack = 0.5 * max(factor, 1) + 0.5 + 1e-3
    for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
        found = tight(mask)
        assert min(found[0] - box[0], found[1] - box[1]) >= -slack
        assert max(found[2] - box[2], found[3] - box[3]) <= slack


@examples
@given(pictures(most=1, least_side=10, low=24), st.booleans(), st.integers(0, 10**6))
def test_masks_and_boxes_lie_where_the_image_shows_the_object(picture, crop, seed):
    pixels, masks = picture
    transform = train_transform(
        short_sides=[60, 90],
        long_side=300,
        crop=crop,
        crop_short_sides=[40],
        crop_sides=[24, 36],
    )
    image, target = sample(transform, pixels, masks, seed)
    shown = image[0] > (DARK + BRIGHT) / 2
    for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
        if mask.sum() < 100:  # of a sliver the interpolated edge is all there is
            continue
        assert (shown & mask).sum() / (shown | mask).sum() > 0.7
        if not crop:
            assert iou(tight(shown), box) > 0.7


@examples
@given(pictures(), st.integers(0, 10**6))
def test_a_flip_of_a_flip_is_the_sample_itself(picture, seed):
    pixels, masks = picture
    straight = train_transform(short_sides=[min(pixels.shape[:2])], long_side=200, hflip=0.0)
    mirrored = train_transform(short_sides=[min(pixels.shape[:2])], long_side=200, hflip=1.0)
    image, target = sample(straight, pixels, masks, seed)
    once, turned = sample(mirrored, pixels, masks, seed)
    assert once.equal(image.flip(-1))
    assert turned["masks"].equal(target["masks"].flip(-1))
    width = image.shape[-1]
    again = torch.stack([width - turned["boxes"][:, 2], width - turned["boxes"][:, 0]], dim=1)
    assert again.equal(target["boxes"][:, 0::2])
    assert turned["boxes"][:, 1::2].equal(target["boxes"][:, 1::2])
    flipped_masks = [mask[:, ::-1] for mask in masks]
    back, target_back = sample(mirrored, np.ascontiguousarray(pixels[:, ::-1]), flipped_masks, seed)
    assert back.equal(image)
    assert target_back["boxes"].equal(target["boxes"])
    assert target_back["masks"].equal(target["masks"])


@examples
@given(pictures(), recipes, st.booleans(), st.integers(0, 10**6))
def test_a_sample_depends_on_its_seed_alone(picture, recipe, crop, seed):
    pixels, masks = picture
    crops = dict(crop=crop, crop_short_sides=[20, 40], crop_sides=[10, 30])
    one, other = train_transform(**recipe, **crops), train_transform(**recipe, **crops)
    image, target = sample(one, pixels, masks, seed)
    random.random()
    np.random.rand()
    sample(other, pixels[:5, :4], [], seed + 1)
    again, target_again = sample(other, pixels, masks, seed)
    assert again.equal(image)
    assert all(target_again[key].equal(target[key]) for key in ("boxes", "labels", "masks"))


def test_the_stored_image_and_target_stay_as_they_are():
    pixels = np.full((20, 30, 3), DARK, np.uint8)
    pixels.flags.writeable = False  # as PIL gives them
    masks = [rectangle((20, 30), [2, 3, 9, 11])]
    target = stored(masks, (20, 30))
    before = pickle.dumps(target)
    transform = train_transform(short_sides=[40], long_side=90, hflip=1.0, photometric=True)
    DetectionSample(transform, True, True)(pixels, target)
    assert pickle.dumps(target) == before


def test_short_sides_are_met_to_the_pixel_and_the_long_side_is_a_limit():
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(1, 1))
    for height in range(100, 700):
        image = tv_tensors.Image(torch.empty(3, height, 700, device="meta"))
        size = ResizeShortest([800], 1333).make_params([image, boxes])["size"]
        assert size[0] == 800 or size[1] == 1333
        assert max(size) <= 1333
        assert size[0] <= 800
        assert abs(size[1] / size[0] - 700 / height) < 0.03


def test_the_size_of_cocos_most_common_image_is_that_of_the_recipes():
    image, _ = sample(
        eval_transform(short_side=800, long_side=1333), np.zeros((480, 640, 3), np.uint8), []
    )
    assert image.shape == (3, 800, 1067)
    image, _ = sample(
        eval_transform(short_side=800, long_side=1333), np.zeros((300, 900, 3), np.uint8), []
    )
    assert image.shape == (3, 444, 1333)


def test_each_short_side_is_drawn_and_half_of_the_images_are_cropped():
    pixels = np.zeros((60, 60, 3), np.uint8)
    transform = train_transform(short_sides=[30, 40, 50], long_side=100)
    sides = [sample(transform, pixels, [], seed)[0].shape[1] for seed in range(60)]
    assert set(sides) == {30, 40, 50}
    transform = train_transform(
        short_sides=[40], long_side=400, crop=True, crop_short_sides=[60], crop_sides=[20, 50]
    )
    sizes = [sample(transform, pixels, [], seed)[0].shape[1:] for seed in range(200)]
    # A crop of 31 x 31 gives a square again; that is rare.
    assert 70 <= sum(size[0] != size[1] for size in sizes) <= 130


@examples
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 30))
def test_crops_lie_in_the_image_and_have_sides_in_the_range(height, width, least, more):
    image = tv_tensors.Image(torch.empty(3, height, width, device="meta"))
    params = RandomSidesCrop([least, least + more]).make_params([image])
    for start, length, side in (("top", "height", height), ("left", "width", width)):
        assert min(least, side) <= params[length] <= min(least + more, side)
        assert 0 <= params[start] <= side - params[length]


def test_crops_reach_every_side_and_corner():
    image = tv_tensors.Image(torch.empty(3, 9, 9, device="meta"))
    draws = [RandomSidesCrop([5, 7]).make_params([image]) for _ in range(300)]
    assert {d["height"] for d in draws} == {d["width"] for d in draws} == {5, 6, 7}
    assert {d["top"] for d in draws if d["height"] == 5} == {0, 1, 2, 3, 4}


@examples
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60), st.integers(0, 3)
)  # fmt: skip
def test_masks_are_resized_as_by_pytorch(height, width, new_height, new_width, count):
    masks = torch.randint(0, 2, (count, height, width), dtype=torch.uint8)
    found = resize_masks(masks, (new_height, new_width))
    assert found.shape == (count, new_height, new_width)
    # In float64 the centres of pixels are where they should be.
    rows, columns = (
        (((torch.arange(new, dtype=torch.float64) + 0.5) * old) / new + 1e-9).long()
        for old, new in ((height, new_height), (width, new_width))
    )
    assert found.equal(masks[:, rows][:, :, columns])
    if count and new_height == 2 * height and new_width == 2 * width:
        assert found.equal(
            interpolate(masks[None], (new_height, new_width), mode="nearest-exact")[0]
        )


def test_objects_that_a_crop_leaves_nothing_of_go_with_label_and_mask():
    size = (40, 40)
    masks = [rectangle(size, [1, 1, 4, 4]), rectangle(size, [18, 18, 22, 22])]
    transform = train_transform(
        short_sides=[20], long_side=40, hflip=0, crop=True, crop_short_sides=[40], crop_sides=[20, 20]
    )  # fmt: skip
    seen = set()
    for seed in range(60):
        _, target = sample(transform, np.zeros((*size, 3), np.uint8), masks, seed)
        assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"])
        seen.add(tuple(target["labels"].tolist()))
    assert seen == {(0, 1), (1,)}


def test_an_object_whose_mask_is_gone_goes_though_a_part_of_its_box_is_left():
    size = (20, 20)
    corner = rectangle(size, [0, 0, 20, 2]) | rectangle(size, [0, 0, 2, 20])  # an L
    target = stored([corner], size)
    crop = RandomSidesCrop([10, 10])
    crop.make_params = lambda _inputs: dict(top=10, left=10, height=10, width=10)
    pixels = np.zeros((*size, 3), np.uint8)
    assert len(DetectionSample(crop, True, False)(pixels, target)[1]["boxes"]) == 1
    found = DetectionSample(crop, True, True)(pixels, target)[1]
    assert len(found["boxes"]) == len(found["labels"]) == len(found["masks"]) == 0


def test_boxes_without_area_are_dropped():
    boxes = np.array([[3, 3, 3, 9], [3, 3, 9, 9], [-5, -5, 0, 9]], np.float32)
    target = stored([], (20, 20), boxes=boxes, labels=np.arange(3), iscrowd=np.zeros(3, bool))
    found = DetectionSample(eval_transform(short_side=20, long_side=20), True, False)(
        np.zeros((20, 20, 3), np.uint8), target
    )[1]
    assert found["labels"].tolist() == [1]


def test_crowds_are_left_out_in_training_only():
    size = (20, 30)
    masks = [rectangle(size, [i, i, i + 9, i + 5]) for i in range(3)]
    pixels = np.zeros((*size, 3), np.uint8)
    transform = eval_transform(short_side=20, long_side=30)
    _, target = sample(transform, pixels, masks, crowd=[1])
    assert target["labels"].tolist() == [0, 2]
    assert len(target["masks"]) == 2
    assert "annotations" not in target
    _, target = sample(transform, pixels, masks, crowd=[1], training=False)
    assert target["labels"].tolist() == [0, 1, 2]
    assert [entry["id"] for entry in target["annotations"]] == [1, 2, 3]


@pytest.mark.parametrize("training", [False, True])
def test_an_image_without_objects_is_a_sample_like_others(training):
    transform = train_transform(
        short_sides=[24], long_side=90, crop=True, crop_short_sides=[30], crop_sides=[10, 20]
    )
    for seed in range(5):
        image, target = sample(transform, np.zeros((20, 30, 3), np.uint8), [], seed, training)
        assert_consistent(image, target)
        assert target["boxes"].shape == (0, 4)
        assert ("masks" in target) == training
        if training:
            assert target["masks"].shape == (0, *image.shape[1:])


def test_a_target_says_where_it_comes_from():
    transform = eval_transform(short_side=10, long_side=90)
    image, target = sample(transform, np.zeros((20, 30, 3), np.uint8), [])
    assert target["size"] == image.shape[1:] == (10, 15)
    assert target["original_size"] == (20, 30)
    assert (target["image_id"], target["file"]) == (7, "7.png")


def test_masks_that_nobody_wants_are_not_decoded():
    target = stored([rectangle((20, 30), [1, 1, 9, 9])], (20, 30)) | dict(masks=None)
    transform = eval_transform(short_side=20, long_side=90)
    _, found = DetectionSample(transform, True, False)(np.zeros((20, 30, 3), np.uint8), target)
    assert "masks" not in found
    assert len(found["boxes"]) == 1
    # Nor in evaluation, which has the annotations.
    _, found = DetectionSample(transform, False, True)(np.zeros((20, 30, 3), np.uint8), target)
    assert "masks" not in found


def test_an_image_of_another_size_than_its_annotations_is_an_error():
    sample_of = DetectionSample(eval_transform(short_side=20, long_side=90), True, False)
    with pytest.raises(ValueError, match=r"7\.png has \[30, 20\] pixels.* for \[20, 30\]"):
        sample_of(np.zeros((30, 20, 3), np.uint8), stored([], (20, 30)))


def test_photometric_distortion_changes_colours_and_nothing_else():
    pixels = np.full((20, 30, 3), 128, np.uint8)
    masks = [rectangle((20, 30), [1, 1, 9, 9])]
    plain = train_transform(short_sides=[20], long_side=90, hflip=0)
    distorted = train_transform(short_sides=[20], long_side=90, hflip=0, photometric=True)
    image, target = sample(plain, pixels, masks)
    assert image.eq(128).all()
    changed = 0
    for seed in range(10):
        other, other_target = sample(distorted, pixels, masks, seed)
        assert other_target["boxes"].equal(target["boxes"])
        assert other_target["masks"].equal(target["masks"])
        changed += not other.equal(image)
    assert changed >= 5


def test_samples_can_be_sent_to_workers():
    transform = train_transform(
        short_sides=[20], long_side=90, crop=True, crop_short_sides=[30], photometric=True
    )
    made = DetectionSample(transform, True, True)
    again = pickle.loads(pickle.dumps(made))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    target = stored([rectangle((20, 30), [1, 1, 9, 9])], (20, 30))
    torch.manual_seed(1)
    one = made(pixels, target)
    torch.manual_seed(1)
    other = again(pixels, target)
    assert one[0].equal(other[0])


def test_polygons_and_both_kinds_of_run_lengths_are_the_same_mask():
    mask = rectangle((20, 30), [3, 4, 11, 9])
    packed = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    text = dict(size=packed["size"], counts=packed["counts"].decode("ascii"))
    polygons = [[3, 4, 7, 4, 7, 9, 3, 9], [7, 4, 11, 4, 11, 9, 7, 9]]  # two parts
    found = decode_masks([run_lengths(mask), text, packed, polygons], (20, 30))
    assert found.shape == (4, 20, 30)
    assert all((part == mask).all() for part in found)
    assert decode_masks([], (20, 30)).shape == (0, 20, 30)


def test_run_lengths_of_another_size_are_an_error():
    segmentation = run_lengths(np.ones((4, 5), bool))
    with pytest.raises(ValueError, match=r"a mask has the size \[4, 5\], its image \[5, 4\]"):
        decode_masks([segmentation], (5, 4))
