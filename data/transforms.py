"""From a stored image to the pixels that a batch is made of: training augmentation, evaluation geometry.

Pixels stay uint8 here; `finish.Finish` normalises them, and erases, on the device.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import (
    CenterCropOrPad,
    RandomResizedCropAndInterpolation,
    ResizeKeepRatio,
    create_transform,
    str_to_interp_mode,
)
from timm.data.auto_augment import AugmentOp
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import functional as F

# Up to this size a shifted crop replaces the random resized crop: small images are the whole object.
SMALL_SIDE = 32
# Modes of PIL by number of channels.
_MODES = {1: "L", 3: "RGB"}
# Those of PIL with one channel of more than 8 bits.
_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")

# Padding of the simple random crop in pixels, as in DeiT III's code.
SIMPLE_PADDING = 4
CROPS = ("resized", "simple")

Picture = Image.Image | np.ndarray
Transform = Callable[[Picture], np.ndarray]


class Window(NamedTuple):
    """Part of an image, in shares of its sides; right < left says mirrored, and so does bottom < top."""

    left: float
    top: float
    right: float
    bottom: float


WHOLE = Window(0.0, 0.0, 1.0, 1.0)


def to_image(image: Picture, in_chans: int) -> Image.Image:
    """Stored image, or uint8 array (H, W) or (H, W, 1 or 3), -> PIL image with `in_chans` channels.

    Of 16 bits per pixel the upper 8 are taken, as OpenCV does.

    Raises:
        ValueError: an image of 32 bits per pixel and channel, whose range nobody knows.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if image.mode in _WIDE_MODES:
        image = _upper_bits(image)
    mode = _MODES[in_chans]
    return image if image.mode == mode else image.convert(mode)


