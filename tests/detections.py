"""Annotations and detections of a few images, as an evaluator gets them, and as COCO's files hold them."""

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

CATEGORY_IDS = (3, 7, 20)  # the data set's own ids of labels 0, 1 and 2
CLASSES = ("disc", "box", "sign")

Sample = tuple[dict[str, Any], dict[str, Any]]


def samples(num_images: int = 7, seed: int = 0) -> list[Sample]:
    """What `DetectionTask.predict` gives for each image, and its target: objects of all sizes, and crowds.

    Some images have no object, one has no detection, and one has 130 detections of one class. Scores have
    ties, as those of half precision have.
    """
    rng = np.random.default_rng(seed)
    made = []
    for index in range(num_images):
        height, width = int(rng.integers(150, 260)), int(rng.integers(150, 260))
        image_id = 500 - 7 * index  # not in the order of the ids
        objects = [_object(rng, height, width, crowd=k == 2) for k in range(0 if index == 3 else 4)]
        annotations, found = [], []
        for place, (annotation, mask) in enumerate(objects):
            annotations.append(
                annotation | dict(id=100 * index + place + 1, image_id=image_id, ignored_key="x")
            )
            if index != 5 and rng.random() < 0.9:
                found.append((mask, annotation["category_id"]))
        count = 130 if index == 1 else 3
        found += [
            (_object(rng, height, width, False)[1], 0 if count > 3 else int(rng.integers(3)))
            for _ in range(0 if index == 5 else count)
        ]
        moved = [np.roll(mask, int(rng.integers(-3, 4)), axis=1) for mask, _ in found]
        boxes = torch.tensor([_box(mask) for mask in moved]).view(-1, 4)
        output = dict(
            boxes=(boxes + torch.from_numpy(rng.normal(0, 1, boxes.shape)).float()).clamp(min=0),
            scores=torch.from_numpy(rng.integers(1, 20, len(found)) / 20).float(),
            labels=torch.tensor([label for _, label in found], dtype=torch.int64),
            masks=[run_lengths(mask) for mask in moved],
            bad=0,
        )
        output["boxes"][:, 2:] = output["boxes"][:, 2:].maximum(output["boxes"][:, :2])
        target = dict(
            image_id=image_id, original_size=(height, width), annotations=annotations, file=""
        )
        made.append((output, target))
    return made


def coco_content(made: list[Sample]) -> dict[str, Any]:
    """The annotations of samples in the layout of COCO's json, with the data set's own category ids."""
    targets = [target for _, target in made]
    return dict(
        info={},
        images=[
            dict(id=t["image_id"], height=t["original_size"][0], width=t["original_size"][1])
            for t in targets
        ],
        categories=[
            dict(id=key, name=name) for key, name in zip(CATEGORY_IDS, CLASSES, strict=True)
        ],
        annotations=[
            a | dict(category_id=CATEGORY_IDS[a["category_id"]])
            for t in targets
            for a in t["annotations"]
        ],
    )


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) -> compressed run lengths, as text."""
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=list(mask.shape), counts=code["counts"].decode())


def _object(
    rng: np.random.Generator, height: int, width: int, crowd: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """A box or a disc of 8 to 140 pixels: its annotation, and its mask."""
    side = int(8 * (140 / 8) ** rng.random())
    top, left = int(rng.integers(height - side)), int(rng.integers(width - side))
    y, x = np.mgrid[:height, :width]
    mask = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    right, bottom = left + side, top + side
    segmentation: Any = [[left, top, right, top, right, bottom, left, bottom]]
    if crowd or rng.random() < 0.5:
        mask &= (y - top - side / 2) ** 2 + (x - left - side / 2) ** 2 <= side**2 / 4
        segmentation = run_lengths(mask)
    x0, y0, x1, y1 = _box(mask)
    annotation = dict(
        category_id=int(rng.integers(3)),
        bbox=[x0, y0, x1 - x0, y1 - y0],
        area=float(mask.sum()),
        iscrowd=int(crowd),
        segmentation=segmentation,
    )
    return annotation, mask


def _box(mask: np.ndarray) -> list[float]:
    """xyxy around a mask."""
    y, x = np.nonzero(mask)
    return [float(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]
