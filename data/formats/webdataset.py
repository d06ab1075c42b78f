"""WebDataset shards: tar archives in which neighbouring files of one name are one sample.

Shards are made to be read from one end to the other. Here each is walked once, and where its images lie is
noted: then any image is read by itself, so that shuffling, exact resuming and evaluation without padding
are those of every other format. No package is needed for it.
"""

import hashlib
import json
import logging
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.listing import Listing, check_labels, class_names, count_classes, read_class_names
from data.registry import SPLITS, ImageDataset, register_dataset
from data.shards import find_shards

_LOG = logging.getLogger(__name__)

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")
_CLASS_FILES = ("classes.txt", "classnames.txt")
_BLOCK = 512  # bytes of a tar header; contents are padded to a multiple of it


@register_dataset("webdataset")
class TarImages(ImageDataset):
    """Samples of an image (`x.jpg`, `x.png`, ...) and a label: `x.cls`, or "label" or "cls" in `x.json`.

    Classes are named by `root/classes.txt` or `root/classnames.txt`, one per line, or else after the
    folders in the archive, or by their numbers. The index is kept in `root` as a hidden file, if that can
    be written to; shards that have changed are walked again.

    Args:
        train: shards of the training split, relative to `root`: `train-{000..146}.tar`, `a/*.tar`, or
            "" for all that have the split's name in theirs; so is val.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is damaged or compressed, or a sample lacks its image or its label.
    """

    def __init__(self, root: str, split: str, *, train: str = "", val: str = "") -> None:
        folder, patterns = Path(root), dict(train=train, val=val)
        self._shards, self._places, self._listing = _index(folder, split, patterns[split])
        named = next((folder / n for n in _CLASS_FILES if (folder / n).is_file()), None)
        if named:
            self.classes = read_class_names(named)
            check_labels(self._listing, len(self.classes))
            return
        listings = {split: self._listing}
        for other in SPLITS:
            if other != split:
                with suppress(FileNotFoundError):
                    listings[other] = _index(folder, other, patterns[other])[2]
        found = listings.get("train"), listings.get("val")
        self.classes = class_names((found[0] or found[1]).folders, count_classes(*found))

    def __len__(self) -> int:
        return len(self._listing)

    def read(self, index: int) -> tuple[bytes, int]:
        shard, offset, size = self._places[index].tolist()
        with open(self._shards[shard], "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise ValueError("the shard is cut off")
        return content, int(self._listing.labels[index])

    def describe(self, index: int) -> str:
        return f"{self._shards[self._places[index, 0]]}@/{self._listing.names[index]}"


# Indices of this process: a run builds each dataset several times.
_INDICES: dict[Path, tuple[list[Path], np.ndarray, Listing]] = {}


def _index(root: Path, split: str, pattern: str) -> tuple[list[Path], np.ndarray, Listing]:
    """Shards; shard, offset and size of each image (N, 3); names and labels."""
    shards = find_shards(root, split, pattern, ".tar", f"DATA.WEBDATASET.{split.upper()}")
    states = [
        (path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in shards
    ]
    state = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
    kept = root.absolute() / f".webdataset-{state}.npz"
    if kept not in _INDICES:
        stored = _load(kept)
        if stored is None:
            stored = _walk_all(shards)
            _store(kept, *stored)
        names, places, labels = stored
        _INDICES[kept] = shards, places, Listing(names, labels, f"{root} ({split})")
    return _INDICES[kept]


def _walk_all(shards: Sequence[Path]) -> tuple[list[str], np.ndarray, np.ndarray]:
    _LOG.info("indexing %d shards, %s ...", len(shards), shards[0])
    names, places, labels = [], [], []
    for number, path in enumerate(shards):
        for name, offset, size, label in walk(path):
            names.append(name)
            places.append((number, offset, size))
            labels.append(label)
    return names, np.array(places, dtype=np.int64), np.array(labels, dtype=np.int64)


def _load(path: Path) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """A stored index; None if there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            names = os.fsdecode(content["names"].tobytes()).split("\0")
            return names, content["places"], content["labels"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _LOG.warning("%s cannot be read (%s): the shards are walked again", path, error)
        return None


def _store(path: Path, names: list[str], places: np.ndarray, labels: np.ndarray) -> None:
    """Keep an index for the next run, if the folder may be written to."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = np.frombuffer(b"\0".join(map(os.fsencode, names)), dtype=np.uint8)
    try:
        with temporary.open("wb") as file:
            np.savez(file, names=text, places=places, labels=labels)
        os.replace(temporary, path)
    except OSError as error:
        _LOG.info("the index is not kept (%s): the next run walks the shards again", error)
    finally:
        with suppress(OSError):
            temporary.unlink()


def walk(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset, size in bytes, and label of each image of a shard, in its order.

    Raises:
        ValueError: the shard is no tar archive, is compressed, damaged or cut off, or a sample is not
            one image with one label.
    """
    with path.open("rb") as file:
        key, parts = "", {}
        for member in _members(path, file):
            folder, slash, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not dot or base.startswith("."):
                continue
            if folder + slash + stem != key:
                if parts:
                    yield _sample(path, file, key, parts)
                key, parts = folder + slash + stem, {}
            if extension.lower() in parts:
                raise ValueError(f"{path}: the sample '{key}' has two .{extension} files in a row")
            parts[extension.lower()] = member
        if parts:
            yield _sample(path, file, key, parts)


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The files of an archive, which must end as it should: tarfile stops at damage without a word."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isfile():
                    yield member
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no uncompressed tar archive, or damaged: {error}") from error
    file.seek(end)
    mark = file.read(_BLOCK)
    if mark.strip(b"\0") or len(mark) < _BLOCK:
        raise ValueError(f"{path} is damaged or cut off: after {end} bytes it has no proper end")


def _sample(
    path: Path, file: BinaryIO, key: str, parts: dict[str, tarfile.TarInfo]
) -> tuple[str, int, int, int]:
    images = [extension for extension in _IMAGES if extension in parts]
    if len(images) != 1:
        raise ValueError(
            f"{path}: the sample '{key}' must have one image ({', '.join(_IMAGES)}), it has "
            f"{sorted(parts)}"
        )
    image = parts[images[0]]
    return image.name, image.offset_data, image.size, _label(path, file, key, parts)


def _label(path: Path, file: BinaryIO, key: str, parts: dict[str, tarfile.TarInfo]) -> int:
    found: Any = None
    for extension, read in (("cls", _number), ("json", _entry)):
        if found is None and extension in parts:
            file.seek(parts[extension].offset_data)
            found = read(file.read(parts[extension].size))
    if type(found) is not int or not 0 <= found < 2**31:
        raise ValueError(
            f"{path}: the sample '{key}' must have its label, a number from 0 on, in .cls, or as 'label' "
            f"or 'cls' in .json; it has {sorted(parts)}{'' if found is None else f' with {found!r}'}"
        )
    return found


def _number(content: bytes) -> Any:
    """The number, or else the text."""
    try:
        return int(content)
    except ValueError:
        return content[:20]


def _entry(content: bytes) -> Any:
    """What a JSON object says of the label; None if nothing."""
    try:
        found = json.loads(content)
    except ValueError:
        return content[:20]
    return found.get("label", found.get("cls")) if isinstance(found, dict) else None
