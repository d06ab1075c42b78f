"""Which dataset formats exist, and what each of them provides.

A format is one file in `data/formats/` with a builder of plain values:

    @register_dataset("cifar10")
    def cifar10(root: str, split: str, *, an_option: int = 0) -> ImageDataset: ...

An option is a keyword argument, and gets its value by its name: `img_size`, `in_chans`, `zip_mode`, or
a key of the format's own config node (`DATA.SYNTHETIC.TRAIN_SIZE` -> `train_size` of "synthetic"). The
node has the name of the format, or the one that `register_dataset` is given.
"""

import importlib
import inspect
import io
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from utils.spelling import nearest

SPLITS = ("train", "val")

CLASSIFICATION = "classification"

# Threads that look at files: over a network one waits most of the time.
_READERS = 8


@dataclass(frozen=True)
class Format:
    """A registered format, and what is published of the data of its name."""

    builder: Callable[..., "ImageDataset"]
    node: str
    num_classes: int | None
    train_size: int | None


_FORMATS: dict[tuple[str, str], Format] = {}  # by task and name


# What PIL raises for a damaged or missing file.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class DamagedImageError(ValueError):
    """A file is no image; the message names it."""


def read_image(path: Path) -> Image.Image:
    """An image file -> decoded PIL image; DamagedImageError that names it if it is none."""
    try:
        return decode_image(path.read_bytes())
    except DAMAGED as error:
        raise DamagedImageError(f"{path} cannot be read as an image: {error}") from error


def decode_image(content: bytes) -> Image.Image:
    """An encoded image file in memory -> decoded PIL image; what PIL raises if it is damaged."""
    # Decoded here, so that a damaged file is noticed as this sample's.
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return image
    except UnidentifiedImageError as error:
        # PIL's message names an object in memory.
        raise UnidentifiedImageError("it is no image of a format that PIL knows") from error


