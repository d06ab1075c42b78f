"""Images that have a mask of labels each: which files belong together, and what mask values mean."""

import csv
import io
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from models.heads.pixels import IGNORED, MAX_CLASSES

from .listing import read_class_names
from .registry import DAMAGED, DenseDataset, missing

_LOG = logging.getLogger(__name__)

# What a lookup gives for a value that masks must not have, and so no class.
_UNKNOWN = MAX_CLASSES

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
# Formats without loss: JPEG's rounding makes other labels of labels.
MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")

# Modes of PIL that hold one whole number per pixel.
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")


class IndexMasks:
    """One-channel masks -> labels.

    Args:
        labels: of each value that may occur; IGNORED for those that do not count.
        allowed: these values in words, and what to do about others; for messages.
        multi_channel: what to do about masks with several channels; for messages.
    """

    def __init__(
        self,
        labels: Mapping[int, int],
        allowed: str,
        multi_channel: str = "save the class numbers as a one-channel PNG",
    ) -> None:
        self._allowed, self._multi_channel = allowed, multi_channel
        self._table = np.full(256, _UNKNOWN, np.uint8)
        self._table[list(labels)] = list(labels.values())

    def __call__(self, mask: Image.Image) -> np.ndarray:
        """Decoded mask -> uint8 (H, W), labels and IGNORED; ValueError for other values or modes."""
        if mask.mode not in _INDEX_MODES:
            raise ValueError(
                f"it has the mode {mask.mode} with {len(mask.getbands())} channel(s), and an index mask "
                f"has one whole number per pixel; {self._multi_channel}"
            )
        values = np.asarray(mask)  # of mode P: the indices
        if values.itemsize > 1:
            beyond = values[(values < 0) | (values > 255)]
            if beyond.size:
                self._refuse(beyond)
        values = values.astype(np.uint8, copy=False) // _grey_step(mask)
        labels = self._table[values]
        if (labels == _UNKNOWN).any():
            self._refuse(values[labels == _UNKNOWN])
        return labels

    def _refuse(self, values: np.ndarray) -> NoReturn:
        raise ValueError(
            f"it has the value {values.min()} ({values.size} pixels have values that are not allowed), "
            f"allowed are {self._allowed}"
        )


class ColourMasks:
    """RGB masks -> labels.

    Args:
        labels: of each colour (red, green, blue) that may occur; IGNORED for those that do not count.
        source: the palette file, for messages.
    """

    def __init__(self, labels: Mapping[tuple[int, int, int], int], source: str) -> None:
        self._labels, self._source = dict(labels), source

    @cached_property
    def _table(self) -> np.ndarray:
        # 16 MiB, made where masks are read. Searching a sorted list of colours takes 50 times as long.
        table = np.full(1 << 24, _UNKNOWN, np.uint8)
        for (red, green, blue), label in self._labels.items():
            table[red | green << 8 | blue << 16] = label
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {"_labels": self._labels, "_source": self._source}

    def __call__(self, mask: Image.Image) -> np.ndarray:
        """Decoded mask -> uint8 (H, W), labels and IGNORED; ValueError for an unknown colour."""
        pixels = np.asarray(mask.convert("RGB").convert("RGBA"))  # (H, W, 4), the last is 255
        labels = self._table[pixels.view("<u4")[..., 0] & 0xFFFFFF]
        if (labels == _UNKNOWN).any():
            colours = pixels[labels == _UNKNOWN][:, :3]
            raise ValueError(
                f"it has the colour {tuple(colours[0].tolist())} ({len(colours)} pixels have colours that "
                f"are not in the palette), and {self._source} lists only {len(self._labels)} others; add "
                "the colour there, with the name `ignore` if it does not count"
            )
        return labels


