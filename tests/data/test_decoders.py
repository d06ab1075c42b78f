"""Every decoder gives PIL's pixels, or nearly, and takes the same files."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from data import decoders
from data.decoders import DECODERS, make_decoder
from data.registry import decode_image


@pytest.fixture(params=DECODERS)
def name(request):
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    return request.param


def photo(height=90, width=130):
    """Smooth colours with edges, as photographs have."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 2 % 256, columns * 3 % 256, (rows + columns) % 256]
    pixels = np.stack(channels, 2).astype(np.uint8)
    pixels[20:40, 30:70] = (200, 30, 90)
    return Image.fromarray(pixels)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_array(image, mode="RGB"):
    return np.asarray(image.convert(mode)) if isinstance(image, Image.Image) else image


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF"])
def test_lossless_images_are_the_same_by_every_decoder(name, kind):
    image = photo().quantize(64) if kind == "GIF" else photo()
    out = as_array(make_decoder(name)(encoded(image, kind)))
    assert np.array_equal(out, as_array(image))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}]
)
def test_jpegs_differ_by_rounding_only(name, options):
    content = encoded(photo(), "JPEG", **options)
    out, expected = (
        as_array(make_decoder(name)(content)).astype(int),
        as_array(decode_image(content)),
    )
    assert out.shape == (90, 130, 3)
    assert np.abs(out - expected).max() <= 2
    assert np.abs(out - expected).mean() < 0.1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_channel_is_decoded_to_gray(name, mode):
    content = encoded(photo().convert(mode), "JPEG")
    out = as_array(make_decoder(name, in_chans=1)(content), "L").astype(int)
    expected = as_array(decode_image(content), "L")
    difference = np.abs(out.reshape(expected.shape) - expected)
    # Where JPEG's luma is no colour of RGB, what PIL computes from clipped channels differs more.
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.9) <= 1


def test_gray_jpegs_are_decoded_to_three_channels(name):
    content = encoded(photo().convert("L"), "JPEG")
    out = as_array(make_decoder(name)(content))
    assert out.shape == (90, 130, 3)
    assert np.abs(out.astype(int) - as_array(decode_image(content))).max() <= 1


def test_the_colours_of_printing_are_left_to_pil(name):
    content = encoded(photo().convert("CMYK"), "JPEG")
    out = as_array(make_decoder(name)(content)).astype(int)
    assert np.abs(out - as_array(decode_image(content))).max() <= 2


def test_orientation_tags_are_ignored_by_every_decoder(name):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    out = as_array(make_decoder(name)(encoded(photo(), "JPEG", exif=exif)))
    assert out.shape == (90, 130, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_what_is_cut_short_is_an_error_by_every_decoder(name, kind, share):
    content = encoded(photo(), kind)
    with pytest.raises((OSError, SyntaxError, ValueError)):
        make_decoder(name)(content[: int(share * len(content))])


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"<html>\xff\xd9", b"\xff\xd8\xff\xd9"])
def test_what_is_no_image_is_an_error_by_every_decoder(name, content):
    with pytest.raises((OSError, SyntaxError, ValueError)):
        make_decoder(name)(content)


def test_bytes_behind_the_end_are_accepted_as_pil_does(name):
    content = encoded(photo(), "JPEG")
    out = as_array(make_decoder(name)(content + b"\0 trailing")).astype(int)
    assert np.abs(out - as_array(decode_image(content))).max() <= 2


@pytest.mark.parametrize(
    ("min_side", "expected"),
    [(0, (400, 600)), (100, (100, 150)), (101, (200, 300)), (500, (400, 600))],
)
def test_a_smaller_side_decodes_jpegs_at_a_reduced_size(name, min_side, expected):
    decode = make_decoder(name, min_side=min_side)
    out = as_array(decode(encoded(photo(400, 600), "JPEG")))
    if name == "simplejpeg" and min_side == 101:
        expected = (150, 225)  # it knows all eighths
    assert out.shape == (*expected, 3)
    assert as_array(decode(encoded(photo(400, 600), "PNG"))).shape == (400, 600, 3)


def test_decoders_reach_spawned_workers(name):
    content = encoded(photo(), "PNG")
    for min_side in (0, 10):
        decode = pickle.loads(pickle.dumps(make_decoder(name, min_side=min_side)))
        assert np.array_equal(as_array(decode(content)), as_array(photo()))


def test_an_unknown_decoder_is_an_error():
    with pytest.raises(ValueError, match=r"DATA.DECODER='turbo' must be one of \['pil', 'cv2'"):
        make_decoder("turbo")


def test_a_decoder_whose_package_is_missing_says_what_to_install(monkeypatch):
    """Trap 26: fast loaders that do not install."""
    monkeypatch.setattr(decoders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install simplejpeg"):
        make_decoder("simplejpeg")
    make_decoder("cv2")
