"""Tiny segmentation data in the layouts that users bring. The colour of a pixel tells its class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (24, 40)  # height, width
BLOCK = 8  # pixels of a block of one class


def colour_of(value):
    """The colour that a pixel with this mask value has in images; array of values -> uint8 (..., 3)."""
    value = np.asarray(value, np.int64)
    return np.stack([37 * value % 256, 91 * value % 256, 151 * value % 256], -1).astype(np.uint8)


def blocks(values: Sequence[int], size=SIZE, seed=0) -> np.ndarray:
    """A uint8 mask of blocks, all of `values` among them where there are blocks enough."""
    height, width = size
    shape = -(-height // BLOCK), -(-width // BLOCK)
    count = shape[0] * shape[1]
    drawn = np.resize(np.asarray(values, np.uint8), count)
    np.random.default_rng(seed).shuffle(drawn)
    return np.kron(drawn.reshape(shape), np.ones((BLOCK, BLOCK), np.uint8))[:height, :width]


def write_image(path: Path, pixels: np.ndarray, **options) -> None:
    """Write (H, W) or (H, W, C) in the format of the ending; JPEG nearly without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        options = dict(quality=98, subsampling=0) | options
    Image.fromarray(pixels).save(path, **options)


def write_ade(root, *, train=4, val=2, num_classes=3, size=SIZE, names=True) -> list[str]:
    """ADE20K's layout: mask value 0 is ignored, 1 ... num_classes are the classes -> class names.

    Args:
        names: write `objectInfo<num_classes>.txt`.
    """
    root, classes = Path(root), [f"thing {number}" for number in range(1, num_classes + 1)]
    for folder, count, seed in (("training", train, 0), ("validation", val, 100)):
        for index in range(count):
            mask = blocks(range(num_classes + 1), size, seed + index)
            stem = f"ADE_{folder}_{index:04d}"
            write_image(root / "images" / folder / f"{stem}.jpg", colour_of(mask))
            write_image(root / "annotations" / folder / f"{stem}.png", mask)
    if names:
        lines = ["Idx\tName", *(f"{i}\t{name}" for i, name in enumerate(classes, 1))]
        (root / f"objectInfo{num_classes}.txt").write_text("\n".join(lines) + "\n")
    return classes


def write_cityscapes(root, *, train=2, val=1, size=SIZE, values=(0, 7, 11, 33), train_ids=False):
    """Cityscapes' layout with `values` in masks of ids, or of training ids."""
    root, kind = Path(root), "labelTrainIds" if train_ids else "labelIds"
    for split, count, city in (("train", train, "ulm"), ("val", val, "bonn")):
        for index in range(count):
            mask = blocks(values, size, index)
            stem = f"{city}_{index:06d}_000019"
            write_image(
                root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", colour_of(mask)
            )
            write_image(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", mask)


def write_pairs(root, *, train=3, val=2, num_classes=3, size=SIZE, colours=None, endings=None):
    """`images/{train,val}` and `annotations/{train,val}` with masks of 0 ... num_classes - 1.

    Args:
        colours: (num_classes, 3); masks are RGB with these.
        endings: of image and mask files, with the dot; .jpg and .png.
    """
    root, (image_ending, mask_ending) = Path(root), endings or (".jpg", ".png")
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            mask = blocks(range(num_classes), size, index)
            stored = mask if colours is None else np.asarray(colours, np.uint8)[mask]
            write_image(root / "images" / split / f"{split}{index}{image_ending}", colour_of(mask))
            write_image(root / "annotations" / split / f"{split}{index}{mask_ending}", stored)
