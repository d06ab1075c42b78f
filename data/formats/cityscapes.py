"""Cityscapes (arXiv:1604.01685): street scenes with the 19 classes that its benchmark counts."""

from pathlib import Path

from data.masks import IGNORED, IndexMasks, MaskedImages, find_pairs
from data.registry import register_dataset

# Name and id of each class, by label: the id is the value in *_labelIds.png, the label is the "train id".
CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
NUM_IDS = 34  # 0 to 33; the licence plate, -1, is stored as 255
LAYOUT = (
    "leftImg8bit/{train,val}/<city>/*_leftImg8bit.png and "
    "gtFine/{train,val}/<city>/*_gtFine_labelIds.png (or *_gtFine_labelTrainIds.png)"
)


@register_dataset("cityscapes", task="segmentation", num_classes=len(CLASSES), train_size=2975)
def cityscapes(root: str, split: str) -> MaskedImages:
    """Images of `root/leftImg8bit` with the fine masks of `root/gtFine`.

    Masks of training ids are read where a split has them, else those of ids. What is predicted is written
    with ids, as the benchmark's server takes it.

    Raises:
        FileNotFoundError: folders are missing, images have no mask, or masks no image.
    """
    images, masks = Path(root) / "leftImg8bit" / split, Path(root) / "gtFine" / split
    train_ids = any(masks.glob("*/*_gtFine_labelTrainIds.png"))
    kind = "labelTrainIds" if train_ids else "labelIds"
    pairs = find_pairs((images, "*_leftImg8bit.png"), (masks, f"*_gtFine_{kind}.png"), LAYOUT)
    labels = {label: label for label in range(len(CLASSES))}
    allowed = f"0 to {len(CLASSES) - 1}, the training ids"
    if not train_ids:
        labels = dict.fromkeys(range(NUM_IDS), IGNORED)
        labels |= {number: label for label, number in enumerate(CLASSES.values())}
        allowed = f"0 to {NUM_IDS - 1}, Cityscapes' ids"
    meaning = IndexMasks(
        labels | {IGNORED: IGNORED},
        f"{allowed}, and {IGNORED} (ignored); make the mask again with Cityscapes' scripts",
    )
    return MaskedImages(pairs, meaning, list(CLASSES), list(CLASSES.values()))
