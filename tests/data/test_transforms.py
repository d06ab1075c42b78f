"""What training and evaluation do to an image."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from data.transforms import (
    PaddedCrop,
    RandomCropResize,
    RandomFlip,
    channel_stats,
    draw_window,
    eval_transform,
    resize_array,
    to_image,
    to_pixels,
    train_transform,
)

OFF = dict(hflip=0.0, vflip=0.0, color_jitter=0.0, auto_augment="none")
OFF_GEOMETRY = dict(scale=(1, 1), hflip=0.0)
EVERYTHING = dict(hflip=0.5, vflip=0.5, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1")


def picture(height, width, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8), mode)


def pixels(image):
    return np.array(image)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def flattened(transform):
    for part in transform.transforms:
        yield from flattened(part) if isinstance(part, transforms.Compose) else [part]


@pytest.mark.parametrize("size", [32, 64])
def test_training_without_augmentation_changes_nothing_and_draws_no_random_number(size):
    transform = train_transform((size, size), scale=(1, 1), **OFF)
    image = picture(size, size)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    out = transform(image)
    assert out.dtype == np.uint8
    assert np.array_equal(out, pixels(image))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().equal(states[2])


def test_each_augmentation_that_is_off_is_absent():
    names = [type(part).__name__ for part in flattened(train_transform((64, 64), **OFF))]
    assert names == ["RandomCropResize", "partial"]
    on = train_transform((64, 64), **(EVERYTHING | {"auto_augment": "none"}))
    names = [type(part).__name__ for part in flattened(on)]
    assert names.count("RandomFlip") == 2
    assert "ColorJitter" in names


@pytest.mark.parametrize(("size", "padding"), [((32, 32), (4, 4)), ((16, 32), (2, 4))])
def test_small_images_are_shifted_and_never_resized(size, padding):
    """DHVT's CIFAR recipe: RandomCrop with a padding of 4 at 32 pixels."""
    parts = list(flattened(train_transform(size, **OFF)))
    (crop,) = (part for part in parts if isinstance(part, PaddedCrop))
    assert (crop.size, crop.padding, crop.reflect) == (size, padding, False)
    assert not any(isinstance(part, RandomCropResize) for part in parts)

    image = picture(*size)
    random.seed(1)
    out = train_transform(size, **OFF)(image)
    padded = pixels(transforms.Pad(padding[::-1])(image))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (*size, 3))
    assert (windows == out).all(axis=(-1, -2, -3)).sum() == 1


def test_every_shift_within_the_padding_is_drawn():
    crop, rng = PaddedCrop((6, 5), (1, 2)), random.Random(0)
    drawn = {crop.draw(rng, 6, 5) for _ in range(400)}
    assert drawn == {(top, left) for top in range(3) for left in range(5)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (32, 16), (64, 96), (97, 33)])
@pytest.mark.parametrize("stored", [(8, 8), (50, 120), (201, 77)])
def test_any_stored_size_becomes_the_asked_one(training, size, stored):
    make = (
        (lambda **kw: train_transform(size, **EVERYTHING, **kw))
        if training
        else (lambda **kw: eval_transform(size, **kw))
    )
    assert make()(picture(*stored)).shape == (*size, 3)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "none"])
def test_gray_images_keep_one_channel(policy):
    options = EVERYTHING | {"auto_augment": policy}
    transform = train_transform((48, 48), in_chans=1, mean=[0.3], **options)
    for seed in range(20):
        seed_all(seed)
        assert transform(picture(60, 50, "L")).shape == (48, 48, 1)
    out = eval_transform((60, 50), in_chans=1, crop=False)(picture(60, 50, "L"))
    assert np.array_equal(out[..., 0], pixels(picture(60, 50, "L")))


def test_evaluation_resizes_to_256_of_224_and_crops_the_centre():
    image = picture(300, 400)
    out = eval_transform((224, 224))(image)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)
    left, top = round((341 - 224) / 2), 16
    assert np.array_equal(out, pixels(resized.crop((left, top, left + 224, top + 224))))


