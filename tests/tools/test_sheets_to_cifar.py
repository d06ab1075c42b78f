"""Packed sheets become the pickles that the CIFAR formats read; whatever differs is named."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import tools.sheets_to_cifar as converter
from data.registry import create_dataset
from tools.sheets_to_cifar import PUBLISHED, convert, digest, main

PER_CLASS = {"train": 5, "test": 2}


def pack(pixels, columns):
    """(N, 32, 32, 3) -> sheet, row by row, one tile at a time; unused tiles are white."""
    rows = -(-len(pixels) // columns)
    sheet = np.full((rows * 32, columns * 32, 3), 255, np.uint8)
    for index, tile in enumerate(pixels):
        top, left = index // columns * 32, index % columns * 32
        sheet[top : top + 32, left : left + 32] = tile
    return Image.fromarray(sheet)


@pytest.fixture(params=["cifar10", "cifar100"])
def source(tmp_path, monkeypatch, request):
    """Sheets of a data set with few images -> folder, its name, images and labels by split."""
    name, rng = request.param, np.random.default_rng(0)
    count = PUBLISHED[name].num_classes
    folder = tmp_path / "sheets"
    folder.mkdir()
    images, labels = {}, {}
    for split, per_class in PER_CLASS.items():
        labels[split] = rng.permutation(np.repeat(np.arange(count), per_class))
        images[split] = rng.integers(0, 256, (len(labels[split]), 32, 32, 3), np.uint8)
        # Full sheets of 5 columns, and sheets of 7 columns whose last row has unused tiles.
        suffix, per_sheet, columns = ("webp", 25, 5) if split == "train" else ("png", 133, 7)
        for first in range(0, len(images[split]), per_sheet):
            sheet = pack(images[split][first : first + per_sheet], columns)
            options = dict(lossless=True) if suffix == "webp" else {}
            sheet.save(folder / f"{split}_{first // per_sheet:02d}.{suffix}", **options)
    classes = np.array([f"class {i}" for i in range(count)])
    np.savez(folder / "labels.npz", **labels, classes=classes)
    pixels = {
        split: (tuple((part / 255).mean((0, 1, 2))), tuple((part / 255).std((0, 1, 2))))
        for split, part in images.items()
    }
    digests = {split: digest(images[split], labels[split]) for split in images}
    known = replace(PUBLISHED[name], per_class=PER_CLASS, pixels=pixels, digests=digests)
    monkeypatch.setitem(converter.PUBLISHED, name, known)
    return folder, name, images, labels


def test_pickles_hold_every_tile_and_label_in_order(source, tmp_path, capsys):
    folder, name, images, labels = source
    main([str(folder), str(tmp_path / "out"), "--dataset", name])
    for split, stored in (("train", "train"), ("val", "test")):
        dataset = create_dataset(name, str(tmp_path / "out"), split)
        found = [dataset[i] for i in range(len(dataset))]
        assert np.array_equal(np.stack([image for image, _ in found]), images[stored])
        assert [label for _, label in found] == labels[stored].tolist()
        assert dataset.classes[3] == "class 3"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == {"cifar10": 7, "cifar100": 3}[name]
    assert [p.name for p in (tmp_path / "out").iterdir()] == [PUBLISHED[name].folder]


def test_torchvision_reads_the_layout_once_its_checksums_are_left_out(
    source, tmp_path, monkeypatch
):
    import torchvision

    folder, name, images, labels = source
    convert(folder, tmp_path / "out", name)
    theirs = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}[name]
    kind = getattr(torchvision.datasets, theirs)
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: None)  # compares a checksum as well
    dataset = kind(tmp_path / "out", train=False)
    assert np.array_equal(dataset.data, images["test"])
    assert dataset.targets == labels["test"].tolist()


def change_labels(folder, **arrays):
    with np.load(folder / "labels.npz") as content:
        np.savez(folder / "labels.npz", **(dict(content) | arrays))


@pytest.mark.parametrize("source", ["cifar10"], indirect=True)
def test_what_differs_from_the_published_data_is_named_and_nothing_is_written(source, tmp_path):
    folder, name, images, labels = source
    target = tmp_path / "out"

    def fails(message):
        with pytest.raises((ValueError, OSError), match=message):
            convert(folder, target, name)
        assert not target.exists()

    first = folder / "train_00.webp"
    good = first.read_bytes()
    changed = images["train"][:25].copy()
    changed[0, 0, 0, 1] ^= 128
    pack(changed, 5).save(first, lossless=True)
    fails(r"not those of the published data: channel 1 of train has mean 0.\d{8}")
    pack(images["train"][:25], 5).save(first, quality=95)
    fails("train_00.webp was compressed with loss")
    first.write_bytes(good[: len(good) // 2])
    fails("train_00.webp cannot be read")
    Image.new("RGB", (33, 32)).save(first, lossless=True)
    fails("must be an RGB image of whole tiles of 32 pixels, it is RGB, 33 x 32")
    pack(images["train"][:20], 5).save(first, lossless=True)
    fails("2 sheets of train hold 45 tiles, labels.npz has 50 labels")
    pack(images["train"][:23], 5).save(first, lossless=True)
    pack(images["train"][23:], 5).save(folder / "train_01.webp", lossless=True)
    fails("5 tiles of train have no label, and they are not blank")
    first.write_bytes(good)
    pack(images["train"][25:], 5).save(folder / "train_01.webp", lossless=True)
    Image.new("RGB", (32, 32)).save(folder / "train_02.png")
    fails("train_02.png is more than labels.npz has labels for")
    (folder / "train_02.png").unlink()
    swapped = labels["train"].copy()
    first_two = [np.flatnonzero(swapped == label)[0] for label in (0, 1)]
    swapped[first_two] = [1, 0]
    change_labels(folder, train=swapped)
    fails("images of train do not have the labels of the published data")
    other = labels["train"].copy()
    other[0] = (other[0] + 1) % 10
    change_labels(folder, train=other)
    fails(r"train must have 5 images of each class; 'class \d' has [46] \(2 classes differ\)")
    change_labels(folder, train=labels["train"] + 1)
    fails("labels of train must be 0 to 9, found 10")
    change_labels(folder, train=labels["train"], classes=np.array(["a"] * 10))
    fails("labels.npz names 1 classes, not 10")
    change_labels(folder, test=labels["test"] / 2)
    fails("`test` must be one whole number per image")
    (folder / "labels.npz").write_bytes(b"nothing")
    fails("labels.npz must hold the arrays")
    (folder / "labels.npz").unlink()
    fails("labels.npz does not exist")


@pytest.mark.parametrize("source", ["cifar10"], indirect=True)
def test_existing_pickles_are_not_replaced(source, tmp_path, capsys):
    folder, name, *_ = source
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(SystemExit):
        main([str(folder), str(tmp_path)])
    assert "cifar-10-batches-py is there already" in capsys.readouterr().err
    for path in folder.glob("train_*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no train_00.webp or train_00.png"):
        convert(folder, tmp_path / "out", name)
