"""Handwritten digits that come with scikit-learn: real images without a download."""

import numpy as np

from data.registry import ArrayImages, register_dataset


@register_dataset("digits")
class Digits(ArrayImages):
    """1,437 images to train on and 360 held out, 8x8 pixels, gray; always the same ones.

    `root` is not used.
    """

    def __init__(self, root: str, split: str) -> None:
        # Here, because it takes a second that the other formats need not wait for.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        indices = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
        )
        self._indices = np.sort(indices[0 if split == "train" else 1])
        # 17 gray levels, 0 ... 16 -> 0 ... 255
        self._images = np.round(digits.images[self._indices] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[self._indices]
        self.classes = [str(name) for name in digits.target_names]

    def describe(self, index: int) -> str:
        return f"scikit-learn's digit {self._indices[index]}"