def test_evaluation_without_crop_resizes_the_whole_image():
    image = picture(300, 400)
    out = eval_transform((96, 64), crop=False)(image)
    assert np.array_equal(out, pixels(image.resize((64, 96), Image.Resampling.BICUBIC)))


def test_a_non_square_evaluation_crop_keeps_proportions():
    """Trap 6: non-square input sizes."""
    image = picture(160, 240).resize((240, 160))
    out = eval_transform((140, 210))(image)
    resized = image.resize((240, 160), Image.Resampling.BICUBIC)
    assert np.array_equal(out, pixels(resized.crop((15, 10, 225, 150))))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize(("in_chans", "expected"), [(1, "L"), (3, "RGB")])
def test_images_of_any_mode_get_the_asked_channels(mode, in_chans, expected):
    assert to_image(picture(4, 4).convert(mode), in_chans).mode == expected


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "int32"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_gray_images_of_16_bits_keep_their_upper_8(dtype, in_chans):
    values = np.array([[0, 255, 256], [4095, 33000, 65535]])
    file = io.BytesIO()
    Image.fromarray(values.astype(dtype)).save(file, "TIFF")
    found = to_pixels(Image.open(file), in_chans)
    assert found[..., 0].tolist() == [[0, 0, 1], [15, 128, 255]]
    assert np.array_equal(found[..., 0], found[..., -1])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_gray_images_of_32_bits_may_hold_bytes(dtype):
    values = np.array([[0, 10], [200, 255]], dtype)
    assert to_pixels(Image.fromarray(values), 1)[..., 0].tolist() == values.tolist()


@pytest.mark.parametrize("values", [np.float32([[0.5]]), np.int32([[70000]]), np.int32([[-1]])])
def test_gray_images_of_32_bits_are_refused(values):
    with pytest.raises(ValueError, match=r"32 bits.*save it with 8 or 16 bits"):
        to_image(Image.fromarray(values), 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 90)])
@pytest.mark.parametrize("arrays", [False, True])
def test_a_crop_of_the_narrowest_image_has_a_pixel(size, arrays):
    """timm's own has none at times: 1x300 gives crops of height 0."""
    crop = RandomCropResize(
        (32, 32), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic"
    )
    image = picture(*size)
    for seed in range(200):
        seed_all(seed)
        out = crop(pixels(image) if arrays else image)
        assert pixels(out).shape == (32, 32, 3)
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        assert 0 <= top < top + height <= size[0]
        assert 0 <= left < left + width <= size[1]


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3)])
def test_arrays_become_images(shape):
    image = to_image(np.full(shape, 7, np.uint8), 3)
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((5, 4), "RGB", (7, 7, 7))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_images_and_arrays_become_the_same_pixels(mode, in_chans):
    image = picture(4, 5).convert(mode)
    expected = pixels(to_image(image, in_chans)).reshape(4, 5, in_chans)
    assert np.array_equal(to_pixels(image, in_chans), expected)
    if mode != "CMYK":  # decoders give no such arrays
        assert np.array_equal(to_pixels(pixels(image), in_chans), expected)
    if mode == "L":
        assert np.array_equal(to_pixels(pixels(image)[..., None], in_chans), expected)


def test_one_mean_stands_for_all_channels_and_a_wrong_number_is_an_error():
    assert channel_stats([0.5], [0.1, 0.2, 0.3], 3) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"DATA.MEAN=\[0.1, 0.2, 0.3\].*MODEL.IN_CHANS=1"):
        channel_stats([0.1, 0.2, 0.3], [0.5], 1)
    with pytest.raises(ValueError, match=r"MODEL.IN_CHANS=4"):
        channel_stats([0.1], [0.5], 4)
    with pytest.raises(ValueError, match=r"DATA.STD=\[0.0\] must be positive"):
        channel_stats([0.1], [0.0], 1)


