"""Stored labels of the positions of images, as LV-ViT releases them for ImageNet (arXiv:2104.10858).

A folder mirrors that of the images: `n01440764/n01440764_10026.pt` belongs to the image
`n01440764/n01440764_10026.JPEG` and holds a tensor (2, k, h, w): scores of the k best classes of each
position, before any softmax, and these classes. The positions are those of the whole image, stretched to the
map's grid.
"""

from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from torch import Tensor

from utils.checkpoint_files import load_file

from .transforms import WHOLE, Window

# Whole numbers that half precision, in which the maps are stored, can tell apart.
_MOST_CLASSES = 2048


class MapLabel(NamedTuple):
    """Label of an image, its map (2, k, h, w) float16, and the part of the image that a sample shows."""

    label: int
    scores: np.ndarray
    window: Window = WHOLE


class MappedLabels(NamedTuple):
    """Labels (B,) int64, maps (B, 2, k, h, w) float16 and windows (B, 4) float32 of a batch."""

    labels: Tensor
    scores: Tensor
    windows: Tensor


class LabelMaps:
    """The maps below `root`, found by the names of their images.

    Raises:
        ValueError: there is no such folder, or more classes than a map can tell apart.
    """

    def __init__(self, root: str, num_classes: int) -> None:
        self.root, self.num_classes = Path(root), num_classes
        if not self.root.is_dir():
            raise ValueError(
                f"TRAIN.TOKEN_LABELS.MAPS='{root}' is no folder: it must hold CLASS/IMAGE.pt for each image"
            )
        if num_classes > _MOST_CLASSES:
            raise ValueError(
                f"TRAIN.TOKEN_LABELS.MAPS: maps tell {_MOST_CLASSES} classes apart, the data has "
                f"{num_classes}; name a TEACHER instead"
            )

    def path(self, image: str) -> Path:
        """File of the map that belongs to an image."""
        place = PurePath(image)
        # Up to the first dot, as the program that writes them has it.
        return self.root / place.parent.name / f"{place.name.partition('.')[0]}.pt"

    def read(self, image: str) -> np.ndarray:
        """Map (2, k, h, w) float16 of an image; ValueError if it is none, or has other classes."""
        path = self.path(image)
        content = load_file(path)
        if not isinstance(content, Tensor) or content.ndim != 4 or len(content) != 2:
            found = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
            raise ValueError(
                f"label map {path} must be a tensor (2, k, height, width), not {found}"
            )
        classes = content[1]
        if classes.min() < 0 or classes.max() >= self.num_classes:
            raise ValueError(
                f"label map {path} names class {int(classes.max())}, the data has {self.num_classes}"
            )
        return content.half().numpy()
