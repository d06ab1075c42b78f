"""Which files of a folder make up a split that is spread over many of them."""

import logging
import re
from pathlib import Path

_LOG = logging.getLogger(__name__)

# What the splits are called in file names; the first one that is there is taken.
ALIASES = {"train": ("train",), "val": ("val", "validation", "valid", "test")}


def find_shards(root: Path, split: str, pattern: str, suffix: str, key: str) -> list[Path]:
    """Files of a split, sorted.

    Args:
        pattern: relative to `root`, with braces (`train-{000..146}.tar`, `{a,b}.tar`), whose files must
            all exist, and * or **; "": all files with the split's name in theirs (`train-0.tar`,
            `data/train-00000-of-00002.parquet`, `validation/3.tar`).
        suffix: of the files, ".tar".
        key: config key of `pattern`, for messages.

    Raises:
        FileNotFoundError: there is none, or some of them are missing.
        ValueError: `pattern` is no relative path, or its braces name nothing.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root.absolute()} does not exist (DATA.DATA_PATH)")
    if pattern:
        found: list[Path] = []
        names = expand_braces(pattern)
        if not names or Path(pattern).is_absolute():
            fault = "is not relative to DATA.DATA_PATH" if names else "names nothing"
            raise ValueError(f"{key}='{pattern}' {fault}")
        for single in names:
            files = sorted(path for path in root.glob(single) if path.is_file())
            if not files:
                raise FileNotFoundError(f"{root / single} does not exist ({key} '{pattern}')")
            found += files
        return list(dict.fromkeys(found))
    for alias in ALIASES[split]:
        named = re.compile(rf"(^|[-_./]){alias}([-_./]|\d|$)")
        found = sorted(
            path
            for path in root.rglob(f"*{suffix}")
            if named.search(path.relative_to(root).as_posix().removesuffix(suffix))
        )
        if found:
            if alias not in (split, "validation"):
                _LOG.info("%s: the files named '%s' are the split '%s'", root, alias, split)
            _check_complete(found)
            return found
    raise FileNotFoundError(
        f"{root.absolute()} has no {suffix} files of the split '{split}', such as "
        f"{ALIASES[split][0]}-0000{suffix} (names tried: {', '.join(ALIASES[split])}); set {key}"
    )


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; `{a,b}` -> a, b; several of them, all pairs."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds:
        first, last = bounds.groups()
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        parts = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for part in parts for whole in expand_braces(f"{before}{part}{after}")]


def _check_complete(paths: list[Path]) -> None:
    """FileNotFoundError if names like x-00000-of-00002 say that a file is missing."""
    present = {str(path) for path in paths}
    for path in paths:
        match = re.search(r"-(\d+)-of-(\d+)", path.name)
        if match is None:
            continue
        for number in range(int(match[2])):
            place = f"-{number:0{len(match[1])}d}-of-{match[2]}"
            other = path.with_name(path.name.replace(match[0], place, 1))
            if str(other) not in present:
                raise FileNotFoundError(f"{other} does not exist: {path.name} is one of {match[2]}")