def _upper_bits(image: Image.Image) -> Image.Image:
    """Gray values of 16 bits -> of 8; PIL's own conversion makes white of all that is above 255.

    Of 32 bits they are bytes where none is above 255, and whole numbers of 16 bits otherwise.
    """
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    if not image.mode.startswith("I;16") and low >= 0 and 1 < high <= 255:
        return Image.fromarray(values.round().astype(np.uint8))
    if image.mode == "F" or low < 0 or high >= 2**16:
        raise ValueError(
            f"its gray values have 32 bits (PIL's mode {image.mode}) and go from {values.min():g} to "
            f"{values.max():g}; save it with 8 or 16 bits"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def to_pixels(image: Picture, in_chans: int) -> np.ndarray:
    """PIL image, or uint8 array (H, W) or (H, W, 1 or 3), -> uint8 array (H, W, in_chans)."""
    if isinstance(image, Image.Image) or (image.ndim == 3 and image.shape[2] != in_chans == 1):
        image = np.asarray(to_image(image, in_chans))
    if image.ndim == 2:
        image = image[..., None]
    return image if image.shape[2] == in_chans else np.repeat(image, in_chans, axis=2)


def channel_stats(
    mean: Sequence[float], std: Sequence[float], in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of values in [0, 1]; one entry stands for all."""
    if in_chans not in _MODES:
        raise ValueError(f"MODEL.IN_CHANS={in_chans}: images have 1 (gray) or 3 (RGB) channels")
    for key, values in (("DATA.MEAN", mean), ("DATA.STD", std)):
        if len(values) not in (1, in_chans):
            raise ValueError(
                f"{key}={list(values)} must have one entry, or one per channel of "
                f"MODEL.IN_CHANS={in_chans}"
            )
    if min(std) <= 0:
        raise ValueError(f"DATA.STD={list(std)} must be positive")
    return tuple(mean) * (in_chans // len(mean)), tuple(std) * (in_chans // len(std))


def train_transform(
    size: tuple[int, int],
    *,
    in_chans: int = 3,
    mean: Sequence[float] = (0.5,),
    interpolation: str = "bicubic",
    crop: str = "resized",
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float = 0.0,
    auto_augment: str = "none",
) -> transforms.Compose:
    """PIL image, or array (H, W, in_chans), -> augmented pixels, a uint8 array (*size, in_chans).

    Up to 32 pixels the resized crop is the one of the CIFAR recipes: the image, padded by an eighth of its
    size (4 pixels of 32) and shifted; beyond, it is a random resized crop. A `scale` of (1, 1) takes no
    crop at all: the image is resized to `size`.

    Args:
        size: (height, width) in pixels.
        mean: per channel, of values in [0, 1]: what policies fill emptied corners with.
        interpolation: bicubic, bilinear, or random (one of both per image).
        crop: resized, or simple: DeiT III's (arXiv:2204.07118), the image resized to cover `size`, padded
            by 4 mirrored pixels, and a window of it; `scale` and `ratio` are not used.
        scale: smallest and largest share of the image's area; `ratio` is width / height.
        hflip: probability; so is vflip.
        color_jitter: strength of brightness, contrast and saturation; policies take its place, except 3a.
        auto_augment: a policy string of timm (rand-..., original, 3a, augmix-...), or "none".
    """
    if crop not in CROPS:
        raise ValueError(f"AUG.CROP='{crop}' must be one of {list(CROPS)}")
    policy = None if auto_augment.lower() in ("none", "") else auto_augment
    if policy:
        _check_policy(policy)
    _, colours, _ = create_transform(
        size,
        is_training=True,
        # 0.0 would add a jitter that does nothing, and still draw random numbers for it.
        color_jitter=color_jitter or None,
        auto_augment=policy,
        interpolation=interpolation,
        mean=tuple(mean),
        separate=True,
    )
    for op in _policy_ops(colours.transforms):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    pil = partial(to_image, in_chans=in_chans)
    if tuple(scale) == (1, 1):
        geometry = [pil, _resize(size, interpolation)]
    elif crop == "simple":
        padding = (SIMPLE_PADDING, SIMPLE_PADDING)
        geometry = [pil, _cover(size, interpolation), PaddedCrop(size, padding, reflect=True)]
    elif max(size) <= SMALL_SIDE:
        padding = (round(size[0] / 8), round(size[1] / 8))
        geometry = [pil, _resize(size, interpolation), PaddedCrop(size, padding)]
    else:
        geometry = [RandomCropResize(size, tuple(scale), tuple(ratio), interpolation)]
    flips = [RandomFlip(prob, axis) for prob, axis in ((hflip, 1), (vflip, 0)) if prob]
    if colours.transforms:
        colours.transforms.insert(0, pil)
    return transforms.Compose(
        [*geometry, *flips, *colours.transforms, partial(to_pixels, in_chans=in_chans)]
    )


def eval_transform(
    size: tuple[int, int],
    *,
    in_chans: int = 3,
    interpolation: str = "bicubic",
    crop: bool = True,
    crop_ratio: float = 0.875,
    crop_mode: str = "center",
    colour: Sequence[float] = (0.0,),
    margin: bool = False,
) -> transforms.Compose:
    """PIL image, or array (H, W, in_chans), -> pixels, a uint8 array (*size, in_chans), without chance.

    With `crop`, beyond 32 pixels, the image is resized to `size` / `crop_ratio`, and its centre is cut out;
    else it is resized to `size`, whatever its proportions. Always by PIL, whose filters published figures
    come from.

    Args:
        crop_mode: center: keep the proportions and cover that larger size. squash: resize both sides to it.
            border: keep the proportions, fit into it, and fill up with `colour`. As timm has them.
        colour: per channel, in [0, 1]; one entry stands for all.
        margin: give the larger size, of which multi-crop evaluation cuts its crops.

    Raises:
        ValueError: unknown mode, or there is no margin.
    """
    sides = tuple(int(side / crop_ratio) for side in size)
    crops = crop and max(size) > SMALL_SIDE
    if margin and not (crops and sides > size):
        raise ValueError(
            f"TEST.TTA cuts crops out of a larger image: TEST.CROP={crop} must be True, DATA.IMG_SIZE="
            f"{list(size)} beyond {SMALL_SIDE} pixels, and TEST.CROP_RATIO={crop_ratio} below 1; or set "
            "TEST.TTA none or flip"
        )
    cut = sides if margin else size
    if not crops:
        geometry = [_resize(size, interpolation)]
    elif crop_mode == "center":
        geometry = [_cover(sides, interpolation), transforms.CenterCrop(cut)]
    elif crop_mode == "squash":
        geometry = [_resize(sides, interpolation), transforms.CenterCrop(cut)]
    elif crop_mode == "border":
        mode = _interpolation(interpolation).value
        fill = tuple(round(255 * value) for value in tuple(colour) * (in_chans // len(colour)))
        geometry = [
            ResizeKeepRatio(sides, longest=1.0, interpolation=mode),
            CenterCropOrPad(cut, fill=fill if in_chans > 1 else fill[0]),
        ]
    else:
        raise ValueError(
            f"TEST.CROP_MODE='{crop_mode}' must be one of ['center', 'squash', 'border']"
        )
    to_pil, to_array = (partial(f, in_chans=in_chans) for f in (to_image, to_pixels))
    return transforms.Compose([to_pil, *geometry, to_array])


class RandomCropResize(RandomResizedCropAndInterpolation):
    """timm's random resized crop, that also takes arrays (H, W, C), which stay arrays.

    The same random numbers choose the same crop of both.
    """

    @staticmethod
    def get_params(
        img: Any, scale: Sequence[float], ratio: Sequence[float]
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop, a pixel at least; timm's is empty in very narrow images."""
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
        return top - (height < 1 <= top), left - (width < 1 <= left), max(height, 1), max(width, 1)

    def draw(
        self, height: int, width: int
    ) -> tuple[tuple[int, int, int, int], transforms.InterpolationMode]:
        """Top, left, height and width of the crop of an image of this size, and the filter."""
        # An image of this size without pixels, for timm to draw a crop of.
        size_only = torch.empty((height, width), device="meta")
        place = self.get_params(size_only, self.scale, self.ratio)
        mode = self.interpolation
        return place, random.choice(mode) if isinstance(mode, tuple | list) else mode

    def __call__(self, image: Picture) -> Picture:
        if isinstance(image, Image.Image):
            return super().__call__(image)
        (top, left, height, width), mode = self.draw(*image.shape[:2])
        return resize_array(image[top : top + height, left : left + width], self.size, mode)


class PaddedCrop:
    """A window of a padded PIL image, at a random place.

    Args:
        size: (height, width) of the window in pixels.
        padding: pixels at top and bottom, and at left and right.
        reflect: pad with the mirrored image instead of black.
    """

    def __init__(
        self, size: tuple[int, int], padding: tuple[int, int], reflect: bool = False
    ) -> None:
        self.size, self.padding, self.reflect = size, padding, reflect

    def draw(self, rng: random.Random, height: int, width: int) -> tuple[int, int]:
        """Top and left of the window, from the padded corner, for an image of this size."""
        rows, columns = (
            side + 2 * padding - window
            for side, padding, window in zip((height, width), self.padding, self.size, strict=True)
        )
        return rng.randint(0, rows), rng.randint(0, columns)

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left = self.draw(random, image.height, image.width)
        mode = "reflect" if self.reflect else "constant"
        padded = F.pad(image, [self.padding[1], self.padding[0]], padding_mode=mode)
        return F.crop(padded, top, left, *self.size)


class RandomFlip:
    """Mirror a PIL image or an array (H, W, C): left to right (axis 1), or upside down (axis 0)."""

    def __init__(self, prob: float, axis: int) -> None:
        self.prob, self.axis = prob, axis

    def draw(self, rng: random.Random) -> bool:
        """Whether to mirror."""
        return rng.random() < self.prob

    def __call__(self, image: Picture) -> Picture:
        if not self.draw(random):
            return image
        if isinstance(image, np.ndarray):
            return cv2.flip(image, self.axis).reshape(image.shape)
        return F.hflip(image) if self.axis else F.vflip(image)


def draw_window(transform: transforms.Compose, height: int, width: int) -> Window:
    """What `train_transform` would show of an image of this size; draws the numbers that it would draw.

    Policies that rotate, shear or shift are not followed.

    Raises:
        ValueError: the transform pads images, so that a sample shows more than there is.
    """
    left, top, right, bottom = WHOLE
    for part in transform.transforms:
        if isinstance(part, RandomCropResize):
            (y, x, rows, columns), _ = part.draw(height, width)
            left, right = x / width, (x + columns) / width
            top, bottom = y / height, (y + rows) / height
        elif isinstance(part, PaddedCrop):
            raise ValueError(
                "label maps follow the resized crop only: set AUG.CROP resized, and DATA.IMG_SIZE beyond "
                f"{SMALL_SIDE} pixels, or AUG.SCALE [1, 1] for no crop"
            )
        elif isinstance(part, RandomFlip) and part.draw(random):
            if part.axis:
                left, right = right, left
            else:
                top, bottom = bottom, top
    return Window(left, top, right, bottom)


def resize_array(
    image: np.ndarray, size: tuple[int, int], mode: transforms.InterpolationMode
) -> np.ndarray:
    """uint8 array (H, W, C) -> (*size, C) with PIL's filters: a fifth of its time, within a level or two.

    OpenCV knows no antialiasing, which only a side that shrinks needs, and another bicubic filter. What it
    enlarges bilinearly is within one level, a seventh of a level darker on average.
    """
    enlarged = image.shape[0] <= size[0] and image.shape[1] <= size[1]
    if enlarged and mode == transforms.InterpolationMode.BILINEAR:
        resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        return resized.reshape(*size, -1)  # it drops a single channel
    # A copy, as arrays of PIL are read-only; the batch dimension first, so that its stride says what the
    # layout is: else PyTorch takes a slower path, and transposes the result.
    source = torch.from_numpy(image.copy()).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(source, size, mode=mode.value, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _check_policy(policy: str) -> None:
    """ValueError for a text that timm reads as no policy; its own errors name no key."""
    try:
        # timm passes over parts that it cannot read.
        for part in policy.split("-")[1:]:
            if not re.match(r"[a-z]+\d|t", part):
                raise ValueError(f"'{part}' is no letter with a number, as in m9 or mstd0.5")
        create_transform(64, is_training=True, auto_augment=policy)
    except (AssertionError, ValueError, LookupError) as error:
        raise ValueError(
            f"AUG.AUTO_AUGMENT='{policy}' must be a policy of timm (rand-m9-mstd0.5-inc1, original, "
            f"v0, 3a, augmix-m3) or none{f': {error}' if str(error) else ''}"
        ) from error


def _policy_ops(augmentation: Sequence[Any]) -> Iterator[AugmentOp]:
    """The single operations of timm's three kinds of policy."""
    for part in augmentation:
        yield from getattr(part, "ops", [])
        for sub_policy in getattr(part, "policy", []):
            yield from sub_policy


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, and black for 0 bits, as before Pillow 13.

    Pillow 13 refuses 0 bits, which "rand-m9-mstd0.5-inc1" asks for in one of 40 posterizations.
    """
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def _resize(size: tuple[int, int], interpolation: str) -> transforms.Resize:
    return transforms.Resize(size, _interpolation(interpolation))


def _cover(size: tuple[int, int], interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """Resize to cover `size`, keeping proportions."""
    mode = _interpolation(interpolation)
    # The shorter side of a square target: torchvision's rounding, which Swin's numbers come from.
    if size[0] == size[1]:
        return transforms.Resize(size[0], mode)
    return ResizeKeepRatio(size, interpolation=mode.value)


def _interpolation(name: str) -> transforms.InterpolationMode:
    """`random` is an augmentation; where nothing may be random it is bicubic."""
    return str_to_interp_mode("bicubic" if name == "random" else name)
