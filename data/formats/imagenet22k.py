"""ImageNet-22k by the list files of Swin's reader."""

import json
from pathlib import Path
from typing import Any

from data.formats.imagenet import imagenet
from data.listing import ListedImages, Listing, class_names, once_per_file, read_list
from data.registry import ImageDataset, missing, register_dataset

NUM_CLASSES = 21841
LISTS = {split: f"ILSVRC2011fall_whole_map_{split}.txt" for split in ("train", "val")}


@register_dataset("imagenet22k", num_classes=NUM_CLASSES, train_size=14_197_087)
def imagenet22k(root: str, split: str, *, zip_mode: bool = False) -> ImageDataset:
    """`root/ILSVRC2011fall_whole_map_{train,val}.txt`, whose paths are relative to `root`.

    Swin's own files are JSON, [[path, label], ...], whatever their name says; lines of path and label are
    read too. Without them, images in folders or zip files are read as those of "imagenet".

    Raises:
        FileNotFoundError: neither list files nor folders are there, or a listed image is missing.
        ValueError: a damaged list, or a label beyond the 21841 classes.
    """
    folder = Path(root)
    if zip_mode or ((folder / split).is_dir() and not (folder / LISTS[split]).is_file()):
        return imagenet(root, split, zip_mode=zip_mode)
    if not (folder / LISTS[split]).is_file():
        missing(
            folder / LISTS[split], f"{' and '.join(LISTS.values())}, or train/ and val/ folders"
        )
    # Classes are named by the training images, so that both splits name them alike.
    naming = LISTS["train"] if (folder / LISTS["train"]).is_file() else LISTS[split]
    classes = class_names(_read(folder / naming).folders, NUM_CLASSES)
    return ListedImages(folder, _read(folder / LISTS[split]), classes)


def _read(path: Path) -> Listing:
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    return _read_json(path) if start.startswith(b"[") else read_list(path)


@once_per_file
def _read_json(path: Path) -> Listing:
    try:
        entries: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for number, entry in enumerate(entries):
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, int]:
            raise ValueError(f"{path}, entry {number}: {entry!r} must be [path, label]")
        if not 0 <= entry[1] < NUM_CLASSES:
            raise ValueError(
                f"{path}, entry {number}: {entry!r} has a label that is not 0 to {NUM_CLASSES - 1}"
            )
    if not entries:
        raise ValueError(f"{path} lists no image")
    return Listing([name for name, _ in entries], [label for _, label in entries], str(path))
