"""One set of images in four formats: folder, zip, LMDB and WebDataset give the same batches."""

import io
import tarfile

import pytest
import torch

from config import load_config
from data import build_data, build_loader
from data.formats.imagenet import FolderImages
from tools.folder_to_lmdb import convert

CLASSES = {"ant": 70, "bee": 50, "cat": 80}


@pytest.fixture(scope="module")
def root(tmp_path_factory, images_writer, zip_writer):
    """200 training images and 30 others, in all four formats."""
    folder = tmp_path_factory.mktemp("formats")
    images_writer(folder, CLASSES, "train", size=(40, 36))
    images_writer(folder, {"ant": 9, "bee": 9, "cat": 12}, "val", size=(40, 36))
    for split in ("train", "val"):
        zip_writer(folder, split)
        convert(folder, folder, split)
        write_shards(folder, split, images_per_shard=67)
    return folder


def write_shards(folder, split, images_per_shard):
    samples = FolderImages(folder, split).samples
    for first in range(0, len(samples), images_per_shard):
        shard = folder / f"{split}-{first // images_per_shard:04d}.tar"
        with tarfile.open(shard, "w") as archive:
            for number, (path, label) in enumerate(
                samples[first : first + images_per_shard], first
            ):
                name = path.removesuffix(".png").rpartition(f"/{split}/")[2]
                archive.add(path, f"{name}-{number}.png")
                info = tarfile.TarInfo(f"{name}-{number}.cls")
                info.size = len(str(label))
                archive.addfile(info, io.BytesIO(str(label).encode()))


def config_of(root, dataset, num_workers, **more):
    keys = {
        "DATA.DATASET": dataset,
        "DATA.DATA_PATH": str(root),
        "DATA.IMG_SIZE": 24,
        "DATA.BATCH_SIZE": 40,
        "DATA.NUM_WORKERS": num_workers,
        "SEED": 5,
        **more,
    }
    pairs = [part for pair in keys.items() for part in pair]
    return load_config("configs/_base_/smoke_cls.yaml", pairs)


def epoch_of(config):
    data = build_data(config)
    data.train.set_position(3)
    return data.classes, list(data.train), list(data.val)


def assert_equal(batches, others):
    assert len(batches) == len(others) > 0
    for batch, expected in zip(batches, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


@pytest.fixture(scope="module")
def expected(root):
    classes, train, val = epoch_of(config_of(root, "imagenet", 0))
    assert classes == list(CLASSES)
    assert [len(labels) for _, labels in train] == [40] * 5
    assert sum(len(labels) for _, labels in val) == 30
    assert not torch.equal(train[0][0], train[1][0])
    return train, val


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("dataset", ["imagenet", "zip", "lmdb", "webdataset"])
def test_batches_are_those_of_the_folder_with_any_number_of_workers(
    root, expected, dataset, num_workers
):
    zipped = dataset == "zip"
    config = config_of(
        root, "imagenet" if zipped else dataset, num_workers, **{"DATA.ZIP_MODE": zipped}
    )
    classes, train, val = epoch_of(config)
    assert classes == list(CLASSES)
    assert_equal(train, expected[0])
    assert_equal(val, expected[1])


@pytest.mark.parametrize("dataset", ["lmdb", "webdataset"])
def test_workers_read_after_their_parent_has_read_too(root, expected, dataset):
    """A file that the parent has open must not be used, nor opened twice, by a forked worker."""
    own = build_loader(config_of(root, dataset, 0), "train")
    own.set_position(3)
    batches = iter(own)
    first = next(batches)
    shared = build_loader(config_of(root, dataset, 2), "train")
    shared.set_position(3)
    assert_equal(list(shared), expected[0])
    assert_equal([first, *batches], expected[0])
