"""Any images that text files of `path label` list."""

from collections.abc import Sequence
from pathlib import Path

from data.listing import (
    ListedImages,
    Listing,
    class_names,
    count_classes,
    joined,
    read_class_names,
    read_list,
)
from data.registry import ImageDataset, missing, register_dataset


@register_dataset("lists")
def lists(
    root: str,
    split: str,
    *,
    train: Sequence[str] = (),
    val: Sequence[str] = (),
    images: str = "",
    classes: str = "",
) -> ImageDataset:
    """Images of the list files of `split`, one file after the other; all paths are relative to `root`.

    The number of classes is that of `classes`, or else follows from the labels of both splits, as far as
    their files exist. Without a file of names, classes are named after the folders of their images.

    Args:
        train: list files of the training split; so is val.
        images: folder that the listed paths are relative to; "": `root`.
        classes: file with one class name per line; "": `root/classes.txt` if there is one.

    Raises:
        FileNotFoundError: a list file of the split or a listed image is missing.
        ValueError: a split without a list file, a damaged line, a label without a class.
    """
    folder, files = Path(root), {"train": train, "val": val}
    if not files[split]:
        raise ValueError(
            f"DATA.DATASET='lists' needs DATA.LISTS.{split.upper()}: list files with lines of "
            "`path label`, relative to DATA.DATA_PATH"
        )
    for name in files[split]:
        if not (folder / name).is_file():
            missing(folder / name, f"DATA.LISTS.{split.upper()} {list(files[split])}")
    found = {name: _read_all(folder, files[name]) for name in files}
    named = folder / (classes or "classes.txt")
    if classes and not named.is_file():
        missing(named, f"DATA.LISTS.CLASSES '{classes}'")
    if named.is_file():
        names = read_class_names(named)
    else:
        count = count_classes(found["train"], found["val"])
        names = class_names((found["train"] or found["val"]).folders, count)
    return ListedImages(folder / images, found[split], names)


def _read_all(folder: Path, files: Sequence[str]) -> Listing | None:
    """The lists in a row; None unless all of them are there, as where only the other split is."""
    twice = sorted({name for name in files if list(files).count(name) > 1})
    if twice:
        raise ValueError(f"DATA.LISTS names {twice} twice: their images would count twice")
    paths = [folder / name for name in files]
    if not paths or not all(path.is_file() for path in paths):
        return None
    return joined([read_list(path) for path in paths])
