"""Any folder of images and any folder of masks, as numbers or in colours."""

import re
from pathlib import Path

from data.masks import (
    IGNORED,
    ColourMasks,
    MaskedImages,
    check_class_count,
    find_pairs,
    numbered,
    numbers_of,
    read_names,
)
from data.registry import register_dataset

_CLASSES, _PALETTE = "DATA.PAIRS.CLASSES", "DATA.PAIRS.PALETTE"
_REDUCE = "DATA.PAIRS.REDUCE_ZERO_LABEL"
_COLOUR = re.compile(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})(?:[\s,]+(.*\S))?")


@register_dataset("image_pairs", task="segmentation", node="PAIRS")
def image_pairs(
    root: str,
    split: str,
    *,
    train_images: str = "images/train",
    train_masks: str = "annotations/train",
    val_images: str = "images/val",
    val_masks: str = "annotations/val",
    palette: str = "",
    classes: str = "",
    reduce_zero_label: bool = False,
) -> MaskedImages:
    """Images and masks of the same names, in any folders.

    Args:
        train_images, train_masks, val_images, val_masks: folders, relative to `root`; folders in them are
            searched too. Where names differ by more than the ending, the last part is a pattern whose `*`
            is what they have in common: `labels/*_L.png`. `val_masks` "" stands for images whose labels are
            not known, as those of a test set: --eval with TEST.REPORT True writes predictions for them.
        palette: file with a line `red green blue name` per colour of the masks, in the order of the labels.
            Colours of one name are one class, those of the name `ignore` do not count. "": masks hold
            the numbers of the classes, and 255 where nothing counts.
        classes: file of class names, one per line or a table with the columns Idx and Name; not needed with
            the names in a palette.
        reduce_zero_label: number 0, or the palette's first class, is ignored, and labels count from the next
            one; `classes` does not name it.

    Raises:
        FileNotFoundError: a folder or file is missing, images have no mask, or masks no image.
        ValueError: a damaged palette or list of names, or none at all.
    """
    folder = Path(root)
    given = {"train": (train_images, train_masks), "val": (val_images, val_masks)}[split]
    keys = [f"DATA.PAIRS.{split.upper()}_{what}" for what in ("IMAGES", "MASKS")]
    layout = " and ".join(f"{value} ({key})" for value, key in zip(given, keys, strict=True))
    images, masks = (_pattern(folder, value, key) for value, key in zip(given, keys, strict=True))
    pairs = find_pairs(images, masks if given[1] else None, layout)
    if palette:
        names, colours = read_palette(folder, palette, bool(classes))
        if reduce_zero_label:
            names = names[1:]
            colours = {
                colour: label - 1 if 0 < label < IGNORED else IGNORED
                for colour, label in colours.items()
            }
        named = (
            read_names(folder, classes, _CLASSES, reduce_zero_label, _REDUCE) if classes else names
        )
        if len(named) != len(names):
            raise ValueError(
                f"{_CLASSES}='{classes}' has {len(named)} names, and {_PALETTE}='{palette}' has "
                f"{len(names)} classes with {_REDUCE} {reduce_zero_label}; they must be as many"
            )
        return MaskedImages(pairs, ColourMasks(colours, str(folder / palette)), named)
    if not classes:
        raise ValueError(
            f"{_CLASSES} must name a file with a class name per line; or {_PALETTE} one with a line "
            "`red green blue name` per colour, if the masks are in colours"
        )
    named = read_names(folder, classes, _CLASSES, reduce_zero_label, _REDUCE)
    meaning = numbered(
        len(named),
        reduce_zero_label,
        _REDUCE,
        multi_channel=f"if the masks are in colours, name the file of their colours in {_PALETTE}",
    )
    return MaskedImages(pairs, meaning, named, numbers_of(named, reduce_zero_label))


def _pattern(root: Path, value: str, key: str) -> tuple[Path, str]:
    """Folder and pattern of a value such as `masks` or `masks/*_L.png`."""
    if "*" not in value:
        return root / value, "*"
    path = root / value
    if path.name.count("*") != 1 or "*" in str(path.parent):
        raise ValueError(f"{key}='{value}' may have one * in its last part, for what names share")
    return path.parent, path.name


def read_palette(
    root: Path, file: str, named_elsewhere: bool = False
) -> tuple[list[str], dict[tuple[int, int, int], int]]:
    """Class names by label, and the label of each colour, IGNORED for those of the name `ignore`.

    Args:
        named_elsewhere: names may be left out; a colour without one is a class of its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no colour, or has no name, or a colour comes twice.
    """
    path = root / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.absolute()} does not exist; {_PALETTE}='{file}' must be a file with a line "
            "`red green blue name` per colour, relative to DATA.DATA_PATH"
        )
    names: list[str] = []
    colours: dict[tuple[int, int, int], int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _COLOUR.fullmatch(line.strip())
        colour = tuple(int(value) for value in match.groups()[:3]) if match else (256,)
        name = match[4] if match else None
        if max(colour) > 255 or (name is None and not named_elsewhere):
            raise ValueError(
                f"{path}, line {number}: {line!r} must be `red green blue name`, colours from 0 to 255"
            )
        if colour in colours:
            raise ValueError(f"{path}, line {number}: the colour {colour} comes twice")
        if name == "ignore":
            colours[colour] = IGNORED
            continue
        if name is None or name not in names:
            names.append(name or str(len(names)))
            colours[colour] = len(names) - 1
        else:
            colours[colour] = names.index(name)
    if not names:
        raise ValueError(f"{path} lists no class")
    check_class_count(names, str(path))
    return names, colours
