"""Parquet files in the layout of Hugging Face's datasets: a column of images, and one of labels."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.listing import Listing, check_labels, count_classes
from data.registry import SPLITS, ImageDataset, optional_package, register_dataset
from data.shards import find_shards

# Row groups that a process keeps in memory: in evaluation, neighbours are read once.
_KEPT = 4


@register_dataset("parquet")
class ParquetImages(ImageDataset):
    """Rows with an encoded image (a struct of bytes and path, or bytes alone) and a label.

    A row is read with its whole row group (100 rows in the files of the Hub), of which some are kept:
    fast in order, slower in random order. Classes are named by the files' own metadata, or by their
    numbers. Needs pyarrow.

    Args:
        train: files of the training split, relative to `root`: `data/train-*.parquet`, or "" for all that
            have the split's name in theirs; so is val.
        image: name of the column of images; so is label.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: pyarrow is not installed, a file is damaged, lacks a column, or a label has no class.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        train: str = "",
        val: str = "",
        image: str = "image",
        label: str = "label",
    ) -> None:
        self._columns = dict(IMAGE=image, LABEL=label)
        patterns = dict(train=train, val=val)
        self._paths, self._listing, groups = self._split(Path(root), split, patterns)
        named = self._class_names()
        if named is None:
            listings = {split: self._listing}
            for other in SPLITS:
                if other != split:
                    with suppress(FileNotFoundError):
                        listings[other] = self._split(Path(root), other, patterns)[1]
            count = count_classes(listings.get("train"), listings.get("val"))
            named = [str(number) for number in range(count)]
        self.classes = named
        check_labels(self._listing, len(named))
        self._groups = [(file, group) for file, group, _ in groups]
        self._starts = np.cumsum([0] + [rows for _, _, rows in groups])
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._listing)

    def read(self, index: int) -> tuple[bytes, int]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        value = self._images(group)[index - int(self._starts[group])].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            kind = "only a path" if isinstance(value, dict) and value.get("path") else "nothing"
            raise ValueError(f"'{self._columns['IMAGE']}' holds {kind} instead of an encoded image")
        return content, int(self._listing.labels[index])

    def describe(self, index: int) -> str:
        return self._listing.names[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}

    def _images(self, group: int) -> Any:
        """Images of a row group. Its file is opened for it, so that no process inherits an open one."""
        if group not in self._kept:
            file, own = self._groups[group]
            with self._open(self._paths[file]) as opened:
                table = opened.read_row_group(
                    own, columns=[self._columns["IMAGE"]], use_threads=False
                )
            self._kept[group] = table.column(self._columns["IMAGE"])
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def _split(
        self, root: Path, split: str, patterns: dict[str, str]
    ) -> tuple[list[Path], Listing, list[tuple[int, int, int]]]:
        """Files of a split; its labels; file, number in it and rows of each row group."""
        key = f"DATA.PARQUET.{split.upper()}"
        paths = find_shards(root, split, patterns[split], ".parquet", key)
        labels, groups = [], []
        for number, path in enumerate(paths):
            with self._open(path) as file:
                labels.append(self._labels(path, file))
                groups += [
                    (number, group, file.metadata.row_group(group).num_rows)
                    for group in range(file.num_row_groups)
                ]
        together = np.concatenate(labels)
        if not len(together):
            raise ValueError(f"{paths[0]} has no rows")
        rows = _Rows(paths, [len(part) for part in labels])
        return paths, Listing(rows, together, f"{paths[0].parent} ({split})"), groups

    def _open(self, path: Path) -> Any:
        arrow = optional_package("pyarrow", "DATA.DATASET='parquet'")
        parquet = optional_package("pyarrow.parquet", "DATA.DATASET='parquet'")
        try:
            file = parquet.ParquetFile(path)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is no readable parquet file: {error}") from error
        columns = file.schema_arrow.names
        for key, column in self._columns.items():
            if column not in columns:
                raise ValueError(
                    f"{path} has no column '{column}' (DATA.PARQUET.{key}), only {columns}"
                )
        return file

    def _labels(self, path: Path, file: Any) -> np.ndarray:
        column = self._columns["LABEL"]
        values = file.read(columns=[column], use_threads=False).column(column)
        if values.null_count:
            raise ValueError(
                f"{path}: '{column}' (DATA.PARQUET.LABEL) is missing (null) in {values.null_count} of "
                f"{len(values)} rows; give each image a label, or leave those out"
            )
        labels = values.to_numpy()
        whole = labels.dtype.kind in "iu"
        if not whole or (len(labels) and labels.min() < 0):
            # Test splits of the Hub hide their labels as -1.
            found = f"{labels.min()}" if whole else f"{labels[:1].tolist()} ({labels.dtype})"
            raise ValueError(
                f"{path}: '{column}' (DATA.PARQUET.LABEL) must be a number from 0 on in every row, "
                f"found {found}"
            )
        return labels

    def _class_names(self) -> list[str] | None:
        """Names that the Hub's datasets write into the schema of their files."""
        with self._open(self._paths[0]) as file:
            metadata = file.schema_arrow.metadata or {}
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return [str(name) for name in features[self._columns["LABEL"]]["names"]]
        except (KeyError, TypeError, ValueError):
            return None


class _Rows(Sequence[str]):
    """Where each row is, in words, without keeping a text per row."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self._paths, self._starts = paths, np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> str:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self._paths[file]}, row {index - self._starts[file]}"
