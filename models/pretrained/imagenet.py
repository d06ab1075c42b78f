"""The classes of ImageNet-1k among those of ImageNet-22k."""

from timm.data import ImageNetInfo

# ImageNet-22k lacks one class of ImageNet-1k, the teddy bear. In its place Swin's list
# (data/map22kto1k.txt) has the garment that is called "teddy" too.
STAND_INS = {"n04399382": "n03013580"}


def imagenet_1k_rows() -> list[int]:
    """Row of each class of ImageNet-1k among the 21841 of ImageNet-22k, both sorted by synset.

    Swin's own list counts two synsets that are not among the 21841, so that 281 of its rows are those of the
    next class or the one after it. From the first of the two on, TinyViT's list agrees with this one.
    """
    rows = {synset: row for row, synset in enumerate(ImageNetInfo("imagenet-22k").label_names())}
    return [rows[STAND_INS.get(name, name)] for name in ImageNetInfo("imagenet-1k").label_names()]
