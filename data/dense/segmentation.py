"""Segmentation samples: an image and its mask are rescaled, cropped, flipped and padded together.

The recipe of ADE20K, as mmsegmentation has it: rescale by a random ratio, a crop in which no class covers too
much, flip, photometric distortion. Everything stays uint8; each draw comes from PyTorch's global generator.
Images are interpolated bilinearly, without antialiasing, as OpenCV does for the published figures; masks take
the label at the centre of each new pixel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data.masks import IGNORED, check_size

from .sizes import scaled_size

CROP_TRIES = 10

Transform = Callable[[tv_tensors.Image, dict[str, Any]], tuple[tv_tensors.Image, dict[str, Any]]]


def rescaled_size(size: Sequence[int], within: Sequence[int]) -> tuple[int, int]:
    """Height and width of an image that is rescaled to fit into (long, short), proportions kept.

    The factor is the largest with which the long side is at most `long` and the short side at most `short`.

    Args:
        within: the long and the short side, in either order.
    """
    return scaled_size(size, min(max(within) / max(size), min(within) / min(size)))


class RandomRescale(v2.Transform):
    """Rescale to fit into (long, short) times a random ratio.

    Args:
        resize: long and short side in pixels.
        ratios: smallest and largest; one is drawn for each image, uniformly.
    """

    def __init__(self, resize: Sequence[int], ratios: Sequence[float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.resize, self.ratios = tuple(resize), tuple(ratios)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size (height, width) of this image."""
        low, high = self.ratios
        ratio = low if low == high else float(torch.empty(()).uniform_(low, high))
        within = [int(side * ratio) for side in self.resize]
        return dict(size=list(rescaled_size(F.get_size(flat_inputs[0]), within)))

    def transform(self, part: Any, params: dict[str, Any]) -> Any:
        """Images bilinear; masks nearest to the centre (`F.resize` of a mask takes a corner instead)."""
        if isinstance(part, tv_tensors.Mask):
            labels = part.as_subclass(Tensor)
            labels = F.resize_image(labels, params["size"], InterpolationMode.NEAREST_EXACT)
            return tv_tensors.wrap(labels, like=part)
        return F.resize(part, params["size"], antialias=False)


class BalancedCrop(v2.Transform):
    """A window at a random place, in which no class covers more than a share of the labelled pixels.

    A window is drawn again if one does, or if no pixel has a label, up to 10 times; what is drawn then is
    taken as it is. Images that are smaller than the window are not cropped on that side.

    Args:
        size: (height, width) in pixels.
        max_class_share: 1 takes the first window.
    """

    def __init__(self, size: Sequence[int], max_class_share: float = 1.0) -> None:
        super().__init__()
        self.size, self.max_class_share = tuple(size), max_class_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Top, left, height and width of this image's window."""
        sides = F.get_size(flat_inputs[0])
        lengths = [min(window, side) for window, side in zip(self.size, sides, strict=True)]
        rooms = [side - length for side, length in zip(sides, lengths, strict=True)]
        window = self._draw(rooms, lengths)
        if self.max_class_share < 1:
            mask = next(found for found in flat_inputs if isinstance(found, tv_tensors.Mask))
            labels = mask[0].numpy()
            for _ in range(CROP_TRIES):
                if not any(rooms) or self._balanced(labels, **window):
                    break
                window = self._draw(rooms, lengths)
        return window

    def transform(self, part: Any, params: dict[str, Any]) -> Any:
        """The window of an image or a mask."""
        return F.crop(part, **params)

    def _draw(self, rooms: Sequence[int], lengths: Sequence[int]) -> dict[str, int]:
        top, left = (int(torch.randint(room + 1, ())) for room in rooms)
        return dict(top=top, left=left, height=lengths[0], width=lengths[1])

    def _balanced(self, labels: np.ndarray, top: int, left: int, height: int, width: int) -> bool:
        window = labels[top : top + height, left : left + width]
        counts = cv2.calcHist([window], [0], None, [256], [0, 256]).ravel()  # 0.1 ms for 512x512
        labelled = counts[:IGNORED]
        total = labelled.sum(dtype=np.float64)
        return bool(total > 0 and labelled.max() <= self.max_class_share * total)


