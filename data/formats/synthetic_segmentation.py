"""Coloured shapes on a dark ground, for smoke runs and speed measurements without any data."""

from typing import Any

import cv2
import numpy as np

from data.masks import IGNORED, MAX_CLASSES
from data.registry import SPLITS, DenseDataset, register_dataset

_SHAPES = 4  # per image
_BORDER = 2  # pixels around a shape that do not count, as in PASCAL VOC
_NOISE = 32  # gray levels, a power of two


@register_dataset("synthetic", task="segmentation")
class SyntheticSegmentation(DenseDataset):
    """Discs, rectangles and triangles: image i of a split is the same on every machine.

    Label 0 is the ground; another one is a shape of the kind and the colour of its class, with noise.

    Args:
        img_size: (height, width) in pixels.
        in_chans: 1 or 3.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        img_size: tuple[int, int],
        in_chans: int = 3,
        train_size: int = 256,
        val_size: int = 64,
        num_classes: int = 10,
    ) -> None:
        if not 1 <= num_classes <= MAX_CLASSES:
            raise ValueError(
                f"DATA.SYNTHETIC.NUM_CLASSES={num_classes} must be 1 to {MAX_CLASSES} for segmentation"
            )
        self._img_size, self._size = tuple(img_size), train_size if split == "train" else val_size
        self._split = split
        shape = (num_classes, in_chans)
        self._colours = np.random.default_rng(0).integers(64, 256 - _NOISE, shape, np.uint8)
        self._colours[0] = 0
        self.classes = ["ground", *(f"shape_{label}" for label in range(1, num_classes))]

    def __len__(self) -> int:
        return self._size

    def describe(self, index: int) -> str:
        return f"synthetic {self._split} image {index}"

    def read(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        rng = np.random.default_rng((SPLITS.index(self._split), index))
        painted = np.zeros(self._img_size, np.uint8)
        mask = np.zeros(self._img_size, np.uint8)
        if len(self.classes) > 1:
            for _ in range(_SHAPES):
                label = int(rng.integers(1, len(self.classes)))
                corners = _outline(label, rng, self._img_size)
                cv2.fillPoly(painted, [corners], label)
                cv2.fillPoly(mask, [corners], label)
                cv2.polylines(mask, [corners], True, IGNORED, _BORDER)
        image = self._colours.take(painted, axis=0)  # (H, W, in_chans)
        # All bytes, then the low bits: ten times as fast as numbers below a bound.
        image += rng.integers(0, 256, image.shape, np.uint8) & np.uint8(_NOISE - 1)
        return image, dict(mask=mask, image_id=index, file=self.describe(index))


def _outline(label: int, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Corners (N, 2), x and y in pixels, of the kind of shape that a label has, somewhere in an image."""
    reach = rng.uniform(0.15, 0.3) * min(size)
    centre = rng.uniform(0, 1, 2) * size[::-1]
    sides = (32, 4, 3)[label % 3]
    angles = 2 * np.pi * np.arange(sides) / sides + np.pi / 4
    corners = centre + reach * np.stack([np.cos(angles), np.sin(angles)], -1)
    return corners.round().astype(np.int32)