class ImageDataset(Dataset):
    """Images as they are stored; conversion, augmentation and batches are made on top.

    A format says with `read` what it stores. `dataset[index]` is the same with the image decoded.

    Attributes:
        classes: one name per label 0 ... len(classes) - 1.
        decode: encoded file -> PIL image, or uint8 array (H, W) or (H, W, C); PIL's unless it is set.
    """

    classes: list[str]
    decode: Callable[[bytes], Image.Image | np.ndarray] = staticmethod(decode_image)

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def holds(self, count: int) -> bool:
        """Whether there are at least `count` images; looks at no more of them than that takes."""
        return len(self) >= count

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int]:
        """What is stored, and its label: the bytes of an encoded file, still to be decoded, an image of
        any mode, or a uint8 array (H, W) or (H, W, C).
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        """Image of any mode, or uint8 array (H, W) or (H, W, C), and its label."""
        content, label = self.read(index)
        return (self.decode(content) if isinstance(content, bytes) else content), label

    def describe(self, index: int) -> str:
        """Where a sample comes from, for messages: its file if it has one."""
        return f"image {index} of {len(self)}"

    def cache(self, indices: Sequence[int]) -> None:
        """Keep these samples in memory; called for each loader, before its workers start. Here: nothing."""


class ArrayImages(ImageDataset):
    """Images of one size that are in memory as a whole: uint8 (N, H, W) or (N, H, W, C), and N labels."""

    _images: np.ndarray
    _labels: np.ndarray

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self._labels[index])


class DenseDataset(ImageDataset):
    """Images as they are stored, with what is to be found in them; see `data/dense/`.

    Attributes:
        category_ids: what the file calls each label, where it does so by numbers.
    """

    category_ids: Sequence[int] = ()

    def read(self, index: int) -> tuple[bytes | np.ndarray, dict[str, Any]]:
        """The encoded file, or a uint8 array (H, W, C), and the target in pixels of the stored image.

        detection: boxes (N, 4) float32 xyxy, labels (N,) int64, iscrowd (N,) bool, masks (COCO segmentations,
        or None), annotations (COCO's, with labels as categories), image_id, file. segmentation: mask (H, W)
        uint8 with labels and 255 where ignored, image_id, file.
        """
        raise NotImplementedError

    def check(self, rank: int = 0, world_size: int = 1) -> set[int]:
        """`check_image` on this process's share of the images -> all labels that it saw.

        Of several errors the first is raised.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            return set().union(*pool.map(self.check_image, range(rank, len(self), world_size)))

    def check_objects(self) -> None:
        """ValueError if it is known, without a look at the images, that there is nothing to be found."""

    def check_image(self, index: int) -> Collection[int]:
        """Look at what must be right before training starts, such as a mask; ValueError names the file.

        Returns:
            Labels of its pixels, 255 where nothing counts; none where pixels have no labels.
        """
        return ()


def register_dataset(
    *names: str,
    task: str = CLASSIFICATION,
    num_classes: int | None = None,
    train_size: int | None = None,
    node: str | None = None,
) -> Callable[[Callable[..., ImageDataset]], Callable]:
    """Decorator: make a builder known as DATA.DATASET under each of `names`, case aside.

    Args:
        task: what the labels are for; one name can stand for a format of each task.
        num_classes: where all data of this name has as many; models are counted and timed with it
            when the data is not there.
        train_size: training images that the published data of this name has; runs are planned with it
            when the data is not there.
        node: config node with the options (`DATA.<node>`); None: the name in capitals.

    Raises:
        ValueError: a name is taken.
    """

    def decorate(builder: Callable[..., ImageDataset]) -> Callable[..., ImageDataset]:
        for name in names:
            if (task, name.lower()) in _FORMATS:
                raise ValueError(f"DATA.DATASET='{name}' is registered twice for TASK '{task}'")
            made = Format(builder, node or name.upper(), num_classes, train_size)
            _FORMATS[task, name.lower()] = made
        return builder

    return decorate


def list_datasets(task: str = CLASSIFICATION) -> list[str]:
    """All names that DATA.DATASET may have for a task."""
    return sorted(name for known, name in _FORMATS if known == task)


def published_num_classes(name: str, task: str = CLASSIFICATION) -> int | None:
    """Classes of a format that always has as many, else None; ValueError for an unknown format."""
    return find_format(name, task).num_classes


def published_train_size(name: str, task: str = CLASSIFICATION) -> int | None:
    """Training images of the published data set of that name, if there is one, else None."""
    return find_format(name, task).train_size


def dataset_options(name: str, task: str = CLASSIFICATION) -> set[str]:
    """Keyword arguments of a format's builder; ValueError for an unknown format."""
    parameters = list(inspect.signature(find_format(name, task).builder).parameters)
    return set(parameters[2:])


def dataset_node(name: str, task: str = CLASSIFICATION) -> str:
    """Name of the config node below DATA that holds a format's options, if it has any."""
    return find_format(name, task).node


def create_dataset(
    name: str, root: str, split: str, task: str = CLASSIFICATION, **options: Any
) -> ImageDataset:
    """The images of one split ("train" or "val").

    Raises:
        ValueError: unknown name or split, or the files do not hold what the format asks for.
        FileNotFoundError: files or folders of the format are missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split='{split}' must be one of {SPLITS}")
    return find_format(name, task).builder(root, split, **options)


def find_format(name: str, task: str = CLASSIFICATION) -> Format:
    """The format that DATA.DATASET `name` stands for; ValueError names the nearest ones of the task."""
    found = _FORMATS.get((task, name.lower()))
    if found is None:
        known = list_datasets(task)
        others = sorted(other for other, own in _FORMATS if own == name.lower())
        hint = f"it is one for TASK {' or '.join(others)}" if others else ""
        hint = hint or f"did you mean one of {nearest(name, known)}?"
        raise ValueError(
            f"DATA.DATASET='{name}' is not a known format for TASK '{task}'; {hint}; all: {known}"
        )
    return found


def check_same_classes(train: Sequence[str], val: Sequence[str], where: str) -> None:
    """ValueError unless both splits number the same classes in the same way."""
    if list(train) == list(val):
        return
    only_train = sorted(set(train) - set(val))[:5]
    only_val = sorted(set(val) - set(train))[:5]
    raise ValueError(
        f"the splits in {where} have different classes: {len(train)} in train, {len(val)} in val"
        f"{f', only in train: {only_train}' if only_train else ''}"
        f"{f', only in val: {only_val}' if only_val else ''}"
        "; labels would not mean the same, so give both splits the same classes"
    )


def missing(path: Path, layout: str) -> NoReturn:
    """FileNotFoundError that says what is missing and how the files should lie."""
    raise FileNotFoundError(f"{path.absolute()} does not exist; DATA.DATA_PATH must hold {layout}")


def optional_package(name: str, purpose: str) -> ModuleType:
    """Import a package that only `purpose` needs; ValueError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{purpose} needs the package '{name}', which is not installed: pip install {name}"
        ) from error