class PhotometricDistortion(v2.Transform):
    """Brightness, contrast, saturation and hue, each changed for half of the images; masks stay.

    As mmsegmentation has it, after SSD (arXiv:1512.02325): brightness adds to all channels, contrast
    multiplies all, before or after the other two; saturation and hue change in HSV. torchvision's
    RandomPhotometricDistort multiplies brightness, mixes with gray images, and exchanges channels. Here both
    change in one turn through HSV instead of one each: on photographs 0.05 of 255 apart, 5 at most.

    Args:
        brightness: largest value that is added or subtracted, of 255.
        contrast, saturation: smallest and largest factor.
        hue: largest turn in steps of 2 degrees, OpenCV's for bytes: 18 are the 36 degrees that mmsegmentation
            turns, while SSD, with floats, turns 18 degrees.
    """

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: int = 18,
    ) -> None:
        super().__init__()
        self.brightness, self.hue = brightness, hue
        self.contrast, self.saturation = tuple(contrast), tuple(saturation)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """What is added or multiplied, 0 or 1 where nothing changes; and when the contrast changes."""
        chosen = (torch.rand(5) < 0.5).tolist()
        lows = torch.tensor([-self.brightness, self.contrast[0], self.saturation[0]])
        highs = torch.tensor([self.brightness, self.contrast[1], self.saturation[1]])
        added, contrast, saturation = (lows + (highs - lows) * torch.rand(3)).tolist()
        turn = int(torch.randint(-self.hue, self.hue + 1, ()))
        return dict(
            brightness=added if chosen[0] else 0.0,
            contrast=contrast if chosen[1] else 1.0,
            saturation=saturation if chosen[2] else 1.0,
            hue=turn if chosen[3] else 0,
            contrast_first=chosen[4],
        )

    def transform(self, part: Any, params: dict[str, Any]) -> Any:
        """uint8 (C, H, W) -> the same, with tables of 256 values; gray images have no colour to change."""
        if not isinstance(part, tv_tensors.Image):
            return part
        pixels = np.ascontiguousarray(part.permute(1, 2, 0).numpy())  # (H, W, C)
        early = params["contrast"] if params["contrast_first"] else 1.0
        late = 1.0 if params["contrast_first"] else params["contrast"]
        if params["brightness"] or early != 1:
            pixels = cv2.LUT(pixels, _linear(early)[_linear(1.0, params["brightness"])])
        if part.shape[0] == 3 and (params["saturation"] != 1 or params["hue"]):
            hues = ((np.arange(256) + params["hue"]) % 180).astype(np.uint8)
            tables = np.stack([hues, _linear(params["saturation"]), _linear(1.0)], -1)
            hsv = cv2.LUT(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), tables[None])
            pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if late != 1:
            pixels = cv2.LUT(pixels, _linear(late))
        pixels = pixels.reshape(
            *part.shape[1:], -1
        )  # OpenCV leaves out the axis of a single channel
        return tv_tensors.wrap(torch.from_numpy(pixels).permute(2, 0, 1), like=part)


def _linear(factor: float, added: float = 0.0) -> np.ndarray:
    """uint8 value -> factor * value + added, within 0 to 255, rounded down; a table (256,)."""
    return np.clip(np.arange(256) * factor + added, 0, 255).astype(np.uint8)