def numbered(num_classes: int, reduce_zero_label: bool, key: str, **options: str) -> IndexMasks:
    """Masks whose values are class numbers, and IGNORED where nothing counts.

    Args:
        reduce_zero_label: 0 is ignored, and 1 ... num_classes are the labels 0 ... num_classes - 1.
        key: config key of `reduce_zero_label`, for messages; `options` are those of `IndexMasks`.
    """
    first = int(reduce_zero_label)
    labels = {first + label: label for label in range(num_classes)} | {IGNORED: IGNORED}
    if reduce_zero_label:
        labels[0] = IGNORED
    zero = "0 (ignored), " if reduce_zero_label else ""
    return IndexMasks(
        labels,
        f"{zero}{first} to {first + num_classes - 1} ({num_classes} classes) and {IGNORED} (ignored), with "
        f"{key} {reduce_zero_label}; correct the mask, the list of classes or that key",
        **options,
    )


def numbers_of(classes: Sequence[str], reduce_zero_label: bool) -> list[int]:
    """The value of each label in masks that `numbered` reads, so that predictions get the same."""
    first = int(reduce_zero_label)
    return list(range(first, first + len(classes)))


def check_class_count(classes: Sequence[str], source: str) -> None:
    """ValueError if labels of so many classes do not fit into masks of bytes."""
    if len(classes) > MAX_CLASSES:
        raise ValueError(
            f"{source} has {len(classes)} classes, and masks of bytes hold at most {MAX_CLASSES}"
        )


def _grey_step(mask: Image.Image) -> int:
    """What PIL multiplies gray values of 2 or 4 bits with, to make them fill a byte; else 1."""
    # PNG optimisers store masks of few classes like this.
    raw = mask.info.get("grey_bits", 8)
    return 255 // (2**raw - 1) if raw in (2, 4) else 1


def open_mask(content: bytes) -> Image.Image:
    """Decoded mask; what PIL raises if it is damaged."""
    with Image.open(io.BytesIO(content)) as mask:
        mask.load()
    if mask.format == "PNG" and content[25] == 0:  # of the header: bit depth, colour type (0: gray)
        mask.info["grey_bits"] = content[24]
    return mask


