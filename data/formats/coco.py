"""COCO's json files (cocodataset.org/#format-data), of COCO itself or of anything else with boxes."""

import json
import logging
import math
import os
import pickle
import posixpath
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from data.decoders import is_turned
from data.registry import DAMAGED, DenseDataset, missing, register_dataset

_LOG = logging.getLogger(__name__)

LAYOUT = (
    "annotations/instances_<split>2017.json and <split>2017/<image>, both also without 2017; or name other "
    "places by DATA.COCO.TRAIN, VAL, TRAIN_IMAGES and VAL_IMAGES"
)
_YEARS = ("2017", "")


@register_dataset("coco", task="detection", num_classes=80, train_size=118_287)
class CocoImages(DenseDataset):
    """Images with boxes, and masks if they are asked for, of any categories.

    Labels number the categories by rising id, as everybody's do; `category_ids` leads back. Images that have
    no annotation are there too, and so are crowds (`iscrowd`): a sample leaves them out in training. An
    annotation without `area` has that of its box; one without `iscrowd` is no crowd.

    Args:
        train: json file of the training split, below `root`; "" is the place that COCO has for it.
        train_images: folder of its images, below `root`; so are val and val_images.
        masks: require a segmentation of each annotation, and keep it; it is left out otherwise.

    Raises:
        FileNotFoundError: a json file, its folder, or an image that it lists is not there.
        ValueError: what the json file holds is not COCO's format, or contradicts itself.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        train: str = "",
        val: str = "",
        train_images: str = "",
        val_images: str = "",
        masks: bool = False,
    ) -> None:
        file = dict(train=train, val=val)[split]
        folder = dict(train=train_images, val=val_images)[split]
        files = [file] if file else [f"annotations/instances_{split}{year}.json" for year in _YEARS]
        folders = [folder] if folder else [f"{split}{year}" for year in _YEARS]
        self._path = _first(Path(root), files, Path.is_file)
        self._folder = _first(Path(root), folders, Path.is_dir)
        self._masks = masks
        state = self._path.stat()
        content = _load(self._path, masks, state.st_mtime_ns, state.st_size)
        self.classes, self.category_ids, self._records, self._num_objects = content
        self._key = f"DATA.COCO.{split.upper()}"
        self._check_images_are_there(f"{self._key}_IMAGES")

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> tuple[bytes, dict[str, Any]]:
        record = self._records[index]
        path = self._folder / record["file_name"]
        return path.read_bytes(), stored_target(record, str(path), self._masks)

    def describe(self, index: int) -> str:
        return str(self._folder / self._records[index]["file_name"])

    def check_objects(self) -> None:
        """ValueError if no annotation of the file is an object; crowds are none, they are left out."""
        if not self._num_objects:
            raise ValueError(
                f"{self._path} has no annotation, or only crowds, for its {len(self)} images: there is "
                f"nothing to learn or to score; complete it, or set {self._key} to another file (--eval with "
                "TEST.REPORT True writes the results of images whose objects are not known)"
            )

    def check_image(self, index: int) -> Collection[int]:
        """Compare the size of an image, by the head of its file, with what its annotations are for.

        Raises:
            ValueError: they disagree, or the image cannot be read.
        """
        record = self._records[index]
        path, size = self._folder / record["file_name"], record["size"]
        try:
            with Image.open(path) as image:
                found = image.size[::-1]
                # To look for it reads a PNG to its end, so where it matters only.
                turned = found != tuple(size) and is_turned(image)
        except DAMAGED as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        if found != tuple(size):
            advice = "annotate the image as it is stored, or correct height and width"
            if turned:
                advice = (
                    "the file is to be turned by its EXIF orientation, which is ignored here: save it turned "
                    "(PIL: ImageOps.exif_transpose), or annotate it as it is stored"
                )
            raise ValueError(
                f"{path} has {list(found)} pixels (height, width), and {self._path} says {list(size)}: boxes "
                f"would lie elsewhere; {advice}"
            )
        return ()

    def _check_images_are_there(self, key: str) -> None:
        names = [record["file_name"] for record in self._records]
        present: set[str] = set()
        for parent in {posixpath.dirname(name) for name in names}:
            folder = self._folder / parent
            if folder.is_dir():
                present.update(posixpath.join(parent, name) for name in os.listdir(folder))
        absent = [name for name in names if name not in present]
        if absent:
            raise FileNotFoundError(
                f"{self._folder / absent[0]} does not exist; {self._path} lists {len(names)} images, and "
                f"{len(absent)} of them are not there: complete the folder, or set {key} to another one"
            )


def stored_target(record: dict[str, Any], file: str, masks: bool) -> dict[str, Any]:
    """An image's annotations as a detection format gives them, in pixels of the stored image.

    Args:
        record: id, size (height, width) and annotations, whose categories are labels.
    """
    annotations = record["annotations"]
    boxes = np.array([entry["bbox"] for entry in annotations], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
    return dict(
        boxes=boxes,
        labels=np.array([entry["category_id"] for entry in annotations], np.int64),
        iscrowd=np.array([entry["iscrowd"] for entry in annotations], bool),
        masks=[entry["segmentation"] for entry in annotations] if masks else None,
        annotations=annotations,
        image_id=record["id"],
        file=file,
        size=tuple(record["size"]),
    )


def _first(root: Path, names: Sequence[str], exists: Callable[[Path], bool]) -> Path:
    for name in names:
        if exists(root / name):
            return root / name
    missing(root / names[0], LAYOUT)


class _Records(Sequence[dict[str, Any]]):
    """Plain data, one piece of bytes in all: workers that are forked share it.

    Of objects they would copy each page that they count a reference in.
    """

    def __init__(self, records: Iterator[dict[str, Any]]) -> None:
        pieces = [pickle.dumps(record) for record in records]
        self._ends = np.cumsum([0, *map(len, pieces)])
        self._content = b"".join(pieces)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._ends[range(len(self))[index]], self._ends[range(len(self))[index] + 1]
        return pickle.loads(memoryview(self._content)[start:end])


class _Content(NamedTuple):
    classes: list[str]
    category_ids: list[int]
    records: _Records
    num_objects: int  # without crowds


@lru_cache(maxsize=4)  # a run builds each dataset several times
def _load(path: Path, masks: bool, *_state: int) -> _Content:
    """An annotation file, checked; `_state` changes when the file does."""
    file = _File(path)
    names = file.categories()
    labels = {category: label for label, category in enumerate(sorted(names))}
    images = file.images()
    annotations = file.annotations(images, labels, masks)
    records = (
        dict(id=key, **image, annotations=annotations.get(key, [])) for key, image in images.items()
    )
    entries = (entry for of_image in annotations.values() for entry in of_image)
    num_objects = sum(not entry["iscrowd"] for entry in entries)
    return _Content([names[key] for key in labels], list(labels), _Records(records), num_objects)


class _File:
    """What an annotation file holds; each method raises ValueError with the place of what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = json.loads(path.read_bytes(), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:  # also of text that is not UTF-8
            raise ValueError(
                f"{path} is no json file, or is damaged: {error}; get or export it again"
            ) from error
        if not isinstance(self.content, dict):
            self.fail(
                "",
                f"must be an object with images, annotations and categories, not {_short(self.content)}",
            )

    def fail(self, place: str, message: str) -> NoReturn:
        raise ValueError(f"{self.path}: {place}{' ' if place else ''}{message}")

    def entries(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place and content of each object in the list under `key`."""
        if key not in self.content:
            self.fail(
                f"'{key}'",
                f"is missing, found {sorted(self.content)}; it must be a file of instances, with images, "
                "categories, and annotations unless it is of a test set",
            )
        entries = self.content[key]
        if not isinstance(entries, list):
            self.fail(f"'{key}'", f"must be a list, not {_short(entries)}")
        for position, entry in enumerate(entries):
            place = f"{key}[{position}]"
            if not isinstance(entry, dict):
                self.fail(place, f"must be an object, not {_short(entry)}")
            yield place, entry

    def value(self, place: str, entry: dict[str, Any], key: str, kinds: tuple[type, ...]) -> Any:
        value = entry.get(key)
        if type(value) not in kinds:
            kind = " or ".join({int: "a whole number", str: "text"}[kind] for kind in kinds)
            found = f"is {_short(value)}" if key in entry else "is missing"
            self.fail(place, f"'{key}' {found}; it must be {kind}")
        return value

    def categories(self) -> dict[int, str]:
        """Id -> name."""
        found: dict[int, str] = {}
        for place, entry in self.entries("categories"):
            key = self.value(place, entry, "id", (int,))
            if key in found:
                self.fail(
                    place, f"'id' is {key}, as that of '{found[key]}'; give each category its own"
                )
            found[key] = self.value(place, entry, "name", (str,))
        if not found:
            self.fail("'categories'", "is empty; list each category with its id and name")
        return found

    def images(self) -> dict[int | str, dict[str, Any]]:
        """Id -> file_name, and size (height, width)."""
        found: dict[int | str, dict[str, Any]] = {}
        for place, entry in self.entries("images"):
            key = self.value(place, entry, "id", (int, str))
            if key in found:
                self.fail(
                    place,
                    f"'id' is {key!r}, as that of '{found[key]['file_name']}'; give each image its own",
                )
            name = posixpath.normpath(self.value(place, entry, "file_name", (str,)))
            size = [self.value(place, entry, side, (int,)) for side in ("height", "width")]
            if min(size) < 1:
                self.fail(place, f"has the height and width {size}; they must be at least 1 pixel")
            found[key] = dict(file_name=name, size=size)
        if not found:
            self.fail("'images'", "is empty; list each image with id, file_name, height and width")
        return found

    def annotations(
        self,
        images: dict[int | str, dict[str, Any]],
        labels: dict[int, int],
        masks: bool,
    ) -> dict[int | str, list[dict[str, Any]]]:
        """Image id -> its annotations, numbered from 1 on over the file, with labels as categories."""
        found: dict[int | str, list[dict[str, Any]]] = {}
        first_outside = ""
        number = num_outside = 0
        reach, whole = 0.0, True  # the largest coordinate, and whether all are whole numbers
        # Files of test sets have no such list at all; who needs objects asks `check_objects`.
        entries = self.entries("annotations") if "annotations" in self.content else ()
        for number, (place, entry) in enumerate(entries, start=1):
            image_id, category = entry.get("image_id"), entry.get("category_id")
            if type(image_id) not in (int, str) or image_id not in images:
                self.fail(
                    place, f"'image_id' is {_short(image_id)}; no entry of 'images' has that id"
                )
            if type(category) is not int or category not in labels:
                self.fail(
                    place,
                    f"'category_id' is {_short(category)}; 'categories' has the ids {_some(labels)}, so "
                    "add it there, or drop the annotation",
                )
            size = images[image_id]["size"]
            box = self._box(place, entry)
            if _is_outside(box, size):
                num_outside += 1
                first_outside = (
                    first_outside or f"{place} has {box} in an image of {size} (height, width)"
                )
            reach = max(reach, box[0] + box[2], box[1] + box[3])
            whole = whole and all(side == int(side) for side in box)
            kept = dict(
                id=number,  # from 1: pycocotools takes 0 for "not found"
                image_id=image_id,
                category_id=labels[category],
                bbox=box,
                area=self._area(place, entry, box),
                iscrowd=self._crowd(place, entry),
            )
            if masks:
                kept["segmentation"] = self._segmentation(place, entry.get("segmentation"), size)
            found.setdefault(image_id, []).append(kept)
        if not number:
            _LOG.warning("%s has no annotation, but %s", self.path, sorted(self.content))
        elif reach <= 1.001 and not whole:  # sums of shares may be rounded up
            self.fail(
                "'annotations'",
                f"all {number} boxes lie within one pixel: 'bbox' must be [x, y, width, height] in pixels, "
                "not in shares of the image's sides",
            )
        if num_outside:
            corners = " (are they corners [x1, y1, x2, y2]?)" if 2 * num_outside > number else ""
            _LOG.warning(
                "%s: %d of %d boxes leave their image%s, the first is %s; 'bbox' must be [x, y, width, "
                "height], in pixels of the image as it is stored; boxes are cut off at its border",
                *(self.path, num_outside, number, corners, first_outside),
            )
        return found

    def _box(self, place: str, entry: dict[str, Any]) -> list[float]:
        box = entry.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and _are_numbers(box)) or min(box[2:]) < 0:
            self.fail(
                place,
                f"'bbox' is {_short(box)}; it must be [x, y, width, height] in pixels, with sides of at "
                "least 0",
            )
        return box

    def _area(self, place: str, entry: dict[str, Any], box: list[float]) -> float:
        area = entry.get("area")
        if area is None:
            return box[2] * box[3]
        if not _are_numbers([area]) or area < 0:
            self.fail(
                place, f"'area' is {_short(area)}; it must be a number of pixels, or be left out"
            )
        return area

    def _crowd(self, place: str, entry: dict[str, Any]) -> int:
        crowd = entry.get("iscrowd") or 0
        if crowd not in (0, 1):
            self.fail(place, f"'iscrowd' is {_short(crowd)}; it must be 0 or 1, or be left out")
        return int(crowd)

    def _segmentation(self, place: str, found: Any, size: list[int]) -> list | dict[str, Any]:
        """Polygons that enclose something, or run lengths of the image's size."""
        height, width = size
        if isinstance(found, dict):
            if found.get("size") != size:
                self.fail(
                    place,
                    f"'segmentation' has run lengths for the size {_short(found.get('size'))}, its image has "
                    f"{size} (height, width)",
                )
            counts = found.get("counts")
            if isinstance(counts, str):
                counts = unpack_run_lengths(counts)
            if not (
                isinstance(counts, list) and set(map(type, counts)) == {int} and min(counts) >= 0
            ):
                self.fail(
                    place,
                    "'segmentation' must have its run lengths in 'counts', whole numbers or text",
                )
            if sum(counts) != height * width:
                self.fail(
                    place,
                    f"'segmentation' has run lengths of {sum(counts)} pixels in all, its image has "
                    f"{height * width}",
                )
            return found
        if not found:
            self.fail(
                place,
                "has no 'segmentation', and MODEL.HEAD learns masks: complete the file, or choose a head for "
                "boxes (MODEL.HEAD.TYPE retinanet or faster_rcnn)",
            )
        if not isinstance(found, list) or not all(
            isinstance(polygon, list) and len(polygon) % 2 == 0 and _are_numbers(polygon)
            for polygon in found
        ):
            self.fail(
                place,
                f"'segmentation' is {_short(found)}; it must be a list of polygons [x1, y1, x2, y2, ...], or "
                "run lengths with 'counts' and 'size'",
            )
        # Two points enclose nothing, and pycocotools takes them for a box.
        polygons = [polygon for polygon in found if len(polygon) >= 6]
        if not polygons:
            self.fail(
                place,
                f"'segmentation' is {_short(found)}; no polygon of it has three points or more",
            )
        return polygons


def unpack_run_lengths(text: str) -> list[int] | None:
    """COCO's run lengths as text -> numbers; None if they are damaged.

    Six bits a character, from "0" on: five of a number, the lowest first, and whether more of it follow. From
    the fourth number on it is the difference to the last but one. pycocotools gives what happens to be in
    memory for text that ends too early.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative: all higher bits are set
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return lengths if shift == 0 else None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it has {constant} for a number")


def _are_numbers(values: list[Any]) -> bool:
    """Whether all are finite numbers; 1e999 is infinite without being written so."""
    return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))


def _is_outside(box: list[float], size: list[int]) -> bool:
    """Whether a box xywh leaves its image of (height, width) by more than a pixel, which rounding may do."""
    x, y, width, height = box
    return min(x, y) < -1 or x + width > size[1] + 1 or y + height > size[0] + 1


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _some(values: dict[int, Any]) -> str:
    shown = sorted(values)
    return f"{shown}" if len(shown) <= 12 else f"{shown[:6]} ... {shown[-3:]}, {len(shown)} in all"
