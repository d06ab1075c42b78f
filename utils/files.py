"""Whether files can be read, and written, before there is something to lose."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


def check_files(paths: Sequence[Path]) -> None:
    """FileNotFoundError that names the paths that are no files; IsADirectoryError for a folder."""
    if folders := [path for path in paths if path.is_dir()]:
        raise IsADirectoryError(f"{folders[0]} is a folder: give its files, as in {folders[0]}/*")
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"there are no files {missing[:5]}")


def obstacle(folder: Path) -> str:
    """Why no file can be made in a folder, which need not be there yet; empty if one can."""
    place = folder.absolute()
    while not os.path.exists(place):  # unlike Path.exists also where the parent may not be read
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError:
        return f"nothing can be written to {place}"


def check_output(path: Path, flag: str, is_folder: bool = False) -> None:
    """ValueError that names `flag` unless a file, or files in a folder, can be written to `path`."""
    if not is_folder and path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file")
    if reason := obstacle(path if is_folder else path.parent):
        raise ValueError(f"{flag} {path}: {reason}; give another place")
    if not is_folder and is_locked(path):
        raise ValueError(
            f"{flag} {path} cannot be written to: change its mode, or name another file"
        )


def is_locked(path: Path) -> bool:
    """Whether something is there that may not be written to."""
    return os.path.exists(path) and not os.access(path, os.W_OK)
