"""What a user may have meant."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Choice = TypeVar("Choice")

# So many names are a list that can be read.
_FEW = 20


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The choices spelt most like `word`, case aside; if none is close, all of a few (sorted)."""
    spelling = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), spelling, n=count)
    if not close and len(spelling) > _FEW:
        close = difflib.get_close_matches(word.lower(), spelling, n=count, cutoff=0.0)
    return [spelling[c] for c in close] or sorted(spelling.values())


def choose(key: str, name: str, choices: Mapping[str, Choice]) -> Choice:
    """choices[name]; ValueError names the config key, the value, all choices and the nearest one."""
    if name not in choices:
        raise ValueError(
            f"{key}='{name}' must be one of {sorted(choices)}; did you mean {nearest(name, choices)[0]}?"
        )
    return choices[name]
