"""Small detection datasets on disk, in the layout of COCO: coloured shapes on a dark ground.

contents = write_coco(tmp_path)                   # annotations/instances_{train,val}2017.json, images
contents["val"]["annotations"]                    # what the file holds, in original category ids
rewrite(tmp_path, "val", contents["val"])         # after a change: the file is written again
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Original ids have gaps and are in no order, as in COCO (1 ... 90 for 80 classes) and in real life.
CATEGORIES = {7: "square", 3: "disc", 20: "triangle"}
_COLOURS = {"square": (220, 40, 40), "disc": (40, 220, 40), "triangle": (60, 90, 240)}


def write_coco(
    root: Path,
    splits: Sequence[str] = ("train", "val"),
    num_images: int | Mapping[str, int] = 4,
    *,
    size: tuple[int, int] = (48, 64),
    year: str = "2017",
    categories: Mapping[int, str] = CATEGORIES,
    masks: bool = True,
    crowd: bool = True,
    empty: bool = True,
    suffix: str = ".png",
    first_id: int = 100,
) -> dict[str, dict[str, Any]]:
    """Images, and `annotations/instances_<split><year>.json` -> what was written into each of these.

    Image i has 1 + i % 3 objects of (height, width) = `size`, every second image lies on its side; squares
    and triangles have polygons, discs uncompressed run lengths; areas and boxes are those of the pixels.

    Args:
        num_images: of each split.
        masks: give objects their `segmentation`; else it is an empty list.
        crowd: the first image of each split has a crowd too.
        empty: the last image of each split has no annotation, if it is not the first one.
        first_id: of the annotations of a split.
    """
    contents = {}
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        count = num_images if isinstance(num_images, int) else num_images[split]
        images, annotations = [], []
        for index in range(count):
            height, width = size if index % 2 == 0 else size[::-1]
            name = f"{split}_{index:03d}{suffix}"
            image_id = 1000 * (number + 1) + 7 * index
            images.append(dict(id=image_id, file_name=name, height=height, width=width))
            pixels = rng.integers(0, 40, (height, width, 3), np.uint8)
            last = empty and index == count - 1 > 0
            for place in range(0 if last else 1 + index % 3):
                label = (index + place) % len(categories)
                found = _object(rng, pixels, list(categories.items())[label], place)
                annotations.append(found | dict(image_id=image_id))
            if crowd and index == 0:
                category, name_of_it = next(iter(categories.items()))
                found = _object(rng, pixels, (category, name_of_it), 3)
                mask = found.pop("mask")
                annotations.append(
                    found
                    | dict(image_id=image_id, iscrowd=1, mask=mask, segmentation=run_lengths(mask))
                )
            folder = root / f"{split}{year}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
        for position, annotation in enumerate(annotations):
            annotation.pop("mask")
            annotation["id"] = first_id + position
            if not masks:
                annotation["segmentation"] = []
        contents[split] = dict(
            info={},
            images=images,
            annotations=annotations,
            categories=[dict(id=key, name=name) for key, name in categories.items()],
        )
        rewrite(root, split, contents[split], year=year)
    return contents


def rewrite(root: Path, split: str, content: Any, year: str = "2017") -> Path:
    """Write the annotation file of a split -> its path."""
    path = root / "annotations" / f"instances_{split}{year}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool -> COCO's uncompressed run lengths: of zeros, ones, zeros, ..., column by column."""
    flat = mask.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    return dict(counts=np.diff(edges, prepend=0).tolist(), size=list(mask.shape))


def _object(
    rng: np.random.Generator, pixels: np.ndarray, category: tuple[int, str], place: int
) -> dict[str, Any]:
    """Draw one object into a quarter of `pixels` -> its annotation, with its mask (H, W) bool."""
    key, name = category
    height, width = pixels.shape[:2]
    rows, columns = height // 2, width // 2
    side = int(rng.integers(max(4, min(rows, columns) // 2), min(rows, columns)))
    top = (place // 2) * rows + int(rng.integers(0, rows - side + 1))
    left = (place % 2) * columns + int(rng.integers(0, columns - side + 1))
    y, x = np.mgrid[:height, :width] + 0.5
    inside = (y > top) & (y < top + side) & (x > left) & (x < left + side)
    corners = [left, top, left + side, top, left + side, top + side, left, top + side]
    segmentation: Any = [corners]
    if name == "disc":
        mask = (y - top - side / 2) ** 2 + (x - left - side / 2) ** 2 <= (side / 2) ** 2
        segmentation = run_lengths(mask)
    elif name == "triangle":
        mask = inside & (x - left <= y - top)
        segmentation = [[left, top, left + side, top + side, left, top + side]]
    else:
        mask = inside
    pixels[mask] = _COLOURS.get(name, (200, 200, 60))
    y, x = np.nonzero(mask)
    box = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
    return dict(
        category_id=key,
        bbox=[float(value) for value in box],
        area=float(mask.sum()),
        iscrowd=0,
        segmentation=segmentation,
        mask=mask,
    )
