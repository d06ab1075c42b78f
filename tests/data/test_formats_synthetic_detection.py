"""Shapes for smoke runs: the same everywhere, and boxes and masks are those of the pixels."""

import numpy as np
import pytest

from data.dense.detection import decode_masks
from data.registry import create_dataset


def opened(split="train", img_size=(40, 60), **options):
    return create_dataset("synthetic", "", split, "detection", img_size=img_size, **options)


@pytest.mark.parametrize("img_size", [(16, 16), (24, 40), (64, 50), (200, 160)])
def test_boxes_and_masks_are_those_of_the_shapes(img_size):
    dataset = opened(img_size=img_size, train_size=40, num_classes=6, masks=True)
    for index in range(len(dataset)):
        pixels, target = dataset[index]
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*target["size"], 3)
        masks = decode_masks(target["masks"], target["size"])
        assert masks.sum(axis=0).max() <= 1  # none covers another
        # Noise stays below 64, each colour has a channel of 255.
        assert np.array_equal(masks.any(axis=0), pixels.max(axis=2) > 64)
        for mask, box, entry in zip(masks, target["boxes"], target["annotations"], strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert entry["area"] == mask.sum()
            assert len(np.unique(pixels[mask.astype(bool)], axis=0)) == 1


def test_a_class_has_one_colour_and_no_other_class_has_it():
    dataset = opened(train_size=60, num_classes=10, masks=True)
    colours = {}
    for index in range(len(dataset)):
        pixels, target = dataset[index]
        masks = decode_masks(target["masks"], target["size"])
        for mask, label in zip(masks, target["labels"].tolist(), strict=True):
            colours.setdefault(label, set()).add(tuple(pixels[mask.astype(bool)][0].tolist()))
    assert sorted(colours) == list(range(10))
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 10


def test_some_images_are_empty_and_some_have_a_crowd():
    found = [opened(train_size=64).read(index)[1] for index in range(64)]
    assert sum(not len(target["labels"]) for target in found) == 8
    crowds = [target["iscrowd"].sum() for target in found]
    assert max(crowds) == 1
    assert 8 <= sum(crowds) <= 13
    ids = [entry["id"] for target in found for entry in target["annotations"]]
    assert min(ids) >= 1
    assert len(set(ids)) == len(ids)
    assert {target["size"] for target in found} == {(40, 60), (60, 40)}


def test_images_are_the_same_each_time_and_differ_between_splits():
    one, again = opened(), opened()
    assert len(one) == 256
    assert np.array_equal(one[3][0], again[3][0])
    assert one[3][1]["annotations"] == again[3][1]["annotations"]
    assert len(opened("val")) == 64
    assert not np.array_equal(opened("val")[3][0], one[3][0])
    assert len(opened(train_size=5)) == len(opened("val", val_size=5)) == 5


def test_labels_have_names_and_ids():
    dataset = opened(num_classes=3)
    assert dataset.classes == ["class_0", "class_1", "class_2"]
    assert list(dataset.category_ids) == [1, 2, 3]
    assert dataset.read(0)[1]["masks"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_classes=0), r"DATA\.SYNTHETIC\.NUM_CLASSES=0 must be at least 1"),
        (dict(in_chans=1), r"MODEL\.IN_CHANS=1: .* set it to 3"),
        (dict(img_size=(15, 40)), r"DATA\.IMG_SIZE=\[15, 40\] leaves no room"),
    ],
)
def test_settings_that_cannot_be_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        opened(**options)
