"""How an image becomes the evaluation's crop: ratio, mode and the margin of multi-crop evaluation."""

import numpy as np
import pytest
from PIL import Image

from data.transforms import eval_transform


def gradient(width, height):
    """Red grows to the right and green downwards, so that a pixel tells where it comes from."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8))


def extent(pixels):
    """Share of the image's width and height that the pixels show."""
    red, green = pixels[..., 0].astype(float), pixels[..., 1].astype(float)
    return (red.max() - red.min()) / 255, (green.max() - green.min()) / 255


@pytest.mark.parametrize("ratio", [0.5, 0.875, 1.0])
def test_the_ratio_is_the_share_of_a_square_image_that_is_seen(ratio):
    pixels = eval_transform((64, 64), crop_ratio=ratio)(gradient(256, 256))
    assert pixels.shape == (64, 64, 3)
    assert extent(pixels) == pytest.approx((ratio, ratio), abs=0.03)


@pytest.mark.parametrize(
    ("mode", "seen"), [("center", (0.5, 1.0)), ("squash", (1.0, 1.0)), ("border", (1.0, 1.0))]
)
def test_modes_differ_in_what_they_do_to_a_wide_image(mode, seen):
    options = dict(crop_ratio=1.0, crop_mode=mode, colour=(0.0, 0.0, 1.0))
    pixels = eval_transform((64, 64), **options)(gradient(256, 128))
    assert pixels.shape == (64, 64, 3)
    filled = (pixels == [0, 0, 255]).all(axis=2)
    if mode == "border":
        assert filled[:15].all()
        assert filled[-15:].all()
        pixels = pixels[16:48]
    else:
        assert not filled.any()
    assert extent(pixels) == pytest.approx(seen, abs=0.06)


def test_border_fills_gray_images_too():
    pixels = eval_transform(
        (64, 64), in_chans=1, crop_mode="border", crop_ratio=1.0, colour=(0.5,)
    )(Image.new("L", (128, 64), 255))
    assert pixels.shape == (64, 64, 1)
    assert pixels[0, 0, 0] == 128


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_margin_is_kept_for_multi_crop(mode):
    pixels = eval_transform((56, 112), crop_mode=mode, margin=True)(gradient(256, 256))
    assert pixels.shape == (64, 128, 3)
    inner = eval_transform((56, 112), crop_mode=mode)(gradient(256, 256))
    assert np.array_equal(pixels[4:-4, 8:-8], inner), "its centre is the plain crop"


@pytest.mark.parametrize(
    ("size", "options"),
    [((32, 32), {}), ((64, 64), dict(crop=False)), ((64, 64), dict(crop_ratio=1.0))],
)
def test_multi_crop_without_a_margin_is_refused(size, options):
    with pytest.raises(ValueError, match=r"TEST.TTA cuts crops .* TEST.CROP_RATIO="):
        eval_transform(size, margin=True, **options)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"TEST.CROP_MODE='middle' must be one of"):
        eval_transform((64, 64), crop_mode="middle")
