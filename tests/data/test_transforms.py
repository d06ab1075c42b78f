"""What training and evaluation do to an image."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data.transforms import channel_stats, eval_transform, to_image, train_transform

STATS = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
OFF = dict(hflip=0.0, vflip=0.0, color_jitter=0.0, auto_augment="none", re_prob=0.0)
OFF_GEOMETRY = dict(scale=(1, 1), hflip=0.0, **STATS)
EVERYTHING = dict(
    hflip=0.5, vflip=0.5, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", re_prob=1.0
)


def picture(height, width, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8), mode)


def normalised(image):
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(STATS["mean"])[:, None, None]) / torch.tensor(STATS["std"])[
        :, None, None
    ]


def flattened(transform):
    for part in transform.transforms:
        yield from flattened(part) if isinstance(part, transforms.Compose) else [part]


@pytest.mark.parametrize("size", [32, 64])
def test_training_without_augmentation_changes_nothing_and_draws_no_random_number(size):
    transform = train_transform((size, size), scale=(1, 1), **OFF, **STATS)
    image = picture(size, size)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    torch.testing.assert_close(transform(image), normalised(image))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().equal(states[2])


def test_each_augmentation_that_is_off_is_absent():
    names = {type(part).__name__ for part in flattened(train_transform((64, 64), **OFF, **STATS))}
    assert names == {"RandomResizedCropAndInterpolation", "MaybeToTensor", "Normalize"}
    on = train_transform((64, 64), **(EVERYTHING | {"auto_augment": "none"}), **STATS)
    names = {type(part).__name__ for part in flattened(on)}
    assert {"RandomHorizontalFlip", "RandomVerticalFlip", "ColorJitter", "RandomErasing"} <= names


@pytest.mark.parametrize(("size", "padding"), [((32, 32), (4, 4)), ((16, 32), (4, 2))])
def test_small_images_are_shifted_and_never_resized(size, padding):
    parts = list(flattened(train_transform(size, **OFF, **STATS)))
    (crop,) = (part for part in parts if isinstance(part, transforms.RandomCrop))
    assert (tuple(crop.size), crop.padding) == (size, padding)
    assert "RandomResizedCropAndInterpolation" not in {type(part).__name__ for part in parts}

    image = picture(*size)
    torch.manual_seed(1)
    out = train_transform(size, **OFF, **STATS)(image)
    padded = normalised(transforms.Pad(padding)(image))
    windows = padded.unfold(1, size[0], 1).unfold(2, size[1], 1)  # 3, shifts y, shifts x, *size
    matches = (windows - out[:, None, None]).abs().amax(dim=(0, 3, 4)) < 1e-5
    assert matches.sum() == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (32, 16), (64, 96), (97, 33)])
@pytest.mark.parametrize("stored", [(8, 8), (50, 120), (201, 77)])
def test_any_stored_size_becomes_the_asked_one(training, size, stored):
    make = (
        (lambda **kw: train_transform(size, **EVERYTHING, **kw))
        if training
        else (lambda **kw: eval_transform(size, **kw))
    )
    assert make(**STATS)(picture(*stored)).shape == (3, *size)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "none"])
def test_gray_images_keep_one_channel(policy):
    options = EVERYTHING | {"auto_augment": policy}
    transform = train_transform((48, 48), in_chans=1, mean=[0.3], std=[0.4], **options)
    for seed in range(20):
        random.seed(seed)
        torch.manual_seed(seed)
        assert transform(picture(60, 50, "L")).shape == (1, 48, 48)
    out = eval_transform((60, 50), in_chans=1, mean=[0.3], std=[0.4], crop=False)(
        picture(60, 50, "L")
    )
    expected = (torch.from_numpy(np.asarray(picture(60, 50, "L")) / 255) - 0.3) / 0.4
    torch.testing.assert_close(out[0], expected.float())


def test_evaluation_resizes_to_256_of_224_and_crops_the_centre():
    image = picture(300, 400)
    out = eval_transform((224, 224), **STATS)(image)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)
    left, top = round((341 - 224) / 2), 16
    expected = normalised(resized.crop((left, top, left + 224, top + 224)))
    torch.testing.assert_close(out, expected)


def test_evaluation_without_crop_resizes_the_whole_image():
    image = picture(300, 400)
    out = eval_transform((96, 64), crop=False, **STATS)(image)
    torch.testing.assert_close(out, normalised(image.resize((64, 96), Image.Resampling.BICUBIC)))


def test_a_non_square_evaluation_crop_keeps_proportions():
    """Trap 6: non-square input sizes."""
    image = picture(160, 240).resize((240, 160))
    out = eval_transform((140, 210), **STATS)(image)
    resized = image.resize((240, 160), Image.Resampling.BICUBIC)
    torch.testing.assert_close(out, normalised(resized.crop((15, 10, 225, 150))))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize(("in_chans", "expected"), [(1, "L"), (3, "RGB")])
def test_images_of_any_mode_get_the_asked_channels(mode, in_chans, expected):
    assert to_image(picture(4, 4).convert(mode), in_chans).mode == expected


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3)])
def test_arrays_become_images(shape):
    image = to_image(np.full(shape, 7, np.uint8), 3)
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((5, 4), "RGB", (7, 7, 7))


def test_one_mean_stands_for_all_channels_and_a_wrong_number_is_an_error():
    assert channel_stats([0.5], [0.1, 0.2, 0.3], 3) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"DATA.MEAN=\[0.1, 0.2, 0.3\].*MODEL.IN_CHANS=1"):
        channel_stats([0.1, 0.2, 0.3], [0.5], 1)
    with pytest.raises(ValueError, match=r"MODEL.IN_CHANS=4"):
        channel_stats([0.1], [0.5], 4)
    with pytest.raises(ValueError, match=r"DATA.STD=\[0.0\] must be positive"):
        channel_stats([0.1], [0.0], 1)


@pytest.mark.parametrize(
    "policy", ["rand-m10-n4-p1-inc1", "rand-m0-n4-p1", "original", "augmix-m10"]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_policies_work_at_full_strength(policy, mode):
    """Pillow 13 refuses to posterize to 0 bits, which the default policy of timm asks for at times."""
    gray = dict(in_chans=1, mean=[0.5], std=[0.5])
    transform = train_transform((40, 40), auto_augment=policy, **(gray if mode == "L" else STATS))
    image = picture(40, 40, mode)
    for seed in range(60):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert transform(image).isfinite().all()


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
        train_transform((64, 64), mean=[0.5], std=[0.5], auto_augment=policy)
