"""Images to evaluate on beyond the validation split: robustness sets of ImageNet, or any folder of classes.

A set is named in TEST.SETS as NAME=PATH. Most are a folder of class folders; two names have a layout of
their own:

- `imagenet_c`: PATH/[group/]<corruption>/<severity 1 ... 5>/<class>/<image>;
- `imagenet_real`: the validation split with the labels of PATH, a JSON list of lists (without =PATH: of the
  copy that comes with timm).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from utils.spelling import nearest

from .formats.imagenet import class_folders
from .registry import ImageDataset

VAL = "val"  # the validation split of DATA
CORRUPTED, REAL = "imagenet_c", "imagenet_real"
# ImageNet's validation images carry their number.
_NUMBERED_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.")


@dataclass(frozen=True)
class EvaluationSet:
    """What one entry of TEST.SETS stands for.

    Attributes:
        parts: what is scored on its own, by name: `corruption/severity`, or the whole set as "".
        subset: labels that occur, where they are fewer than the model's; predictions are made among them.
        accepted: (N, L) right labels of each image, filled up with -1, where there may be several.
    """

    name: str
    parts: Mapping[str, ImageDataset]
    subset: list[int] | None = None
    accepted: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether each image has one label, and all of the model's classes are predictions."""
        return self.subset is None and self.accepted is None


class LabelledFolders(ImageDataset):
    """`root/<folder>/<image>`, the folders in alphabetical order; listed when images are asked for.

    Args:
        labels: folder -> label.
        classes: names of all labels.
    """

    def __init__(self, root: Path, labels: Mapping[str, int], classes: Sequence[str]) -> None:
        self._root, self._labels, self.classes = root, dict(labels), list(classes)

    @cached_property
    def _samples(self) -> list[tuple[str, int]]:
        return make_dataset(self._root, self._labels, IMG_EXTENSIONS)

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> tuple[bytes, int]:
        path, label = self._samples[index]
        return Path(path).read_bytes(), label

    def describe(self, index: int) -> str:
        return self._samples[index][0]


class SelectedImages(ImageDataset):
    """Some images of a dataset, in the order of `indices`."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]) -> None:
        self._dataset, self._indices, self.classes = dataset, list(indices), dataset.classes

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, int]:
        return self._dataset.read(self._indices[index])

    def describe(self, index: int) -> str:
        return self._dataset.describe(self._indices[index])

    def cache(self, indices: Sequence[int]) -> None:
        self._dataset.cache([self._indices[index] for index in indices])


class NumberedImages(ImageDataset):
    """A dataset whose labels come with the number of their image: (label, index)."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset, self.classes = dataset, dataset.classes

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[bytes | Image.Image | np.ndarray, tuple[int, int]]:
        content, label = self._dataset.read(index)
        return content, (label, index)

    def describe(self, index: int) -> str:
        return self._dataset.describe(index)

    def cache(self, indices: Sequence[int]) -> None:
        self._dataset.cache(indices)


def parse_entry(entry: str) -> tuple[str, str]:
    """An entry of TEST.SETS -> name, path; ValueError if it is neither `val` nor NAME=PATH."""
    name, _, path = entry.partition("=")
    fits = bool(path) if name not in (VAL, REAL) else name == REAL or not path
    if not fits or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"TEST.SETS entry {entry!r} must be NAME=PATH (imagenet_a=/data/imagenet-a), '{REAL}' or '{VAL}'"
        )
    return name, path


def uses_validation(entry: str) -> bool:
    """Whether the set's images are those of the validation split."""
    return parse_entry(entry)[0] in (VAL, REAL)


def imagenet_names(num_classes: int) -> list[str]:
    """Synsets of the list of ImageNet classes that has so many; empty if there is none."""
    subset = infer_imagenet_subset(dict(num_classes=num_classes))
    return ImageNetInfo(subset).label_names() if subset else []


