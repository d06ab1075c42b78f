"""ADE20K's scene parsing benchmark (arXiv:1608.05442), and whatever lies in its folders."""

from pathlib import Path

from data.masks import MaskedImages, find_pairs, numbered, numbers_of, read_names
from data.registry import register_dataset

FOLDERS = {"train": "training", "val": "validation"}
NUM_CLASSES = 150
LAYOUT = "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png"
_REDUCE = "DATA.ADE20K.REDUCE_ZERO_LABEL"


@register_dataset("ade20k", task="segmentation", num_classes=NUM_CLASSES, train_size=20_210)
def ade20k(
    root: str, split: str, *, classes: str = "", reduce_zero_label: bool = True
) -> MaskedImages:
    """`root/images/<split>/<name>.jpg` with `root/annotations/<split>/<name>.png`, an index mask.

    Args:
        classes: file of class names, a table as objectInfo150.txt or one name per line, relative to `root`;
            "" is the `objectInfo*.txt` in `root`, and without one there are 150 classes, named by number.
        reduce_zero_label: mask value 0 is ignored and classes count from 1; else they count from 0.

    Raises:
        FileNotFoundError: folders or files are missing, images have no mask, or masks no image.
        ValueError: a damaged file of names, or one whose numbers do not start as `reduce_zero_label` says.
    """
    folder = Path(root)
    pairs = find_pairs(
        (folder / "images" / FOLDERS[split], "*"),
        (folder / "annotations" / FOLDERS[split], "*"),
        LAYOUT,
    )
    names = _names(folder, classes, reduce_zero_label)
    return MaskedImages(
        pairs,
        numbered(len(names), reduce_zero_label, _REDUCE),
        names,
        numbers_of(names, reduce_zero_label),
    )


def _names(folder: Path, file: str, reduce_zero_label: bool) -> list[str]:
    key = "DATA.ADE20K.CLASSES"
    if not file:
        found = sorted(path.name for path in folder.glob("objectInfo*.txt"))
        if len(found) > 1:
            raise ValueError(f"{folder} holds {found}; name the right one in {key}")
        if not found:
            return [str(label + reduce_zero_label) for label in range(NUM_CLASSES)]
        file = found[0]
    return read_names(folder, file, key, reduce_zero_label, _REDUCE)
