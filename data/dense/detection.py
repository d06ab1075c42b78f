"""Detection samples: an image, its boxes and its masks are resized, cropped and flipped together.

The two training recipes of COCO: one side length per image (RetinaNet 1x), and the multi-scale training of
DETR (arXiv:2005.12872) and Sparse R-CNN, where every second image is resized, cropped and resized again.
Everything stays uint8; each draw comes from PyTorch's global generator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .sizes import scaled_size

# Less of an object than a pixel is nothing to learn from, and its width is the denominator of a target.
MIN_SIDE = 1.0

Transform = Callable[[tv_tensors.Image, dict[str, Any]], tuple[tv_tensors.Image, dict[str, Any]]]


class ResizeShortest(v2.Transform):
    """Resize so that the short side has one of some lengths, drawn for each image, and proportions stay.

    Sides are rounded to the nearest pixel, as in mmcv (`v2.RandomShortestSize` cuts them off, which makes
    799 of 800 for one image height in twenty).

    Args:
        short_sides: lengths in pixels.
        long_side: the most that the long side may have; then the short side is shorter.
    """

    def __init__(self, short_sides: Sequence[int], long_side: int) -> None:
        super().__init__()
        self.short_sides, self.long_side = list(short_sides), long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size (height, width) of this image."""
        sides = F.get_size(flat_inputs[0])
        short_side = self.short_sides[int(torch.randint(len(self.short_sides), ()))]
        scale = min(short_side / min(sides), self.long_side / max(sides))
        return dict(size=list(scaled_size(sides, scale)))

    def transform(self, part: Any, params: dict[str, Any]) -> Any:
        """Images antialiased; of masks the pixel under each centre, so that they stay in their boxes."""
        if isinstance(part, tv_tensors.Mask):
            return tv_tensors.wrap(
                resize_masks(part.as_subclass(Tensor), params["size"]), like=part
            )
        return F.resize(part, params["size"], antialias=True)


def resize_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(N, H, W) -> (N, *size): the same as "nearest-exact" of PyTorch, three times as fast.

    `F.resize` of a mask is "nearest", which takes the corner of each pixel: half a pixel too far.
    """
    resized = masks.numpy()
    for axis in (2, 1):
        old, new = resized.shape[axis], size[axis - 1]
        resized = resized.take((2 * np.arange(new) + 1) * old // (2 * new), axis)
    return torch.from_numpy(resized)


class RandomSidesCrop(v2.Transform):
    """A window at a random place, whose height and width are drawn from one range, each by itself.

    Args:
        sides: least and most pixels; an image that is smaller gives all it has.
    """

    def __init__(self, sides: Sequence[int]) -> None:
        super().__init__()
        self.least, self.most = sides

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Top, left, height and width of this image's window."""
        starts, lengths = [], []
        for side in F.get_size(flat_inputs[0]):
            length = _draw(min(side, self.least), min(side, self.most))
            starts.append(_draw(0, side - length))
            lengths.append(length)
        return dict(top=starts[0], left=starts[1], height=lengths[0], width=lengths[1])

    def transform(self, part: Any, params: dict[str, Any]) -> Any:
        """Boxes are clipped to the window."""
        return F.crop(part, **params)


