"""What a user may have meant."""

import difflib
from collections.abc import Iterable


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The choices spelt most like `word`, case aside; all of them (sorted) if none is close."""
    spelling = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), spelling, n=count)
    return [spelling[c] for c in close] or sorted(spelling.values())
