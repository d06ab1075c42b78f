"""CIFAR-10 and CIFAR-100 in the layout of their "python version", read without running its pickles."""

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from data.registry import ArrayImages, ImageDataset, missing, register_dataset


@register_dataset("cifar10", num_classes=10, train_size=50_000)
def cifar10(root: str, split: str) -> ImageDataset:
    """`cifar-10-batches-py/{data_batch_1..5, test_batch, batches.meta}` in or at `root`."""
    files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return CifarImages(
        Path(root), "cifar-10-batches-py", files, "labels", ("batches.meta", "label_names")
    )


@register_dataset("cifar100", num_classes=100, train_size=50_000)
def cifar100(root: str, split: str) -> ImageDataset:
    """`cifar-100-python/{train, test, meta}` in or at `root`; the 100 fine classes."""
    files = ["train"] if split == "train" else ["test"]
    return CifarImages(
        Path(root), "cifar-100-python", files, "fine_labels", ("meta", "fine_label_names")
    )


class CifarImages(ArrayImages):
    """Images of 32x32 pixels from pickles of rows of 3072 bytes, channels first.

    Files are not compared with the published checksums: any pickles of this layout will do.

    Args:
        names: file and key of the class names.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: a pickle asks to run code, is damaged, or holds something else.
    """

    def __init__(
        self, root: Path, folder: str, files: list[str], label_key: str, names: tuple[str, str]
    ) -> None:
        if not (root / folder).is_dir() and (root / names[0]).is_file():
            folder = "."
        for file in (*files, names[0]):
            if not (root / folder / file).is_file():
                missing(root / folder / file, f"{folder}/ with {', '.join((*files, names[0]))}")
        self._files = [root / folder / file for file in files]
        meta = root / folder / names[0]
        self.classes = [str(name) for name in _entry(meta, load_pickle(meta), names[1])]
        batches = [self._read(path, label_key) for path in self._files]
        self._starts = np.cumsum([0] + [len(labels) for _, labels in batches])
        images = np.concatenate([rows for rows, _ in batches])
        images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        self._images = np.ascontiguousarray(images)  # (N, 32, 32, 3)
        self._labels = np.concatenate([labels for _, labels in batches])

    def _read(self, path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
        content = load_pickle(path)
        rows = np.asarray(_entry(path, content, "data"))
        labels = np.asarray(_entry(path, content, label_key))
        if rows.dtype != np.uint8 or rows.shape != (len(labels), 3072):
            raise ValueError(
                f"{path}: 'data' must be uint8 ({len(labels)}, 3072), one row per label; "
                f"it is {rows.dtype} {rows.shape}"
            )
        if labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < len(
            self.classes
        ):
            raise ValueError(
                f"{path}: '{label_key}' must be integers from 0 to {len(self.classes) - 1}"
            )
        return rows, labels.astype(np.int64)

    def describe(self, index: int) -> str:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._files[file]}, image {index - self._starts[file]}"


def _entry(path: Path, content: Any, key: str) -> Any:
    if not isinstance(content, dict) or key not in content:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must be a dict with the key '{key}', found {found}")
    return content[key]


def load_pickle(path: Path) -> Any:
    """Read a pickle of arrays, text, numbers, lists and dicts; whatever else it asks for is refused.

    Raises:
        ValueError: the pickle would run code, or is damaged.
    """
    try:
        with path.open("rb") as file:
            # latin1: the published files are pickles of Python 2.
            return _DataUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, UnicodeDecodeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a pickle of plain data: {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _text_bytes(text: str, encoding: str = "latin1") -> bytes:
    """What pickles of Python 3, protocol 2, call to make bytes."""
    if encoding.lower() not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding '{encoding}'")
    return codecs.encode(text, "latin1")


def _constructors() -> dict[tuple[str, str], Any]:
    # NumPy's functions by example: their module is private and has moved from core to _core.
    array, number = np.zeros(1, dtype=np.uint8), np.int64(0)
    named = {
        ("multiarray", "_reconstruct"): array.__reduce__()[0],
        ("multiarray", "scalar"): number.__reduce__()[0],
        ("numeric", "_frombuffer"): array.__reduce_ex__(5)[0],
    }
    allowed = {
        (f"numpy.{package}.{module}", name): function
        for (module, name), function in named.items()
        for package in ("core", "_core")
    }
    return allowed | {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _text_bytes,
    }


class _DataUnpickler(pickle.Unpickler):
    allowed = _constructors()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only arrays and plain data are allowed "
                "(the file may be malicious)"
            )
        return self.allowed[module, name]
