"""Images that a list names: text files of `path label`, and what follows from their labels."""

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .registry import ImageDataset, check_same_classes

# Files of a list that are looked for before work starts: a wrong root folder is found at once, and a
# million files of a network disk are not asked for.
_LOOKED_FOR = 16
_LABEL = re.compile("[0-9]{1,9}")


def once_per_file(read: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of `read(path, *args)`: the result is kept until the file is another one.

    A run builds each dataset several times (to check it, to count its classes, to load it).
    """

    @functools.lru_cache(maxsize=32)
    def kept(path: Path, size: int, mtime_ns: int, *args: Any) -> Any:
        return read(path, *args)

    @functools.wraps(read)
    def fresh(path: Path, *args: Any) -> Any:
        state = path.stat()
        return kept(path, state.st_size, state.st_mtime_ns, *args)

    return fresh


class Names(Sequence[str]):
    """Texts in one block of memory, which forked workers share: a list of millions each would copy."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._starts = np.cumsum([0] + [len(name) for name in encoded], dtype=np.int64)
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):  # ends an iteration
            raise IndexError(f"name {index} of {len(self)}")
        return os.fsdecode(self._text[self._starts[index] : self._starts[index + 1]])


class Listing:
    """Paths and labels of one list, or of several in a row.

    Attributes:
        names: paths, as they are listed; a list becomes `Names`.
        labels: (N,) int64.
        source: the list files, for messages.
    """

    def __init__(self, names: Sequence[str], labels: Any, source: str) -> None:
        self.names = Names(names) if isinstance(names, list) else names
        self.labels = np.asarray(labels, dtype=np.int64)
        self.source = source

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def folders(self) -> dict[int, set[str]]:
        """The folders directly above the images of each label."""
        found: dict[int, set[str]] = {}
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            found.setdefault(label, set()).add(name.rpartition("/")[0].rpartition("/")[2])
        return found


@once_per_file
def read_list(path: Path, separator: str | None = None) -> Listing:
    """Lines of a path and a label.

    Args:
        separator: between the two; None is the last white space of a line, so that a path may hold more.

    Raises:
        ValueError: a line is something else, or there is none; the message names file and line.
    """
    shown = "path<TAB>label" if separator == "\t" else "`path label`"
    names, labels = [], []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\n")
                if not line.strip():
                    continue
                name, *label = line.strip().rsplit(separator, 1)
                if not label or not _LABEL.fullmatch(label[0].strip()):
                    raise ValueError(f"{path}, line {number}: {line!r} must be {shown}, label >= 0")
                names.append(name)
                labels.append(int(label[0]))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file in UTF-8: {error}") from error
    if not names:
        raise ValueError(f"{path} lists no image")
    return Listing(names, labels, str(path))


def joined(listings: Sequence[Listing]) -> Listing:
    """The images of several lists, one list after the other."""
    if len(listings) == 1:
        return listings[0]
    return Listing(
        [name for listing in listings for name in listing.names],
        np.concatenate([listing.labels for listing in listings]),
        ", ".join(listing.source for listing in listings),
    )


def check_labels(listing: Listing, num_classes: int) -> None:
    """ValueError if a label is not one of `num_classes`, with the image that has it."""
    wrong = np.flatnonzero(listing.labels >= num_classes)
    if len(wrong):
        raise ValueError(
            f"{listing.source}: '{listing.names[wrong[0]]}' has label {listing.labels[wrong[0]]}, out of "
            f"range: {num_classes} classes have the labels 0 to {num_classes - 1} "
            f"({len(wrong)} of {len(listing)} images)"
        )


def count_classes(train: Listing | None, val: Listing | None) -> int:
    """Number of classes that the labels of both splits make, as far as they are there.

    Raises:
        ValueError: the training images leave labels out.
    """
    given = [listing for listing in (train, val) if listing is not None]
    count = 1 + max(int(listing.labels.max()) for listing in given)
    if train is not None:
        present = set(np.unique(train.labels).tolist())
        absent = list(itertools.islice((n for n in range(count) if n not in present), 5))
        if absent:
            first = "; do the labels start at 1? They must start at 0" if absent[0] == 0 else ""
            raise ValueError(
                f"{train.source}: labels must be 0 to {count - 1} without a gap, and no image has "
                f"{absent} ({count - len(present)} are left out){first}"
            )
    return count


def class_names(folders: Mapping[int, Set[str]], count: int) -> list[str]:
    """A class is named after the folder of its images, if they have one to themselves, or its number.

    Args:
        folders: those of each label, as `Listing.folders` has them.
    """
    single = {label: next(iter(names)) for label, names in folders.items() if len(names) == 1}
    owners: dict[str, int] = {}
    for names in folders.values():
        for name in names:
            owners[name] = owners.get(name, 0) + 1
    return [
        name if (name := single.get(label, "")) and owners[name] == 1 else str(label)
        for label in range(count)
    ]


def read_class_names(path: Path) -> list[str]:
    """One name per line, in the order of the labels; ValueError for none, or one that comes twice."""
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    while names and not names[-1]:
        names.pop()
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice or not all(names):
        fault = f"{twice} come twice" if twice else "a line is empty" if names else "it is empty"
        raise ValueError(f"{path} must hold one class name per line: {fault}")
    return names


class ListedImages(ImageDataset):
    """Files of a list.

    Args:
        root: folder that the list's paths are relative to.

    Raises:
        FileNotFoundError: some files, looked for here and there, do not exist.
        ValueError: a label has no class.
    """

    def __init__(self, root: Path, listing: Listing, classes: list[str]) -> None:
        self._root, self._listing, self.classes = root, listing, classes
        check_labels(listing, len(classes))
        for index in np.linspace(0, len(listing) - 1, min(_LOOKED_FOR, len(listing)), dtype=int):
            if not os.path.isfile(self.describe(index)):
                raise FileNotFoundError(
                    f"{self.describe(index)} does not exist; {listing.source} lists it as "
                    f"'{listing.names[index]}', relative to {root.absolute()}"
                )

    def __len__(self) -> int:
        return len(self._listing)

    def read(self, index: int) -> tuple[bytes, int]:
        with open(self.describe(index), "rb") as file:
            return file.read(), int(self._listing.labels[index])

    def describe(self, index: int) -> str:
        return os.path.join(self._root, self._listing.names[index])


class JoinedImages(ImageDataset):
    """The images of several datasets with the same classes, one dataset after the other."""

    def __init__(self, parts: Sequence[ImageDataset], where: str) -> None:
        self._parts, self.classes = parts, parts[0].classes
        for part in parts[1:]:
            check_same_classes(parts[0].classes, part.classes, where)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def holds(self, count: int) -> bool:
        for part in self._parts:
            if part.holds(count):
                return True
            count -= len(part)
        return False

    def _find(self, index: int) -> tuple[ImageDataset, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], int(index - (self._ends[part - 1] if part else 0))

    def read(self, index: int) -> Any:
        part, own = self._find(index)
        return part.read(own)

    def describe(self, index: int) -> str:
        part, own = self._find(index)
        return part.describe(own)
