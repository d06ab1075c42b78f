"""MNIST and Fashion-MNIST in IDX form, compressed or not."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from data.registry import ArrayImages, ImageDataset, missing, register_dataset

FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@register_dataset("mnist", num_classes=10, train_size=60_000)
def mnist(root: str, split: str) -> ImageDataset:
    """`{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]` in `root`, or in torchvision's MNIST/raw."""
    return IdxImages(Path(root), split, "MNIST", [str(digit) for digit in range(10)])


@register_dataset("fashion_mnist", "fashionmnist", num_classes=10, train_size=60_000)
def fashion_mnist(root: str, split: str) -> ImageDataset:
    """As "mnist", or in torchvision's FashionMNIST/raw (arXiv:1708.07747)."""
    return IdxImages(Path(root), split, "FashionMNIST", list(FASHION))


class IdxImages(ArrayImages):
    """Gray images of one IDX file, and the labels of another one; always all in memory.

    Args:
        folder: torchvision's name for the data, below `root`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the two do not fit together, or a label has no class.
    """

    def __init__(self, root: Path, split: str, folder: str, classes: list[str]) -> None:
        self.classes = classes
        prefix = "train" if split == "train" else "t10k"
        self._path = _find(root, folder, f"{prefix}-images", "idx3")
        labels = _find(root, folder, f"{prefix}-labels", "idx1")
        self._images = read_idx(self._path, 3)  # (N, H, W)
        self._labels = read_idx(labels, 1).astype(np.int64)
        if len(self._images) != len(self._labels) or not len(self._labels):
            raise ValueError(
                f"{self._path} has {len(self._images)} images, {labels} has {len(self._labels)} labels"
            )
        if self._labels.max() >= len(classes):
            raise ValueError(
                f"{labels}: label {self._labels.max()} is out of range: labels must be 0 to "
                f"{len(classes) - 1}"
            )

    def describe(self, index: int) -> str:
        return f"{self._path}, image {index}"


def _find(root: Path, folder: str, name: str, kind: str) -> Path:
    """The file, with the dash of the published names or the dot that unpackers make of it."""
    for place in (root, root / "raw", root / folder / "raw", root / folder):
        for dash in "-.":
            for suffix in ("", ".gz"):
                path = place / f"{name}{dash}{kind}-ubyte{suffix}"
                if path.is_file():
                    return path
    layout = "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, each with or without .gz"
    missing(root / f"{name}-{kind}-ubyte", f"{layout}, there or in {folder}/raw")


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Bytes of an IDX file with `ndim` dimensions; ValueError if it is something else, or cut off."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # gzip, whatever its name says
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions, then their sizes, big endian.
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes([0, 0, 8, ndim]):
        raise ValueError(
            f"{path} is no IDX file of bytes in {ndim} dimensions; it starts with {content[:4]!r}"
        )
    shape = np.frombuffer(content[4:header], dtype=">u4").tolist()
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path} is damaged: it says {shape} and holds {len(content) - header} bytes"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
