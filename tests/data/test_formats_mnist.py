"""MNIST and Fashion-MNIST: IDX files wherever people have them, compressed or not."""

import gzip

import numpy as np
import pytest

from data.registry import create_dataset


def write_idx(path, array, compress=False):
    content = bytes([0, 0, 8, array.ndim])
    content += b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if compress else content)


def write(root, compress=False, dash="-", suffix=None):
    rng = np.random.default_rng(1)
    stored = {}
    suffix = (".gz" if compress else "") if suffix is None else suffix
    for prefix, count in (("train", 6), ("t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        write_idx(root / f"{prefix}-images{dash}idx3-ubyte{suffix}", images, compress)
        write_idx(root / f"{prefix}-labels{dash}idx1-ubyte{suffix}", labels, compress)
        stored[prefix] = images, labels
    return stored


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", ""), ("fashion_mnist", "FashionMNIST/raw"), ("FashionMNIST", "raw"), ("mnist", "MNIST/raw")],
)  # fmt: skip
@pytest.mark.parametrize(
    "how", [{}, dict(compress=True), dict(dash="."), dict(compress=True, suffix="")]
)
def test_images_and_labels_are_those_of_the_files(tmp_path, name, folder, how):
    stored = write(tmp_path / folder, **how)
    for split, prefix in (("train", "train"), ("val", "t10k")):
        dataset = create_dataset(name, str(tmp_path), split)
        images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
        assert np.array_equal(np.stack(images), stored[prefix][0])
        assert list(labels) == stored[prefix][1].tolist()
        assert len(dataset.classes) == 10


def test_classes_have_their_names(tmp_path):
    write(tmp_path)
    assert create_dataset("fashion_mnist", str(tmp_path), "val").classes[9] == "Ankle boot"
    assert create_dataset("mnist", str(tmp_path), "val").classes[9] == "9"


def test_files_equal_those_that_torchvision_reads(tmp_path):
    from torchvision.datasets import FashionMNIST

    write(tmp_path / "FashionMNIST" / "raw")
    theirs = FashionMNIST(tmp_path, train=False)
    ours = create_dataset("fashion_mnist", str(tmp_path), "val")
    assert np.array_equal(theirs.data.numpy(), np.stack([ours[i][0] for i in range(4)]))
    assert theirs.targets.tolist() == [ours[i][1] for i in range(4)]
    assert [name.replace(" ", "") for name in theirs.classes] == [
        name.replace(" ", "") for name in ours.classes
    ]


def test_damaged_and_missing_files_are_named(tmp_path):
    def build():
        return create_dataset("mnist", str(tmp_path), "train")

    with pytest.raises(
        FileNotFoundError, match=r"train-images-idx3-ubyte does not exist.*MNIST/raw"
    ):
        build()
    write(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    good = images.read_bytes()
    for content, message in (
        (good[:-1], r"is damaged: it says \[6, 28, 28\] and holds 4703 bytes"),
        (labels.read_bytes(), "is no IDX file of bytes in 3 dimensions"),
        (b"", "is no IDX file"),
        (gzip.compress(good)[:-9], "images-idx3-ubyte is damaged"),
    ):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            build()
    images.write_bytes(good)
    write_idx(labels, np.arange(5, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"has 6 images, .* has 5 labels"):
        build()
    write_idx(labels, np.array([0, 1, 2, 3, 4, 10], dtype=np.uint8))
    with pytest.raises(ValueError, match="label 10 is out of range: labels must be 0 to 9"):
        build()