class PadTo(v2.Transform):
    """Pad an image with 0 and its mask with 255, at the right and the bottom, to at least a size.

    The target's `size` is what the image had, so that the padding can be made 0 again after normalisation.
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(
        self, image: tv_tensors.Image, target: dict[str, Any]
    ) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """Image (C, H, W) and mask (1, H, W), to H and W of at least `size`."""
        height, width = F.get_size(image)
        padding = [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]
        mask = target["mask"]
        if any(padding):
            image, mask = F.pad(image, padding, fill=0), F.pad(mask, padding, fill=IGNORED)
        return image, target | dict(mask=mask, size=(height, width))


def train_transform(
    *,
    resize: Sequence[int] = (2048, 512),
    ratios: Sequence[float] = (0.5, 2.0),
    crop: Sequence[int] = (512, 512),
    max_class_share: float = 0.75,
    hflip: float = 0.5,
    photometric: bool = True,
) -> Transform:
    """Training augmentation of an image (C, H, W) and dict(mask=(1, H, W)), both uint8.

    All come out in at least the size `crop`, padded where they must, so that batches have one size.

    Args:
        resize: long and short side that an image fits into, pixels, before one of `ratios` is multiplied.
        ratios: smallest and largest.
        crop: (height, width) in pixels.
        max_class_share: a crop is drawn again if one class covers more than this of its labelled pixels.
        hflip: probability.
        photometric: distort brightness, contrast, saturation and hue.

    Raises:
        ValueError: sides, ratios or a share that are none.
    """
    _check_pair("AUG.SEGMENTATION.RESIZE", resize, "[long, short] sides, pixels")
    _check_pair("AUG.SEGMENTATION.CROP", crop, "[height, width], pixels")
    if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1] or int(min(resize) * ratios[0]) < 1:
        raise ValueError(
            f"AUG.SEGMENTATION.RATIOS={list(ratios)} must be [smallest, largest] factor on RESIZE="
            f"{list(resize)}, and leave at least a pixel"
        )
    if not 0 < max_class_share <= 1:
        raise ValueError(f"AUG.SEGMENTATION.MAX_CLASS_SHARE={max_class_share} must be in (0, 1]")
    steps = [
        RandomRescale(resize, ratios),
        BalancedCrop(crop, max_class_share),
        v2.RandomHorizontalFlip(hflip),
        *([PhotometricDistortion()] if photometric else []),
        PadTo(crop),
    ]
    return v2.Compose(steps)


def eval_transform(*, resize: Sequence[int] = (2048, 512)) -> Transform:
    """Rescale to fit into (long, short), without chance; ValueError for sides that are none."""
    _check_pair("TEST.SEGMENTATION.RESIZE", resize, "[long, short] sides, pixels")
    return RandomRescale(resize)


def _check_pair(key: str, values: Sequence[int], meaning: str) -> None:
    if len(values) != 2 or min(values) < 1:
        raise ValueError(f"{key}={list(values)} must be {meaning}")


class SegmentationSample:
    """Decoded image and stored mask -> transformed image and target.

    Args:
        transform: of `train_transform` or `eval_transform`.
        training: transform the mask too; in evaluation it stays as it is stored.
    """

    def __init__(self, transform: Transform, training: bool) -> None:
        self.transform, self.training = transform, training

    def __call__(self, pixels: np.ndarray, stored: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """uint8 (H, W, C), and what a segmentation format stores -> uint8 (C, H', W'), and a dict with mask
        int64, (H', W') in training and (H, W) in evaluation; size (height, width) of the image without
        padding, original_size (H, W), image_id, file.

        Raises:
            ValueError: the mask has another size than the image.
        """
        original_size = pixels.shape[:2]
        check_size(stored["mask"], original_size, stored["file"])
        image = tv_tensors.Image(torch.tensor(pixels).permute(2, 0, 1))
        mask = torch.from_numpy(stored["mask"])
        target = dict(mask=tv_tensors.Mask(mask[None])) if self.training else {}
        image, target = self.transform(image, target)
        if self.training:
            mask = target["mask"][0]
        return image.as_subclass(Tensor), dict(
            mask=mask.as_subclass(Tensor).to(torch.int64),
            size=target.get("size", tuple(image.shape[-2:])),
            original_size=tuple(original_size),
            image_id=stored["image_id"],
            file=stored["file"],
        )
