"""Any folder of images, one sub-folder per class; or Swin's two zip files of the same images."""

import itertools
import os
from functools import cached_property
from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from data.registry import ImageDataset, check_same_classes, missing, register_dataset
from data.zipped import ZippedImages

LAYOUT = "train/<class>/<image> and val/<class>/<image>"


@register_dataset("imagenet", train_size=1_281_167)
@register_dataset("folder")
def imagenet(root: str, split: str, *, zip_mode: bool = False) -> ImageDataset:
    """`root/<split>/<class>/<image>`, or `root/<split>.zip` with `root/<split>_map.txt`."""
    return ZippedImages(Path(root), split) if zip_mode else FolderImages(Path(root), split)


class FolderImages(ImageDataset):
    """One folder per class, numbered in alphabetical order; images are listed when they are asked for.

    Raises:
        FileNotFoundError: there is no such folder; at the first use: a class has no image.
        ValueError: the other split is there too, and has other classes.
    """

    def __init__(self, root: Path, split: str) -> None:
        if not (root / split).is_dir():
            missing(root / split, LAYOUT)
        self._root = root / split
        self.classes = class_folders(self._root)
        other = root / ("val" if split == "train" else "train")
        if other.is_dir():
            names = class_folders(other)
            train, val = (self.classes, names) if split == "train" else (names, self.classes)
            check_same_classes(train, val, str(root))

    @cached_property
    def samples(self) -> list[tuple[str, int]]:
        """File and label of each image."""
        try:
            return _Folder(self._root).samples
        except FileNotFoundError as error:  # it does not say where
            raise FileNotFoundError(
                f"{self._root}: {error}; give each class an image, or remove it from both splits"
            ) from None

    def __len__(self) -> int:
        return len(self.samples)

    def holds(self, count: int) -> bool:
        files = (
            name
            for folder in self.classes
            for _, _, names in os.walk(self._root / folder, followlinks=True)
            for name in names
            if has_file_allowed_extension(name, IMG_EXTENSIONS)
        )
        return len(list(itertools.islice(files, count))) == count

    def read(self, index: int) -> tuple[bytes, int]:
        path, label = self.samples[index]
        with open(path, "rb") as file:
            return file.read(), label

    def describe(self, index: int) -> str:
        return self.samples[index][0]


class _Folder(ImageFolder):
    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = class_folders(Path(directory))
        return names, {name: label for label, name in enumerate(names)}


def class_folders(directory: Path) -> list[str]:
    """Sub-folders without the hidden ones, which editors leave (`.ipynb_checkpoints`), sorted."""
    names = sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise FileNotFoundError(
            f"{directory} has no class folders; DATA.DATA_PATH must hold {LAYOUT}"
        )
    return names
