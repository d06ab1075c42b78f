"""Images in one zip archive per split, listed by a text file: Swin's format, with its cache modes."""

import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.listing import class_names, count_classes, read_list
from data.registry import SPLITS, ImageDataset, missing

_LOG = logging.getLogger(__name__)

LAYOUT = "{train,val}.zip and {train,val}_map.txt with lines of path<TAB>label"


class ZippedImages(ImageDataset):
    """`root/<split>.zip` and `root/<split>_map.txt`.

    The number of classes is that of both maps, as far as they exist. A class is named after the folder
    of its images in the training map (without one: in the validation map), or after its number.

    Raises:
        FileNotFoundError: a file is missing, or the archive lacks a listed image.
        ValueError: a line of a map is not `path<TAB>label`, the training map leaves a label out, or a file
            is no zip archive.
    """

    def __init__(self, root: Path, split: str) -> None:
        for name in (f"{split}.zip", f"{split}_map.txt"):
            if not (root / name).is_file():
                missing(root / name, LAYOUT)
        train, val = (
            read_list(path, "\t") if (path := root / f"{name}_map.txt").is_file() else None
            for name in SPLITS
        )
        self._listing = train if split == "train" else val
        self.classes = class_names((train or val).folders, count_classes(train, val))
        self._archive = _Archive(root / f"{split}.zip", self._listing.names, folder=split)

    def __len__(self) -> int:
        return len(self._listing)

    def read(self, index: int) -> tuple[bytes, int]:
        return self._archive.read(index), int(self._listing.labels[index])

    def describe(self, index: int) -> str:
        return f"{self._archive.path}@/{self._listing.names[index]}"

    def cache(self, indices: Sequence[int]) -> None:
        self._archive.cache(indices)


class _Archive:
    """Random access to the listed members of a zip file, from any number of processes.

    The table of contents is read once and kept as arrays, which forked workers share: Python's own
    table of ImageNet takes about a gigabyte, and each worker would need one.
    """

    def __init__(self, path: Path, names: Sequence[str], folder: str) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = {info.filename: info for info in archive.infolist()}
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a readable zip archive: {error}") from error
        rows = []
        for name in names:
            # Archives of the split's folder, instead of its content, are as common.
            info = members.get(name) or members.get(f"{folder}/{name}")
            if info is None:
                raise FileNotFoundError(
                    f"{path} has no member '{name}', which {folder}_map.txt lists; "
                    f"it has e.g. {list(members)[:3]}"
                )
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{path}: '{name}' must be stored or deflated; zip it anew")
            rows.append(
                (
                    info.header_offset,
                    info.compress_size,
                    info.file_size,
                    info.CRC,
                    info.compress_type,
                )
            )
        self._table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        self._cached = np.empty(0, dtype=np.uint8)
        self._cached_at = np.full(len(rows), -1, dtype=np.int64)
        self._file: BinaryIO | None = None
        self._owner = -1

    def read(self, index: int) -> bytes:
        """Content of a member; BadZipFile if it is damaged."""
        offset, packed_size, size, checksum, method = self._table[index].tolist()
        start = int(self._cached_at[index])
        if start >= 0:
            return self._cached[start : start + size].tobytes()
        file = self._open()
        file.seek(offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise zipfile.BadZipFile("its header is damaged")
        # The local header repeats name and extra field, whose length may differ from the directory's.
        file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)
        content = file.read(packed_size)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content)
        if len(content) != size or zlib.crc32(content) != checksum:
            raise zipfile.BadZipFile("its content is damaged (wrong length or checksum)")
        return content

    def cache(self, indices: Sequence[int]) -> None:
        """Read members into one array, which forked workers share; damaged ones are left to `read`.

        What was in memory before and is not listed is no longer; does nothing if all of them are.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (self._cached_at[indices] >= 0).all():
            return
        sizes = self._table[indices, 2]
        cached, cached_at = (
            np.empty(int(sizes.sum()), dtype=np.uint8),
            np.full_like(self._cached_at, -1),
        )
        start = 0
        for index, size in zip(indices.tolist(), sizes.tolist(), strict=True):
            try:
                content = self.read(index)
            except (zipfile.BadZipFile, zlib.error):
                continue
            cached[start : start + size] = np.frombuffer(content, dtype=np.uint8)
            cached_at[index] = start
            start += size
        self._cached, self._cached_at = cached, cached_at
        count = int((cached_at >= 0).sum())
        _LOG.info("%s: %d images, %.1f MiB in memory", self.path, count, start / 2**20)

    def _open(self) -> BinaryIO:
        # Forked workers share the position of an inherited file, so each process opens its own.
        if self._file is None or self._owner != os.getpid():
            if self._file is not None:
                self._file.close()
            self._file, self._owner = self.path.open("rb"), os.getpid()
        return self._file

    def __del__(self) -> None:
        if getattr(self, "_file", None):
            self._file.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}