class MaskedImages(DenseDataset):
    """Images and masks in files of the same names.

    `read` gives dict(mask, image_id, file): mask uint8 (H, W) with labels and IGNORED, image_id the name
    that image and mask share.

    Args:
        pairs: name, image file and mask file of each sample; "" for an image of which nothing is known.
        labels: decoded mask -> uint8 (H, W); ValueError for values that masks must not have.
        category_ids: what predicted masks hold for each label, if it is not the label itself.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str, str]],
        labels: Callable[[Image.Image], np.ndarray],
        classes: list[str],
        category_ids: Sequence[int] = (),
    ) -> None:
        self._pairs, self._labels, self.classes = pairs, labels, classes
        self.category_ids = list(category_ids)

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> tuple[bytes, dict[str, Any]]:
        """Encoded image and stored target; ValueError for a mask that is damaged or has wrong values."""
        name, image, _ = self._pairs[index]
        with open(image, "rb") as file:
            content = file.read()
        mask = self._mask(index, lambda: self._size(index, io.BytesIO(content)))
        return content, dict(mask=mask, image_id=name, file=image)

    def describe(self, index: int) -> str:
        return self._pairs[index][1]

    def check_image(self, index: int) -> Collection[int]:
        """Read a mask, and the size of its image -> the labels in it.

        Raises:
            ValueError: the mask is damaged, has values that no class has, or not the size of its image; the
                message names the file.
        """
        _, image, mask = self._pairs[index]
        size = self._size(index, image)
        labels = self._mask(index, lambda: size)
        check_size(labels, size, mask, image)
        return np.bincount(labels.ravel()).nonzero()[0].tolist()

    def _size(self, index: int, file: str | io.BytesIO) -> tuple[int, int]:
        """Height and width of an image, by its header."""
        try:
            with Image.open(file) as opened:
                return opened.size[::-1]
        except DAMAGED as error:
            raise ValueError(f"{self._pairs[index][1]} cannot be read: {error}") from error

    def _mask(self, index: int, size: Callable[[], tuple[int, int]]) -> np.ndarray:
        """Labels of an image; `size` gives its height and width where there is no mask."""
        path = self._pairs[index][2]
        if not path:
            return np.full(size(), IGNORED, np.uint8)
        try:
            with open(path, "rb") as file:
                mask = open_mask(file.read())
        except DAMAGED as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        try:
            return self._labels(mask)
        except ValueError as error:
            raise ValueError(f"{path} is no mask of this data: {error}") from error


def check_size(
    mask: np.ndarray, size: tuple[int, int], file: str, image: str = "the image"
) -> None:
    """ValueError unless a mask (H, W) has the (height, width) of its image."""
    if mask.shape != tuple(size):
        raise ValueError(
            f"{file}: the mask has {mask.shape[0]}x{mask.shape[1]} pixels (height x width), and {image} "
            f"has {size[0]}x{size[1]}; a mask must have the size of its image"
        )


def check_labels(seen: Mapping[str, set[int]], classes: Sequence[str]) -> None:
    """Compare what the masks of each split hold with what is to be learned; warns of classes that are absent.

    Args:
        seen: by split, all labels of its masks, and IGNORED; nothing for data without labels of pixels.

    Raises:
        ValueError: no pixel of a split counts, or all of the training split's are of one class.
    """
    for split, found in seen.items():
        labels = found - {IGNORED}
        if not found or len(labels) == len(classes):
            continue
        if not labels:
            raise ValueError(
                f"no pixel of the {split} masks counts, all are {IGNORED} (ignored): there is nothing to "
                "learn or to score; complete them, or correct the keys that number them and say where they "
                "lie (--eval with TEST.REPORT True writes predictions for images without labels)"
            )
        if split == "train" and len(labels) == 1:
            (label,) = labels
            advice = ""
            if IGNORED in found:
                advice = (
                    f"; the others are {IGNORED}, which does not count: if that is a class, name the masks' "
                    "colours in DATA.PAIRS.PALETTE"
                )
            raise ValueError(
                f"all pixels of the train masks that count are '{classes[label]}', there is nothing to tell "
                f"apart for {len(classes)} classes{advice}"
            )
        absent = [name for label, name in enumerate(classes) if label not in labels]
        _LOG.warning(
            "%d of %d classes occur in no mask of the %s split: %s%s",
            *(len(absent), len(classes), split, ", ".join(absent[:5])),
            " ..." if len(absent) > 5 else "",
        )


def find_pairs(
    images: tuple[Path, str], masks: tuple[Path, str] | None, layout: str
) -> list[tuple[str, str, str]]:
    """Name, image and mask of each sample, sorted by name; for `MaskedImages`.

    Args:
        images, masks: folder, and pattern of the files in it and in the folders below: one `*`, which
            stands for what an image and its mask have in common. Without an ending it is any of
            IMAGE_ENDINGS, or MASK_ENDINGS. None: there are no masks.
        layout: what DATA.DATA_PATH must hold, for messages.

    Raises:
        FileNotFoundError: a folder is missing or empty, an image has no mask, or a mask no image.
        ValueError: two files have one name.
    """
    image_files = _by_name(*images, IMAGE_ENDINGS, "image", layout)
    if masks is None:
        return [(name, file, "") for name, file in sorted(image_files.items())]
    mask_files = _by_name(*masks, MASK_ENDINGS, "mask", layout)
    _check_partners(image_files, mask_files, masks, ("image", "mask"), layout)
    _check_partners(mask_files, image_files, images, ("mask", "image"), layout)
    return [(name, image_files[name], mask_files[name]) for name in sorted(image_files)]


def _check_partners(
    own: Mapping[str, str],
    others: Mapping[str, str],
    sought: tuple[Path, str],
    what: tuple[str, str],
    layout: str,
) -> None:
    alone = sorted(own.keys() - others.keys())
    if alone:
        folder, name = os.path.split(alone[0])
        raise FileNotFoundError(
            f"{own[alone[0]]} has no {what[1]}: there is no "
            f"{sought[0] / folder / sought[1].replace('*', name)} ({len(alone)} of {len(own)} "
            f"{what[0]}s have none); DATA.DATA_PATH must hold {layout}"
        )


def _by_name(
    folder: Path, pattern: str, endings: Sequence[str], what: str, layout: str
) -> dict[str, str]:
    """Files below a folder, by the part of their names that `*` stands for, behind their folder's."""
    if not folder.is_dir():
        missing(folder, layout)
    found: dict[str, str] = {}
    other = ""
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = os.path.relpath(path, folder)
        for file in files:
            shared = _shared_part(file, pattern, endings)
            if shared is None:
                other = other or file
                continue
            name = shared if inner == "." else f"{inner}/{shared}"
            if name in found:
                raise ValueError(
                    f"{found[name]} and {os.path.join(path, file)} are both the {what} '{name}'; remove one "
                    "of them"
                )
            found[name] = os.path.join(path, file)
    if not found:
        raise FileNotFoundError(
            f"{folder} has no {what}s named {pattern} with the ending {', '.join(endings)}"
            f"{f', but {other}' if other else ''}; DATA.DATA_PATH must hold {layout}"
            f"{'; masks must not be JPEG, which changes labels' if what == 'mask' else ''}"
        )
    return found


