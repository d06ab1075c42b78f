"""What happens to an image and its mask on the way into a batch of segmentation."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from data.dense.loader import pad_to_batch
from data.dense.segmentation import (
    CROP_TRIES,
    BalancedCrop,
    PhotometricDistortion,
    RandomRescale,
    SegmentationSample,
    eval_transform,
    rescaled_size,
    train_transform,
)
from data.loader import preserved_rng, seed_rng
from data.registry import create_dataset
from tests.data.segmentation_files import blocks, colour_of, write_ade

LABELS = (0, 1, 2, 3, 255)


def stored(mask):
    return dict(mask=mask, image_id="a", file="a.jpg")


def make(transform, pixels, mask, seed=0, training=True):
    """The sample of a seed: image (C, H, W), target."""
    with preserved_rng():
        seed_rng(0, seed)
        return SegmentationSample(transform, training)(pixels, stored(mask))


def wrapped(mask):
    """An image in the colours of a mask, and the mask, as transforms take them."""
    image = tv_tensors.Image(torch.from_numpy(colour_of(mask)).permute(2, 0, 1))
    return image, dict(mask=tv_tensors.Mask(torch.from_numpy(mask)[None]))


def inside(mask, reach):
    """Where all pixels of a window around one have its label: bool (H, W), False at the border."""
    kernel = np.ones((2 * reach + 1,) * 2, np.uint8)
    options = dict(borderType=cv2.BORDER_CONSTANT)
    low = cv2.erode(mask, kernel, borderValue=0, **options)
    return low == cv2.dilate(mask, kernel, borderValue=255, **options)


sides = st.integers(17, 60)
sizes = st.tuples(sides, sides)
seeds = st.integers(0, 2**31)


# -- image and mask stay together ---------------------------------------------------------------------


@settings(max_examples=60)
@given(
    size=sizes,
    resize=st.tuples(st.integers(60, 150), st.integers(30, 90)),
    ratios=st.sampled_from([(1.0, 1.0), (0.8, 1.0), (0.9, 2.5)]),
    crop=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    share=st.sampled_from([0.3, 0.75, 1.0]),
    seed=seeds,
)
def test_a_pixel_keeps_its_label_through_training(size, resize, ratios, crop, share, seed):
    """The colour tells the label; away from edges, where colours mix, the two must agree."""
    mask = blocks(LABELS, size, seed % 7)
    transform = train_transform(
        resize=resize, ratios=ratios, crop=crop, max_class_share=share, photometric=False
    )
    image, target = make(transform, colour_of(mask), mask, seed)
    found = target["mask"]
    assert image.dtype == torch.uint8
    assert found.dtype == torch.int64
    assert found.shape == image.shape[1:] == torch.Size(crop)
    assert set(found.unique().tolist()) <= set(LABELS)

    height, width = target["size"]
    assert not image[:, height:].any()
    assert not image[:, :, width:].any()
    assert (found[height:] == 255).all()
    assert (found[:, width:] == 255).all()

    labels = found[:height, :width].numpy().astype(np.uint8)
    pixels = image[:, :height, :width].permute(1, 2, 0).numpy()
    # Colours mix up to a stored pixel from an edge.
    factor = ratios[1] * min(max(resize) / max(size), min(resize) / min(size))
    sure = inside(labels, reach=max(1, int(np.ceil(factor))))
    np.testing.assert_array_equal(pixels[sure], colour_of(labels)[sure])
    assert target["original_size"] == size


@settings(max_examples=40)
@given(size=sizes, new=st.tuples(st.integers(5, 120), st.integers(5, 120)), seed=seeds)
def test_a_new_pixel_has_the_label_at_its_centre(size, new, seed):
    mask = blocks(LABELS, size, seed % 7)
    step = RandomRescale((1, 1))
    labels = step.transform(wrapped(mask)[1]["mask"], dict(size=list(new)))
    rows, columns = (
        (2 * np.arange(count) + 1) * side // (2 * count)
        for count, side in zip(new, size, strict=True)
    )
    np.testing.assert_array_equal(labels[0].numpy(), mask[np.ix_(rows, columns)])


@pytest.mark.parametrize("new", [(11, 17), (24, 40), (61, 99)])
def test_images_are_interpolated_as_opencv_does_it(new):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    found = RandomRescale((1, 1)).transform(image, dict(size=list(new)))
    expected = cv2.resize(pixels, new[::-1], interpolation=cv2.INTER_LINEAR)
    difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 1  # OpenCV rounds its weights


@settings(max_examples=20)
@given(size=sizes, resize=st.tuples(st.integers(10, 200), st.integers(10, 90)), seed=seeds)
def test_in_evaluation_the_mask_stays_as_it_is_stored(size, resize, seed):
    mask = blocks(LABELS, size, seed % 7)
    image, target = make(eval_transform(resize=resize), colour_of(mask), mask, training=False)
    np.testing.assert_array_equal(target["mask"].numpy(), mask)
    assert target["mask"].dtype == torch.int64
    assert target["original_size"] == size
    assert target["size"] == tuple(image.shape[1:]) == rescaled_size(size, resize)
    assert (target["image_id"], target["file"]) == ("a", "a.jpg")


@pytest.mark.parametrize("resize", [(40, 24), (80, 24), (60, 48)])
def test_batches_of_evaluation_hold_masks_of_the_stored_size(resize):
    """Also where the rescaled image has that size, by chance, and is padded."""
    mask = blocks(LABELS)
    sample = make(eval_transform(resize=resize), colour_of(mask), mask, training=False)
    images, (target,) = pad_to_batch([sample], 32, training=False)
    assert images.shape[2] % 32 == images.shape[3] % 32 == 0
    assert tuple(target["mask"].shape) == target["original_size"] == mask.shape


def test_a_sample_depends_on_its_seed_alone():
    mask = blocks(LABELS, (50, 70))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    kept = pixels.copy(), mask.copy()
    transform = train_transform(resize=(90, 60), crop=(32, 40))
    samples = []
    for seed in (5, 6, 7, 6, 5):
        torch.rand(seed)
        image, target = make(transform, pixels, mask, seed)
        samples.append((image, target["mask"]))
    for a, b in ((0, 4), (1, 3)):
        assert all(torch.equal(x, y) for x, y in zip(samples[a], samples[b], strict=True))
    assert len({bytes(image.numpy().tobytes()) for image, _ in samples}) == 3
    np.testing.assert_array_equal(pixels, kept[0])
    np.testing.assert_array_equal(mask, kept[1])


def test_images_are_mirrored_with_the_given_probability():
    mask = blocks(LABELS, (16, 40))
    for hflip, expected in ((0.0, {False}), (1.0, {True}), (0.5, {True, False})):
        transform = train_transform(
            resize=(40, 16), ratios=(1, 1), crop=(16, 40), hflip=hflip, photometric=False
        )
        found = set()
        for seed in range(20):
            image, target = make(transform, colour_of(mask), mask, seed)
            mirrored = not torch.equal(target["mask"], torch.from_numpy(mask).long())
            assert torch.equal(image, F.hflip(wrapped(mask)[0]) if mirrored else wrapped(mask)[0])
            found.add(mirrored)
        assert found == expected


# -- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "within", "expected"),
    [
        # By hand: factor = min(long / longer side, short / shorter side); sides rounded, halves up.
        ((512, 683), (2048, 512), (512, 683)),  # 1
        ((360, 480), (2048, 512), (512, 683)),  # 512 / 360: 682.67
        ((480, 360), (2048, 512), (683, 512)),
        ((360, 480), (1024, 256), (256, 341)),  # 256 / 360: 341.33
        ((100, 1000), (2048, 512), (205, 2048)),  # 2.048: 204.8
        ((1024, 2048), (2048, 512), (512, 1024)),  # 1 / 2
        ((3, 5), (2048, 2), (2, 3)),  # 2 / 3: 3.33
        ((2, 5), (2048, 1), (1, 3)),  # 1 / 2: 2.5
        ((1, 1000), (100, 50), (1, 100)),  # 0.1: at least a pixel
        ((683, 512), (512, 2048), (683, 512)),  # either order
    ],
)
def test_images_fit_into_the_long_and_the_short_side(size, within, expected):
    assert rescaled_size(size, within) == expected


def test_the_ratio_is_drawn_uniformly_and_multiplies_both_sides():
    image, target = wrapped(blocks(LABELS, (40, 40)))
    step = RandomRescale((4000, 100), (0.5, 2.0))
    found = [step.make_params([image, target["mask"]])["size"] for _ in range(2000)]
    heights = np.array(found)[:, 0]
    assert (heights == np.array(found)[:, 1]).all()
    assert heights.min() in (50, 51)
    assert heights.max() in (198, 199)
    assert abs(heights.mean() - 125) < 3
    assert abs(heights.std() - 150 / 12**0.5) < 2


# -- the crop -----------------------------------------------------------------------------------------


def literal_crop(labels, size, share):
    """The rule, as it is said: draw; up to 10 times look whether a class covers too much, and draw again."""

    def draw():
        top = int(torch.randint(labels.shape[0] - height + 1, ()))
        left = int(torch.randint(labels.shape[1] - width + 1, ()))
        return top, left

    height, width = min(size[0], labels.shape[0]), min(size[1], labels.shape[1])
    corner = draw()
    checked = 0
    for _ in range(10):
        counts = {}
        for row in range(corner[0], corner[0] + height):
            for column in range(corner[1], corner[1] + width):
                label = int(labels[row, column])
                if label != 255:
                    counts[label] = counts.get(label, 0) + 1
        checked += 1
        if counts and max(counts.values()) <= share * sum(counts.values()):
            break
        corner = draw()
    return (*corner, height, width), checked


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(17, 33), st.integers(17, 33)),
    crop=st.tuples(st.integers(6, 20), st.integers(6, 20)),
    share=st.sampled_from([0.4, 0.6, 0.75]),
    values=st.sampled_from([(0, 1, 255), (0, 0, 0, 1), (255, 255, 255, 2, 3), (0, 1, 2)]),
    seed=seeds,
)
def test_the_crop_is_that_of_a_literal_loop(size, crop, share, values, seed):
    mask = blocks(values, size, seed % 11)
    torch.manual_seed(seed)
    expected, _ = literal_crop(mask, crop, share)
    torch.manual_seed(seed)
    image, target = wrapped(mask)
    found = BalancedCrop(crop, share).make_params([image, target["mask"]])
    assert (found["top"], found["left"], found["height"], found["width"]) == expected


def test_crops_in_which_a_class_covers_too_much_are_drawn_again():
    mask = np.zeros((64, 256), np.uint8)
    mask[:, :64] = np.tile([1, 2, 255, 255], 16)  # only here no class covers most of it
    image, target = wrapped(mask)

    def lefts(share):
        step = BalancedCrop((64, 32), share)
        return np.array([step.make_params([image, target["mask"]])["left"] for _ in range(200)])

    # Within the left quarter a class covers half of the labelled pixels; 33 of 225 windows lie there.
    balanced = (lefts(0.75) < 56).mean()
    anywhere = (lefts(1.0) < 56).mean()
    assert balanced > 0.8 > 0.4 > anywhere  # 1 - (1 - 0.25)^11 = 0.96, and 0.25


def test_the_eleventh_crop_is_taken_as_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(BalancedCrop, "_balanced", lambda *_, **window: asked.append(window))
    image, target = wrapped(np.zeros((40, 40), np.uint8))
    found = BalancedCrop((8, 8), 0.75).make_params([image, target["mask"]])
    assert len(asked) == CROP_TRIES == 10
    assert found not in asked[-1:]


def test_pixels_without_a_label_do_not_count_in_the_share():
    balanced = BalancedCrop((4, 4), 0.75)._balanced
    window = dict(top=0, left=0, height=4, width=4)
    mask = np.full((4, 4), 255, np.uint8)
    assert not balanced(mask, **window)  # nothing to learn
    mask[0] = 3, 3, 3, 1
    assert balanced(mask, **window)  # 3 of 4, not of 16
    mask[1, 0] = 3
    assert not balanced(mask, **window)  # 4 of 5


# -- photometric distortion ---------------------------------------------------------------------------


def literal_distortion(pixels, params):
    """Step by step, with floats: add, multiply, change two channels of HSV, or multiply here."""

    def linear(values, factor, added=0.0):
        return np.clip(values.astype(np.float32) * factor + added, 0, 255).astype(np.uint8)

    pixels = linear(pixels, 1, params["brightness"])
    if params["contrast_first"]:
        pixels = linear(pixels, params["contrast"])
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = linear(hsv[..., 1], params["saturation"])
    hsv[..., 0] = (hsv[..., 0].astype(int) + params["hue"]) % 180
    changed = params["saturation"] != 1 or params["hue"]
    pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) if changed else pixels
    return pixels if params["contrast_first"] else linear(pixels, params["contrast"])


@settings(max_examples=60)
@given(seed=seeds)
def test_colours_are_distorted_as_a_literal_implementation_does_it(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 9, 3), np.uint8)
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    step = PhotometricDistortion()
    torch.manual_seed(seed)
    params = step.make_params([image])
    torch.manual_seed(seed)
    found = step(image)
    assert isinstance(found, tv_tensors.Image)
    expected = literal_distortion(pixels, params)
    # Tables are made with double precision; a value at a whole number may be cut off a level lower.
    difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


def test_each_distortion_is_drawn_for_half_of_the_images_within_its_range():
    step = PhotometricDistortion()
    drawn = [step.make_params([]) for _ in range(2000)]
    ranges = dict(brightness=(-32, 32, 0), contrast=(0.5, 1.5, 1), saturation=(0.5, 1.5, 1))
    for name, (low, high, none) in ranges.items():
        values = np.array([params[name] for params in drawn])
        assert abs((values == none).mean() - 0.5) < 0.05
        assert values.min() >= low
        assert values.max() <= high
        assert values.max() - values.min() > 0.98 * (high - low)
    assert {params["hue"] for params in drawn} == set(range(-18, 19))
    assert abs(np.mean([params["contrast_first"] for params in drawn]) - 0.5) < 0.05


def test_masks_and_gray_images_have_no_colours_to_distort():
    mask = blocks(LABELS)
    gray = tv_tensors.Image(torch.full((1, 4, 4), 100, dtype=torch.uint8))
    step = PhotometricDistortion()
    for seed in range(30):
        torch.manual_seed(seed)
        image, target = step(*wrapped(mask))
        assert torch.equal(target["mask"][0], torch.from_numpy(mask))
        assert image.shape == (3, *mask.shape)
        params = step.make_params([gray])
        expected = literal_distortion(
            np.full((4, 4, 3), 100, np.uint8), params | dict(saturation=1, hue=0)
        )
        found = step.transform(gray, params)
        assert found.shape == (1, 4, 4)
        assert (found - torch.from_numpy(expected[..., 0]).int()).abs().max() <= 1


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(resize=(512,)), r"AUG.SEGMENTATION.RESIZE=\[512\] must be \[long, short\]"),
        (dict(crop=(0, 5)), r"AUG.SEGMENTATION.CROP=\[0, 5\] must be \[height, width\]"),
        (dict(ratios=(2.0, 0.5)), r"AUG.SEGMENTATION.RATIOS=\[2.0, 0.5\] must be \[smallest"),
        (dict(ratios=(0.001, 1)), r"RATIOS=\[0.001, 1\].* on RESIZE=\[2048, 512\]"),
        (dict(max_class_share=0), r"AUG.SEGMENTATION.MAX_CLASS_SHARE=0 must be in \(0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        train_transform(**options)


def test_the_size_of_evaluation_is_checked_too():
    with pytest.raises(ValueError, match=r"TEST.SEGMENTATION.RESIZE=\[5, 0\]"):
        eval_transform(resize=(5, 0))


def test_a_mask_of_another_size_stops_the_sample_too():
    with pytest.raises(
        ValueError, match=r"a.jpg: the mask has 24x40 pixels .* the image has 24x41"
    ):
        make(eval_transform(), np.zeros((24, 41, 3), np.uint8), blocks([1]))


def test_gray_images_stay_gray():
    mask = blocks(LABELS)
    for training, transform in ((True, train_transform(crop=(32, 32))), (False, eval_transform())):
        image, target = make(transform, colour_of(mask)[..., :1], mask, training=training)
        assert image.shape[0] == 1
        assert image.dtype == torch.uint8
        assert (target["mask"].shape == mask.shape) is not training


def test_stored_files_become_samples(tmp_path):
    write_ade(tmp_path)
    dataset = create_dataset("ade20k", str(tmp_path), "train", "segmentation")
    transform = train_transform(resize=(40, 24), ratios=(1, 1), crop=(32, 48), photometric=False)
    image, target = dataset[1]
    pixels, target = SegmentationSample(transform, True)(np.asarray(image), target)
    assert pixels.shape == (3, 32, 48)
    assert target["size"] == target["original_size"] == (24, 40)
    # Value v is label v - 1; the colour is that of v. JPEG keeps it within a few levels.
    labels = target["mask"][:24, :40].numpy()
    sure = inside(labels.astype(np.uint8), 2) & (labels != 255)
    difference = pixels[:, :24, :40].permute(1, 2, 0).numpy()[sure] - colour_of(labels + 1)[
        sure
    ].astype(int)
    assert np.abs(difference).max() < 12
    assert sure.sum() > 100