@pytest.mark.parametrize(
    "policy", ["rand-m10-n4-p1-inc1", "rand-m0-n4-p1", "original", "v0", "3a", "augmix-m10"]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_policies_work_at_full_strength(policy, mode):
    """Pillow 13 refuses to posterize to 0 bits, which the default policy of timm asks for at times."""
    in_chans = 1 if mode == "L" else 3
    transform = train_transform((40, 40), in_chans=in_chans, auto_augment=policy)
    image = picture(40, 40, mode)
    for seed in range(60):
        seed_all(seed)
        assert transform(image).shape == (40, 40, in_chans)


def test_posterizing_to_no_bits_is_black():
    transform = train_transform((40, 40), auto_augment="rand-m10-n1-p1-inc1", **OFF_GEOMETRY)
    (policy,) = (part for part in transform.transforms if hasattr(part, "ops"))
    (op,) = (op for op in policy.ops if op.name.startswith("Posterize"))
    assert not np.asarray(op(picture(8, 8))).any()
    op.magnitude = 5  # two of the eight bits
    kept = np.asarray(op(picture(8, 8)))
    assert np.array_equal(kept, np.asarray(picture(8, 8)) & 0b11000000)


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-m9-foo1", "original-x1"])
def test_a_misspelt_policy_names_its_key(policy):
    with pytest.raises(ValueError, match=f"AUG.AUTO_AUGMENT='{policy}' must be a policy of timm"):
        train_transform((64, 64), auto_augment=policy)


def test_three_augment_is_gray_or_solarised_or_blurred_and_then_jittered():
    """DeiT III (arXiv:2204.07118), Sec. 3.4: one of the three, each as likely, then colour jitter 0.3."""
    transform = train_transform((40, 40), auto_augment="3a", color_jitter=0.3, **OFF_GEOMETRY)
    (policy,) = (part for part in transform.transforms if hasattr(part, "policy"))
    assert isinstance(transform.transforms[-2], transforms.ColorJitter)
    assert [op.name for (op,) in policy.policy] == ["Solarize", "Desaturate", "GaussianBlurRand"]
    image = picture(40, 40)
    gray = np.repeat(pixels(image.convert("L"))[..., None], 3, axis=2)
    inverted = np.where(pixels(image) < 128, pixels(image), 255 - pixels(image))
    counts = dict(gray=0, solarised=0, blurred=0)
    for seed in range(60):
        seed_all(seed)
        out = pixels(policy(image)).astype(int)
        if np.abs(out - gray).max() <= 1:
            counts["gray"] += 1
        elif np.array_equal(out, inverted):
            counts["solarised"] += 1
        else:
            assert out.std() < pixels(image).std()
            counts["blurred"] += 1
    assert min(counts.values()) >= 10


def test_randaugment_takes_the_place_of_colour_jitter():
    policy = train_transform((40, 40), auto_augment="rand-m9", color_jitter=0.4)
    assert not any(isinstance(part, transforms.ColorJitter) for part in policy.transforms)


def test_the_simple_crop_covers_the_size_and_shifts_by_four_mirrored_pixels():
    """DeiT III's code: Resize(size), RandomCrop(size, padding=4, padding_mode="reflect")."""
    image = picture(60, 90)
    transform = train_transform((48, 48), crop="simple", **OFF)
    covering = image.resize((72, 48), Image.Resampling.BICUBIC)
    padded = pixels(F.pad(covering, [4], padding_mode="reflect"))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (48, 48, 3))[:, :, 0]
    places = set()
    for seed in range(40):
        random.seed(seed)
        matches = np.argwhere((windows == transform(image)).all(axis=(-1, -2, -3)))
        assert len(matches) == 1
        places.add(tuple(matches[0]))
    assert len(places) > 30
    assert {top for top, _ in places} == set(range(9))


def test_an_unknown_crop_names_its_key():
    with pytest.raises(ValueError, match=r"AUG.CROP='central' must be one of"):
        train_transform((48, 48), crop="central")


