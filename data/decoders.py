"""From the bytes of an image file to pixels, by the library of the user's choice: DATA.DECODER.

Every decoder accepts exactly the files that PIL accepts: what another library refuses, or might take
although it is cut short, is left to PIL, whose word is final. So a damaged file is the same error, and the
same sample is skipped, whatever the decoder. EXIF orientation is ignored by all of them, as PIL does; of gray
values of 16 bits the upper 8 are taken.

What differs is speed, and a little the numbers. On colour JPEGs all three run libjpeg-turbo with its exact
inverse transform and smooth upsampling; the versions that they bring along may round single values
differently. Gray images from colour JPEGs are the stored luma with `cv2` and `simplejpeg`, and computed
from decoded RGB with `pil`: a level apart, or more where saturated colours are clipped.

A `min_side` above 0 lets JPEGs be decoded smaller, by a shorter inverse transform. This is fast, and no
longer the published procedure: the image is another one than decoded in full and resized.
"""

import importlib.util
import io
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from PIL import ExifTags, Image

from .registry import decode_image

Decoder = Callable[[bytes], Image.Image | np.ndarray]

DECODERS = ("pil", "cv2", "simplejpeg")
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
# Reductions that every JPEG library knows, largest first, with OpenCV's flags for colour and gray.
_REDUCED_FLAGS = {
    8: (cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB, cv2.IMREAD_REDUCED_GRAYSCALE_8),
    4: (cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB, cv2.IMREAD_REDUCED_GRAYSCALE_4),
    2: (cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB, cv2.IMREAD_REDUCED_GRAYSCALE_2),
    1: (cv2.IMREAD_COLOR_RGB, cv2.IMREAD_GRAYSCALE),
}


def make_decoder(name: str, *, in_chans: int = 3, min_side: int = 0) -> Decoder:
    """A function from an encoded file to a PIL image or a uint8 array (H, W) or (H, W, 3), RGB.

    Args:
        name: pil, cv2 (OpenCV, JPEG only) or simplejpeg (JPEG only); both leave other files to pil.
        in_chans: 1 lets JPEGs be decoded to gray at once; whoever calls converts the rest.
        min_side: pixels; 0 decodes at full size, else JPEGs may come out smaller, as long as no side
            becomes shorter than this (a shorter one stays what it is).

    Raises:
        ValueError: unknown name, or its package is not installed.
    """
    if name not in DECODERS:
        raise ValueError(f"DATA.DECODER='{name}' must be one of {list(DECODERS)}")
    if name == "simplejpeg" and importlib.util.find_spec("simplejpeg") is None:
        raise ValueError(
            "DATA.DECODER='simplejpeg' needs a package that is not installed: pip install simplejpeg, "
            "or set DATA.DECODER cv2 or pil"
        )
    if name == "pil":
        return partial(_decode_pil, min_side=min_side) if min_side else decode_image
    return partial({"cv2": _decode_cv2, "simplejpeg": _decode_simplejpeg}[name], in_chans, min_side)


def is_turned(image: Image.Image) -> bool:
    """Whether viewers would turn or mirror this image, because its EXIF orientation says so."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _decode_pil(content: bytes, min_side: int) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        if image.format == "JPEG":
            image.draft(image.mode, (min_side, min_side))  # reduces by 2, 4 or 8, never below
        image.load()
        return image


def _decode_cv2(in_chans: int, min_side: int, content: bytes) -> Image.Image | np.ndarray:
    # OpenCV fills up what is missing of a JPEG with gray, and says so on standard error only.
    if not content.startswith(JPEG_START) or not content.endswith(JPEG_END):
        return _fallback(content, min_side)
    flags = _REDUCED_FLAGS[_reduction(content, min_side) if min_side else 1]
    flag = flags[in_chans == 1] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    except cv2.error:
        pixels = None
    return _fallback(content, min_side) if pixels is None else pixels


def _decode_simplejpeg(in_chans: int, min_side: int, content: bytes) -> Image.Image | np.ndarray:
    import simplejpeg  # optional

    if not content.startswith(JPEG_START):
        return _fallback(content, min_side)
    colours = "GRAY" if in_chans == 1 else "RGB"
    try:
        return simplejpeg.decode_jpeg(content, colours, min_height=min_side, min_width=min_side)
    except ValueError:  # damaged, or in CMYK
        return _fallback(content, min_side)


def _fallback(content: bytes, min_side: int) -> Image.Image:
    return _decode_pil(content, min_side) if min_side else decode_image(content)


def _reduction(content: bytes, min_side: int) -> int:
    """How many times smaller a JPEG may be decoded."""
    with Image.open(io.BytesIO(content)) as image:  # reads the header only
        shorter = min(image.size)
    return next(factor for factor in _REDUCED_FLAGS if factor == 1 or shorter // factor >= min_side)
