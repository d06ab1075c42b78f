"""From a stored image to a normalised tensor: training augmentation and evaluation geometry."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ResizeKeepRatio, create_transform, str_to_interp_mode
from timm.data.auto_augment import AugmentOp
from torch import Tensor
from torchvision import transforms

# Up to this size a shifted crop replaces the random resized crop: small images are the whole object.
SMALL_SIDE = 32
# Modes of PIL by number of channels.
_MODES = {1: "L", 3: "RGB"}

Transform = Callable[[Image.Image], Tensor]


def to_image(image: Image.Image | np.ndarray, in_chans: int) -> Image.Image:
    """Stored image, or uint8 array (H, W) or (H, W, 1 or 3), -> PIL image with `in_chans` channels."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    mode = _MODES[in_chans]
    return image if image.mode == mode else image.convert(mode)


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
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float = 0.0,
    auto_augment: str = "none",
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
) -> Transform:
    """PIL image with `in_chans` channels -> augmented, normalised tensor (in_chans, *size).

    Up to 32 pixels the crop is the one of the CIFAR recipes: the image, padded by an eighth of its size
    (4 pixels of 32) and shifted; beyond, it is a random resized crop. A `scale` of (1, 1) takes no crop
    at all: the image is resized to `size`.

    Args:
        size: (height, width) in pixels.
        interpolation: bicubic, bilinear, or random (one of both per image).
        scale: smallest and largest share of the image's area; `ratio` is width / height.
        hflip: probability; so is vflip.
        color_jitter: strength of brightness, contrast and saturation; policies take its place.
        auto_augment: a policy string of timm (rand-..., original, augmix-...), or "none".
        re_prob: probability of random erasing; re_mode pixel, const or rand, re_count areas at most.
    """
    mean, std = channel_stats(mean, std, in_chans)
    policy = None if auto_augment.lower() in ("none", "") else auto_augment
    if policy:
        _check_policy(policy)
    geometry, augmentation, normalisation = create_transform(
        size,
        is_training=True,
        scale=tuple(scale),
        ratio=tuple(ratio),
        hflip=hflip,
        vflip=vflip,
        # 0.0 would add a jitter that does nothing, and still draw random numbers for it.
        color_jitter=color_jitter or None,
        auto_augment=policy,
        interpolation=interpolation,
        mean=mean,
        std=std,
        re_prob=re_prob,
        re_mode=re_mode,
        re_count=re_count,
        separate=True,
    )
    for op in _policy_ops(augmentation.transforms):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    crop, *flips = geometry.transforms
    if tuple(scale) == (1, 1):
        crop = _resize(size, interpolation)
    elif max(size) <= SMALL_SIDE:
        padding = (round(size[1] / 8), round(size[0] / 8))  # left and right, top and bottom
        crop = transforms.Compose(
            [_resize(size, interpolation), transforms.RandomCrop(size, padding=padding)]
        )
    return transforms.Compose([crop, *flips, *augmentation.transforms, *normalisation.transforms])


def eval_transform(
    size: tuple[int, int],
    *,
    in_chans: int = 3,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop: bool = True,
) -> Transform:
    """PIL image with `in_chans` channels -> normalised tensor (in_chans, *size), without chance.

    With `crop`, beyond 32 pixels, the image is resized to 256/224 of `size`, keeping its proportions and
    covering it, and its centre is cut out; else it is resized to `size`, whatever its proportions.
    """
    mean, std = channel_stats(mean, std, in_chans)
    if crop and max(size) > SMALL_SIDE:
        sides = tuple(int(256 / 224 * side) for side in size)
        mode = _interpolation(interpolation)
        # The shorter side of a square target: torchvision's rounding, which Swin's numbers come from.
        cover = (
            transforms.Resize(sides[0], mode)
            if sides[0] == sides[1]
            else ResizeKeepRatio(sides, interpolation=mode.value)
        )
        geometry = [cover, transforms.CenterCrop(size)]
    else:
        geometry = [_resize(size, interpolation)]
    normalise = transforms.Normalize(torch.tensor(mean), torch.tensor(std))
    return transforms.Compose([*geometry, transforms.ToTensor(), normalise])


def _check_policy(policy: str) -> None:
    """ValueError for a text that timm reads as no policy; its own errors name no key."""
    try:
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


def _interpolation(name: str) -> transforms.InterpolationMode:
    """`random` is an augmentation; where nothing may be random it is bicubic."""
    return str_to_interp_mode("bicubic" if name == "random" else name)