# -- arrays, which faster decoders give ----------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_arrays_are_mirrored_like_images(axis, in_chans):
    image = picture(5, 7, "L" if in_chans == 1 else "RGB")
    flip = RandomFlip(1.0, axis)
    expected = pixels(flip(image)).reshape(5, 7, in_chans)
    assert np.array_equal(
        expected,
        pixels(image).reshape(5, 7, in_chans)[(slice(None),) * axis + (slice(None, None, -1),)],
    )
    assert np.array_equal(flip(to_pixels(image, in_chans)), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [(64, 48), (200, 90)])
def test_arrays_get_the_pixels_of_images_within_rounding(in_chans, interpolation, size):
    """Noise, in which any other filter, and any shift, would show; crops grow and shrink."""
    image = picture(120, 150, "L" if in_chans == 1 else "RGB")
    transform = train_transform(size, in_chans=in_chans, interpolation=interpolation)
    for seed in range(10):
        seed_all(seed)
        expected = transform(image).astype(int)
        seed_all(seed)
        out = transform(to_pixels(image, in_chans))
        assert (out.shape, out.dtype) == (expected.shape, np.uint8)
        assert np.abs(out - expected).max() <= 2
        # What bilinear crops enlarge is OpenCV's, rounded twice.
        assert np.abs(out - expected).mean() < (0.05 if interpolation == "bicubic" else 0.3)


@pytest.mark.parametrize(
    ("mode", "size", "largest", "bias"),
    [
        (transforms.InterpolationMode.BILINEAR, (120, 200), 1, 0.3),
        (transforms.InterpolationMode.BILINEAR, (90, 120), 1, 0.3),  # one side stays
        (transforms.InterpolationMode.BILINEAR, (89, 200), 2, 0.01),  # one side shrinks
        (transforms.InterpolationMode.BICUBIC, (120, 200), 2, 0.01),
    ],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_resized_arrays_are_within_rounding_of_pil(mode, size, largest, bias, in_chans):
    image = picture(90, 120, "L" if in_chans == 1 else "RGB")
    expected = to_pixels(F.resize(image, size, mode), in_chans).astype(int)
    found = resize_array(to_pixels(image, in_chans), size, mode)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= largest
    assert abs((found - expected).mean()) < bias


def test_policies_run_on_arrays_too():
    transform = train_transform((64, 64), **EVERYTHING)
    seed_all(0)
    assert transform(pixels(picture(90, 80))).shape == (64, 64, 3)


@pytest.mark.parametrize("options", [{}, dict(scale=(1, 1)), dict(vflip=0.5, hflip=0.0)])
def test_the_window_of_a_sample_is_where_its_pixels_come_from(options):
    """An image of its own coordinates shows what the transform has shown."""
    height, width = 90, 140
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    image = np.stack([columns, rows, rows], axis=2)
    keywords = dict(interpolation="bilinear", hflip=0.5, scale=(0.2, 1.0)) | options
    transform = train_transform((64, 64), **keywords)
    seen = set()
    for seed in range(12):
        seed_all(seed)
        window = draw_window(transform, height, width)
        seed_all(seed)
        sample = transform(image).astype(float)
        left, right = sample[:, [0, -1], 0].mean(0)
        top, bottom = sample[[0, -1], :, 1].mean(1)
        found = ((left + 0.5) / width, (top + 0.5) / height)
        found += ((right + 0.5) / width, (bottom + 0.5) / height)
        assert found == pytest.approx(window, abs=0.03)
        seen.add((window.left < window.right, window.top < window.bottom))
    assert len(seen) == 2, "mirrored ones, and others"


def test_padded_crops_have_no_window():
    for transform in (train_transform((32, 32)), train_transform((64, 64), crop="simple")):
        with pytest.raises(ValueError, match=r"set AUG\.CROP resized"):
            draw_window(transform, 90, 90)
