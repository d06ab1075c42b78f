"""Random images, for smoke runs and speed measurements without any data."""

import numpy as np

from data.registry import SPLITS, ImageDataset, register_dataset


@register_dataset("synthetic")
class Synthetic(ImageDataset):
    """Noise around a colour of its class: image i of a split is the same on every machine.

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
        if num_classes < 1:
            raise ValueError(f"DATA.SYNTHETIC.NUM_CLASSES={num_classes} must be at least 1")
        self._shape = (*img_size, in_chans)
        self._size = train_size if split == "train" else val_size
        self._split = SPLITS.index(split)
        # The colour makes the classes learnable, so that a smoke run's loss can fall.
        self._colours = np.random.default_rng(0).integers(0, 128, (num_classes, in_chans), np.uint8)
        self.classes = [f"class_{label}" for label in range(num_classes)]

    def __len__(self) -> int:
        return self._size

    def read(self, index: int) -> tuple[np.ndarray, int]:
        label = index % len(self.classes)
        noise = np.random.default_rng((self._split, index)).integers(0, 128, self._shape, np.uint8)
        return noise + self._colours[label], label