def open_set(entry: str, classes: Sequence[str], validation: ImageDataset | None) -> EvaluationSet:
    """The set that an entry of TEST.SETS names; reads no image.

    Args:
        classes: names of the model's labels.
        validation: the validation split, of which `uses_validation` sets consist.

    Raises:
        ValueError: no such entry, or folders that are none of the model's classes.
        FileNotFoundError: there is no such folder or file.
    """
    name, path = parse_entry(entry)
    if name == VAL:
        return EvaluationSet(VAL, {"": validation})
    if name == REAL:
        return _real_labels(validation, path, len(classes))
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"TEST.SETS entry {entry!r}: {root.absolute()} is no folder")
    folders = _corruptions(root) if name == CORRUPTED else {"": root}
    labels = {part: folder_labels(folder, classes) for part, folder in folders.items()}
    occurring = sorted({label for part in labels.values() for label in part.values()})
    parts = {
        part: LabelledFolders(folder, labels[part], classes) for part, folder in folders.items()
    }
    return EvaluationSet(name, parts, None if len(occurring) == len(classes) else occurring)


def folder_labels(root: Path, classes: Sequence[str]) -> dict[str, int]:
    """Class folders of `root` -> labels of the model.

    A folder is named as a class of the training data is; or, for a model with as many classes as ImageNet
    (1k or one of the 22k lists of timm), by its WordNet synset; or by its label's number.

    Raises:
        ValueError: a folder is none of these.
    """
    try:
        names = class_folders(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"TEST.SETS: {root.absolute()} must hold a folder per class, <class>/<image>"
        ) from error
    synsets = imagenet_names(len(classes))
    readings = [list(classes), synsets, [str(label) for label in range(len(classes))]]
    for reading in readings:
        label_of = {name: label for label, name in enumerate(reading)}
        if all(name in label_of for name in names):
            return {name: label_of[name] for name in names}
    known = {name for reading in readings for name in reading}
    unknown = [name for name in names if name not in known] or names
    raise ValueError(
        f"{root} has {len(names)} class folders, and {len(unknown)} are no class of the model, such as "
        f"{unknown[:3]} (nearest: {nearest(unknown[0], known)[:3]}): folders must be named as the classes "
        f"of the training data, {'by synset, ' if synsets else ''}or 0 ... {len(classes) - 1}"
    )


def _corruptions(root: Path) -> dict[str, Path]:
    """`corruption/severity` -> its folder, sorted."""
    for pattern in ("*/[1-5]", "*/*/[1-5]"):
        found = sorted(path for path in root.glob(pattern) if path.is_dir())
        if found:
            return {f"{path.parent.name}/{path.name}": path for path in found}
    raise FileNotFoundError(
        f"TEST.SETS {CORRUPTED}: {root.absolute()} must hold <corruption>/<severity 1 ... 5>/<class>/<image>"
    )


def _read_lists(path: Path) -> list[list[int]]:
    """Labels per image, of a file like `real.json`."""
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"TEST.SETS {REAL}: there is no file {path.absolute()}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"TEST.SETS {REAL}: {path} cannot be read: {error}") from error
    if not isinstance(lists, list) or not all(isinstance(labels, list) for labels in lists):
        raise ValueError(f"TEST.SETS {REAL}: {path} must be a list with a list of labels per image")
    return lists


def _real_labels(validation: ImageDataset, path: str, num_classes: int) -> EvaluationSet:
    """Validation images that have labels in the list of the reassessment, arXiv:2006.07159, and these."""
    lists = (
        _read_lists(Path(path))
        if path
        else list(RealLabelsImagenet([""] * 50_000).real_labels.values())
    )
    chosen, right = [], []
    for index in range(len(validation)):
        number = _NUMBERED_FILE.search(validation.describe(index))
        if number is None or not 1 <= int(number[1]) <= len(lists):
            raise ValueError(
                f"TEST.SETS {REAL}: {validation.describe(index)} is not ILSVRC2012_val_00000001.JPEG to "
                f"..._{len(lists):08d}.JPEG, so it has no entry in the labels of {path or 'timm'}"
            )
        labels = lists[int(number[1]) - 1]
        if labels:
            chosen.append(index)
            right.append(labels)
    if not chosen or max(map(max, right)) >= num_classes:
        raise ValueError(
            f"TEST.SETS {REAL}: the labels of {path or 'timm'} must name classes below {num_classes}, the "
            "model's number, for at least one image"
        )
    longest = max(map(len, right))
    accepted = torch.tensor([labels + [-1] * (longest - len(labels)) for labels in right])
    return EvaluationSet(REAL, {"": SelectedImages(validation, chosen)}, accepted=accepted)
