"""Images of a folder in one LMDB file per split, as `tools/folder_to_lmdb.py` writes them.

An entry is an image file as it was, below the key of its number in 8 bytes, big endian. Beside them:

    meta      JSON: {"format": 1, "images": N, "classes": [...]}
    labels    N numbers, int32, little endian; checksums: N CRC-32, uint32
    names     paths of the images below their split's folder, UTF-8, separated by zero bytes
"""

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.listing import Names
from data.registry import (
    SPLITS,
    ImageDataset,
    check_same_classes,
    missing,
    optional_package,
    register_dataset,
)

FORMAT = 1
LAYOUT = "train.lmdb and val.lmdb, which `python tools/folder_to_lmdb.py FOLDER` writes"
_PAGE = 4096  # bytes; LMDB's allocation unit
_META, _LABELS, _CHECKSUMS, _NAMES = b"meta", b"labels", b"checksums", b"names"

# Files that this process has open. LMDB allows one opening per process, and none inherited by a fork.
_OPEN: dict[Path, tuple[int, Any]] = {}


@register_dataset("lmdb")
class LmdbImages(ImageDataset):
    """`root/<split>.lmdb`; safe to read from any number of workers, however they are started.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was written by another program, is cut off, or the other split, if it is there
            too, has other classes.
    """

    def __init__(self, root: str, split: str) -> None:
        self._path = Path(root).absolute() / f"{split}.lmdb"
        if not self._path.exists():
            missing(self._path, LAYOUT)
        meta, entries = _read_index(self._path)
        self.classes = meta["classes"]
        self._labels, self._checksums = entries[_LABELS], entries[_CHECKSUMS]
        self._names = Names(entries[_NAMES])
        found = {split: self.classes}
        for other in SPLITS:
            path = self._path.with_name(f"{other}.lmdb")
            if other != split and path.exists():
                found[other] = _read_index(path)[0]["classes"]
        check_same_classes(found.get("train", self.classes), found.get("val", self.classes), root)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[bytes, int]:
        with _environment(self._path).begin() as transaction:
            content = transaction.get(_key(index))
        if content is None or zlib.crc32(content) != self._checksums[index]:
            raise ValueError("the entry is damaged (missing, or another checksum)")
        return content, int(self._labels[index])

    def describe(self, index: int) -> str:
        return f"{self._path}@/{self._names[index]}"


def _key(index: int) -> bytes:
    return struct.pack(">Q", index)


def _environment(path: Path) -> Any:
    """The file, opened by this process."""
    owner, environment = _OPEN.get(path, (-1, None))
    if owner != os.getpid():
        if environment is not None:  # the parent's, which a fork must not use
            environment.close()
        _OPEN[path] = os.getpid(), _opened(path)
    return _OPEN[path][1]


def _close(path: Path) -> None:
    if path in _OPEN:
        _OPEN.pop(path)[1].close()


def _opened(path: Path) -> Any:
    lmdb = optional_package("lmdb", "DATA.DATASET='lmdb'")
    try:
        # No lock file: nobody writes, and the folder may be read-only. No read-ahead: order is random.
        environment = lmdb.open(
            str(path),
            subdir=path.is_dir(),
            readonly=True,
            lock=False,
            readahead=False,
            meminit=False,
            create=False,
        )
    except lmdb.Error as error:
        raise ValueError(f"{path} is no readable LMDB file: {error}") from error
    file = path / "data.mdb" if path.is_dir() else path
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if file.stat().st_size < needed:  # reading beyond the end kills a process without a message
        environment.close()
        raise ValueError(
            f"{file} is cut off: it has {file.stat().st_size} bytes of {needed}; copy it anew"
        )
    return environment


def _read_index(path: Path) -> tuple[dict[str, Any], dict[bytes, Any]]:
    """What the file says of its images -> meta, and labels, checksums and names by their keys."""
    _close(path)  # the file may be another one by now
    environment = _environment(path)
    try:
        with environment.begin() as transaction:
            parts = {name: transaction.get(name) for name in (_META, _LABELS, _CHECKSUMS, _NAMES)}
            of_the_lineage = transaction.get(b"__keys__") is not None
    finally:
        _close(path)  # each worker opens its own, when it first reads
    if of_the_lineage:
        raise ValueError(
            f"{path} was written by pyarrow.serialize (DHVT's and EViT's folder2lmdb.py), which pyarrow no "
            "longer has: write it anew from the images, python tools/folder_to_lmdb.py FOLDER"
        )
    if None in parts.values():
        raise ValueError(
            f"{path} was written by another program; DATA.DATA_PATH must hold {LAYOUT}"
        )
    meta = json.loads(parts[_META])
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {meta.get('format')}, and {FORMAT} is read: write it anew"
        )
    arrays = {
        _LABELS: np.frombuffer(parts[_LABELS], dtype="<i4"),
        _CHECKSUMS: np.frombuffer(parts[_CHECKSUMS], dtype="<u4"),
        _NAMES: os.fsdecode(parts[_NAMES]).split("\0"),
    }
    if {len(part) for part in arrays.values()} != {meta["images"]}:
        raise ValueError(f"{path} is damaged: its tables do not have {meta['images']} entries")
    return meta, arrays


def write_lmdb(
    path: Path,
    files: Sequence[tuple[Path, str, int]],
    classes: Sequence[str],
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write image files to one LMDB file, which is there at the end as a whole, or not at all.

    Args:
        files: file, name to remember it by, and label of each image, in the order of the dataset.
        progress: called now and then with the number of images done.

    Raises:
        ValueError: no image, a label without a class, or a file that is empty.
        OSError: a file cannot be read, or the disk has too little room, which is found out first.
    """
    lmdb = optional_package("lmdb", "writing LMDB files")
    if not files or not all(0 <= label < len(classes) for _, _, label in files):
        raise ValueError(f"{path}: {len(files)} images, labels must be 0 to {len(classes) - 1}")
    # A large entry takes whole pages with a header of 16 bytes; tables and the tree are added.
    pages = sum(-(-(file.stat().st_size + 16) // _PAGE) for file, _, _ in files)
    tables = sum(len(os.fsencode(name)) + 9 for _, name, _ in files)
    size = (pages + len(files) // 8) * _PAGE + 4 * tables + 2**24
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(
            f"{path.parent} has {free / 2**30:.1f} GiB free, {size / 2**30:.1f} are needed"
        )
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    try:
        with lmdb.open(
            str(temporary), subdir=False, map_size=size, lock=False, sync=False, meminit=False
        ) as environment:
            checksums = []
            for start in range(0, len(files), 1000):
                with environment.begin(write=True) as transaction:
                    for index, (file, _, _) in enumerate(files[start : start + 1000], start):
                        content = file.read_bytes()
                        if not content:
                            raise ValueError(f"{file} is empty")
                        checksums.append(zlib.crc32(content))
                        transaction.put(_key(index), content, append=True)
                progress(min(start + 1000, len(files)))
            meta = {"format": FORMAT, "images": len(files), "classes": list(classes)}
            with environment.begin(write=True) as transaction:
                transaction.put(_META, json.dumps(meta).encode())
                transaction.put(_LABELS, np.array([f[2] for f in files], dtype="<i4").tobytes())
                transaction.put(_CHECKSUMS, np.array(checksums, dtype="<u4").tobytes())
                transaction.put(_NAMES, b"\0".join(os.fsencode(name) for _, name, _ in files))
            environment.sync(True)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