def _shared_part(file: str, pattern: str, endings: Sequence[str]) -> str | None:
    """What `*` of a pattern stands for in a file's name; None if the name does not fit."""
    prefix, _, suffix = pattern.partition("*")
    if "." not in suffix:
        file, ending = os.path.splitext(file)
        if ending.lower() not in endings:
            return None
    fits = file.startswith(prefix) and file[len(prefix) :].endswith(suffix)
    if not fits or file.startswith("."):
        return None
    return file[len(prefix) : len(file) - len(suffix)]


def read_names(root: Path, file: str, key: str, reduce_zero_label: bool, reduce: str) -> list[str]:
    """The class names of a file, by label.

    Either a table as ADE20K's objectInfo150.txt, tabs between columns among which are Idx and Name, or one
    name per line. Of synonyms (`wall, partition` or `door;double door`) in a table the first one is taken,
    where all first ones differ.

    Args:
        file: relative to `root`, or absolute.
        key: config key that names the file, for messages; so is `reduce`, of `reduce_zero_label`.
        reduce_zero_label: numbers (Idx) start at 1, else at 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no names, too many, one that comes twice, or numbers that are not in a row.
    """
    path = root / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.absolute()} does not exist; {key}='{file}' must be a file of class names, relative to "
            "DATA.DATA_PATH"
        )
    text = path.read_text(encoding="utf-8-sig")
    rows = list(csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if {"idx", "name"} <= set(header):
        names = _names_of_table(path, header, rows, int(reduce_zero_label), reduce)
    else:
        names = read_class_names(path)
    check_class_count(names, str(path))
    return names


def _names_of_table(
    path: Path, header: list[str], rows: list[list[str]], first: int, reduce: str
) -> list[str]:
    names: list[str] = []
    numbers: list[int] = []
    for line, row in enumerate(rows[1:], 2):
        cells = dict(zip(header, (cell.strip() for cell in row), strict=False))
        if not any(cells.values()):
            continue
        if not cells.get("idx", "").isdecimal() or not cells.get("name"):
            raise ValueError(f"{path}, line {line}: {row} must have a number as Idx, and a Name")
        numbers.append(int(cells["idx"]))
        names.append(cells["name"])
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ValueError(f"{path}: {f'{twice} come twice' if twice else 'it names no class'}")
    if numbers == list(range(1 - first, 1 - first + len(numbers))):
        raise ValueError(
            f"{path} numbers its classes from {1 - first}: set {reduce} {not first}, or number them from "
            f"{first}"
        )
    if numbers != list(range(first, first + len(numbers))):
        raise ValueError(
            f"{path}: Idx must be {first} to {first + len(numbers) - 1} in this order, with {reduce} "
            f"{bool(first)}; it is {', '.join(map(str, numbers[:5]))} ..."
        )
    short = [name.replace(";", ",").split(",")[0].strip() for name in names]
    return short if len(set(short)) == len(short) else names
