"""Random coloured shapes with boxes and masks, for smoke runs of detectors without any data."""

import colorsys
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from data.formats.coco import stored_target
from data.registry import SPLITS, DenseDataset, register_dataset

# Every so many images one has no object, and another one a crowd.
_EMPTY_EVERY, _CROWD_EVERY = 8, 5


@register_dataset("synthetic", task="detection")
class SyntheticDetection(DenseDataset):
    """Rectangles, ellipses and triangles on dark noise: image i of a split is the same on every machine.

    Class k has the colour k of a rainbow, and shape k % 3. One image in eight has no object, and one in five
    a crowd too, of small ones of a class.

    Args:
        img_size: (height, width) in pixels; every second image lies on its side.
        in_chans: must be 3, as classes are told apart by colour.
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
        masks: bool = False,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"DATA.SYNTHETIC.NUM_CLASSES={num_classes} must be at least 1")
        if in_chans != 3:
            raise ValueError(
                f"MODEL.IN_CHANS={in_chans}: the shapes of DATA.DATASET='synthetic' differ by colour, set it "
                "to 3"
            )
        if min(img_size) < 16:
            raise ValueError(
                f"DATA.IMG_SIZE={list(img_size)} leaves no room for the shapes of DATA.DATASET='synthetic'; "
                "they need 16 pixels"
            )
        self._img_size, self._masks = tuple(img_size), masks
        self._size = train_size if split == "train" else val_size
        self._split = SPLITS.index(split)
        self.classes = [f"class_{label}" for label in range(num_classes)]
        self.category_ids = list(range(1, num_classes + 1))

    def __len__(self) -> int:
        return self._size

    def read(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        rng = np.random.default_rng((self._split, index))
        height, width = self._img_size if index % 2 == 0 else self._img_size[::-1]
        noise = rng.integers(0, 64, (height, width, 3), np.uint8)
        canvas = Image.fromarray(noise)
        cells = _cells(rng, height, width)
        annotations = []
        if index % _EMPTY_EVERY != _EMPTY_EVERY - 1:
            # A cell is left for the crowd, and no object covers another one.
            for place, cell in enumerate(cells[: rng.integers(1, len(cells))]):
                # The first one's class goes round, so that a few images have them all.
                label = index if place == 0 else int(rng.integers(len(self.classes)))
                annotations.append(self._draw(rng, canvas, [cell], label % len(self.classes)))
            if index % _CROWD_EVERY == 1:
                parts = _quarters(cells[-1])
                annotations.append(self._draw(rng, canvas, parts, index % len(self.classes)))
        # Numbered over the data as a whole, from 1 on; no image has more than there are cells, 9.
        for number, annotation in enumerate(annotations, start=1 + 9 * index):
            annotation |= dict(id=number, image_id=index)
        record = dict(id=index, size=(height, width), annotations=annotations)
        return np.asarray(canvas), stored_target(record, f"{index}.png", self._masks)

    def _draw(
        self,
        rng: np.random.Generator,
        canvas: Image.Image,
        cells: list[tuple[int, int, int, int]],
        label: int,
    ) -> dict[str, Any]:
        """Draw one shape into each of the cells -> the annotation of all, a crowd if there are several."""
        colour = colorsys.hsv_to_rgb(label / len(self.classes), 1.0, 1.0)
        drawn = Image.new("1", canvas.size)
        for cell in cells:
            _draw_shape(ImageDraw.Draw(drawn), label % 3, _within(rng, cell))
        canvas.paste(tuple(round(255 * part) for part in colour), mask=drawn)
        mask = np.asarray(drawn)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        return dict(
            category_id=label,
            bbox=[left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
            area=int(mask.sum()),
            iscrowd=int(len(cells) > 1),
            segmentation=dict(size=runs["size"], counts=runs["counts"].decode("ascii")),
        )


def _cells(rng: np.random.Generator, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The cells of a grid of 2 x 2 or 3 x 3 (left, top, right, bottom), in any order."""
    sides = int(rng.integers(2, 4)) if min(height, width) >= 24 else 2
    xs, ys = (np.linspace(0, length, sides + 1).astype(int).tolist() for length in (width, height))
    cells = [(xs[i], ys[j], xs[i + 1], ys[j + 1]) for i in range(sides) for j in range(sides)]
    return [cells[place] for place in rng.permutation(len(cells))]


def _quarters(cell: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    left, top, right, bottom = cell
    x, y = (left + right) // 2, (top + bottom) // 2
    return [(left, top, x, y), (x, top, right, y), (left, y, x, bottom), (x, y, right, bottom)]


def _within(rng: np.random.Generator, cell: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """A box in a cell, at least half as wide and high: its first and last columns and rows."""
    spans = []
    for start, end in ((cell[0], cell[2]), (cell[1], cell[3])):
        length = int(rng.integers((end - start + 1) // 2, end - start + 1))
        first = int(rng.integers(start, end - length + 1))
        spans.append((first, first + length - 1))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _draw_shape(draw: ImageDraw.ImageDraw, shape: int, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    if shape == 0:
        draw.rectangle(box, fill=1)
    elif shape == 1:
        draw.ellipse(box, fill=1)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=1)
