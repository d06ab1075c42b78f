"""YAML files that name parents in BASE, as one sequence of settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .names import leaves
from .spelling import nearest


def settings(path: Path, chain: tuple[Path, ...] = ()) -> Iterator[tuple[str, Any, Path]]:
    """(full name, value, file) of each setting of a file and of its parents, later ones overriding.

    Parents come first, depth first, in the order of BASE; their paths are relative to the file that names
    them.

    Args:
        chain: resolved paths of the files that led here.

    Raises:
        FileNotFoundError: a file does not exist; the message names similar ones.
        ValueError: no YAML in UTF-8, a key that comes twice, no mapping, a BASE that is no list of files or
            leads back to the file.
    """
    if not path.is_file():
        near = nearest(path.stem, [p.stem for p in path.parent.glob("*.yaml")])
        named = f" named in BASE of {chain[-1]}" if chain else ""
        raise FileNotFoundError(
            f"config file {path}{named} does not exist; {path.parent} has {near or 'no YAML file'}"
        )
    if path.resolve() in chain:
        raise ValueError(
            f"BASE of {chain[-1]} leads back to {path}: files must not include each other"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold KEY: value pairs, got {type(content).__name__}")
    base = content.pop("BASE", None) or []
    parents = [base] if isinstance(base, str) else base
    if not isinstance(parents, list) or not all(isinstance(p, str | None) for p in parents):
        raise ValueError(f"BASE={base!r} in {path} must be a YAML file, or a list of them")
    for parent in filter(None, parents):
        yield from settings(path.parent / parent, (*chain, path.resolve()))
    for name, value in leaves(content):
        yield name, value, path


def differing(there: str, here: str) -> dict[str, tuple[Any, Any]]:
    """Full name -> (there, here) of what two dumped configs both set, and not alike, by name."""
    ours, theirs = (dict(leaves(yaml.safe_load(text))) for text in (here, there))
    shared = sorted(ours.keys() & theirs.keys())
    return {name: (theirs[name], ours[name]) for name in shared if theirs[name] != ours[name]}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that comes twice in a section: YAML's own reader takes the last and drops the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # which is refused below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' comes twice: merge the two", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
