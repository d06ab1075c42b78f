"""How sides of images are rounded when they are rescaled, the same in training, evaluation and testing."""

from collections.abc import Sequence


def scaled_size(size: Sequence[int], factor: float) -> tuple[int, int]:
    """(height, width) in pixels times `factor`, to the nearest pixel, halves up, as in mmcv; at least 1."""
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width