def _draw(low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


def train_transform(
    *,
    short_sides: Sequence[int],
    long_side: int,
    hflip: float = 0.5,
    crop: bool = False,
    crop_short_sides: Sequence[int] = (400, 500, 600),
    crop_sides: Sequence[int] = (384, 600),
    photometric: bool = False,
) -> Transform:
    """Training augmentation of an image and what `to_target` gives.

    Args:
        short_sides: of which one is drawn for each image, in pixels; `long_side` is not exceeded.
        hflip: probability.
        crop: half of the images, by chance, are resized to one of `crop_short_sides`, cropped to a window
            with sides in the range `crop_sides`, and resized to one of `short_sides`.
        photometric: SSD's (arXiv:1512.02325): distort brightness, contrast, saturation and hue, and change
            the order of channels, each for half of the images.
    """
    resize = ResizeShortest(short_sides, long_side)
    geometry: v2.Transform = resize
    if crop:
        cropped = [ResizeShortest(crop_short_sides, long_side), RandomSidesCrop(crop_sides), resize]
        geometry = v2.RandomChoice([resize, v2.Compose(cropped)])
    # Colours first, where most images have the fewest pixels.
    colours = [v2.RandomPhotometricDistort()] if photometric else []
    return v2.Compose([*colours, v2.RandomHorizontalFlip(hflip), geometry])


def eval_transform(*, short_side: int, long_side: int) -> Transform:
    """Resize to one short side, without chance; lengths in pixels."""
    return ResizeShortest([short_side], long_side)


def decode_masks(segmentations: Sequence[Any], size: tuple[int, int]) -> np.ndarray:
    """COCO segmentations (polygons, or run lengths as a list or as text) -> uint8 (N, H, W) of 0 and 1.

    Args:
        size: (H, W) of the image they belong to.

    Raises:
        ValueError: a segmentation cannot be decoded to this size.
    """
    height, width = size
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        rle = segmentation
        if isinstance(segmentation, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            rle = coco_mask.frPyObjects(segmentation, height, width)
        if list(rle["size"]) != [height, width]:
            raise ValueError(
                f"a mask has the size {list(rle['size'])}, its image {[height, width]} (height, width)"
            )
        mask[:] = coco_mask.decode(rle)
    return masks


def to_target(
    stored: dict[str, Any], image_size: tuple[int, int], training: bool, masks: bool
) -> dict[str, Any]:
    """What a format stores of an image -> what transforms change: boxes (N, 4) in pixels, labels (N,), and
    with `masks` the masks (N, H, W) uint8. Crowds are left out in training.

    Args:
        image_size: (H, W) of the decoded image.
    """
    kept = ~stored["iscrowd"] if training else np.ones(len(stored["labels"]), bool)
    target = dict(
        boxes=tv_tensors.BoundingBoxes(
            torch.from_numpy(stored["boxes"][kept]), format="XYXY", canvas_size=image_size
        ),
        labels=torch.from_numpy(stored["labels"][kept]),
    )
    if masks:
        segmentations = [stored["masks"][index] for index in np.flatnonzero(kept)]
        target["masks"] = tv_tensors.Mask(torch.from_numpy(decode_masks(segmentations, image_size)))
    return target


def finish_target(target: dict[str, Any]) -> dict[str, Tensor]:
    """A transformed target -> plain tensors: boxes (N, 4) float32 within the image, labels (N,), masks bool.

    Objects of which less than a pixel of the box, or nothing of the mask, is left are gone.
    """
    boxes = F.clamp_bounding_boxes(target["boxes"]).as_subclass(Tensor)
    kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(dim=1)
    found = dict(boxes=boxes, labels=target["labels"])
    if "masks" in target:
        # A view: they hold 0 and 1 only.
        found["masks"] = target["masks"].as_subclass(Tensor).view(torch.bool)
        kept &= target["masks"].as_subclass(Tensor).flatten(1).amax(dim=1).bool()
    return found if kept.all() else {name: part[kept] for name, part in found.items()}


class DetectionSample:
    """Decoded image and stored target -> transformed image and target.

    Args:
        transform: of `train_transform` or `eval_transform`.
        training: leave crowds out; else the target has the image's `annotations`, as they are stored.
        masks: give masks in training. Evaluation has no use for them: it scores in the stored image's pixels.
    """

    def __init__(self, transform: Transform, training: bool, masks: bool) -> None:
        self.transform, self.training, self.masks = transform, training, masks and training

    def __call__(self, pixels: np.ndarray, stored: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """uint8 (H, W, 3), and what a detection format stores -> uint8 (3, h, w), and a dict.

        Its keys: boxes (N, 4) xyxy in pixels of (h, w), labels (N,), size (h, w), original_size (H, W),
        image_id, file; in training masks (N, h, w) bool, if they are wanted; in evaluation annotations, in
        pixels of (H, W).

        Raises:
            ValueError: the image has another size than its annotations are for.
        """
        original_size = pixels.shape[:2]
        if tuple(stored["size"]) != original_size:
            raise ValueError(
                f"{stored['file']} has {list(original_size)} pixels (height, width), its annotations are "
                f"for {list(stored['size'])}"
            )
        image = tv_tensors.Image(torch.tensor(pixels).permute(2, 0, 1))
        target = to_target(stored, original_size, self.training, self.masks)
        image, target = self.transform(image, target)
        found = dict(
            **finish_target(target),
            size=tuple(image.shape[-2:]),
            original_size=original_size,
            image_id=stored["image_id"],
            file=stored["file"],
        )
        if not self.training:
            found["annotations"] = stored["annotations"]
        return image.as_subclass(Tensor), found
