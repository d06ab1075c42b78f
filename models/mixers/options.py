"""Options of mixers: reading them from a spec, and checking them against annotations."""

import ast
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..registry import constructors

_WORDS = {  # one, and several
    bool: ("True or False", "True or False"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a word in quotes", "words in quotes"),
    type(None): ("None", "None"),
}


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`"dilated(dilation=[1, 2])"` -> ("dilated", {"dilation": [1, 2]}); values are Python literals."""
    match = re.fullmatch(r"\s*([^\W\d]\w*)\s*(\(.*\))?\s*", spec, re.DOTALL)
    try:
        # Under another name, because `global` is a word of Python's own.
        call = ast.parse(f"mixer{match[2] or '()'}", mode="eval").body if match else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            names = [keyword.arg for keyword in call.keywords]
            if None not in names and len(set(names)) == len(names):
                return match[1], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        pass  # reported below, together with what parses but is no call
    raise ValueError(
        f"MODEL.METAFORMER.MIXERS: cannot read '{spec}'; write 'name' or 'name(option=value, ...)' "
        "with literal values, each option once"
    )


def keywords_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """Name -> annotation of all parameters but the width; Any where it has none that can be read.

    A class that passes `**keywords` on takes those of the next class with a constructor, too.
    """
    if not isinstance(factory, type):
        return _own_keywords(factory, taken=1)
    found: dict[str, Any] = {}
    for owner in constructors(factory):
        found = _own_keywords(owner.__init__, taken=2) | found
    return found


def _own_keywords(function: Callable[..., Any], taken: int) -> dict[str, Any]:
    """`keywords_of`, but for the first `taken` places, which are the instance and the width."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind in places][taken:]
    named += [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    hints = _hints(function)
    return {name: hints.get(name, Any) for name in named}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, type):
        function = function.__init__
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # names for type checkers only, or an object with a call
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a literal has the annotated type; annotations of other than plain data are not checked."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if _is_fixed(hint):
            return len(value) == len(parts) and all(map(fits, value, parts))
        return all(fits(item, parts[0]) for item in value) if parts else True
    if hint is float:  # whole numbers may stand where fractions are asked for
        return type(value) in (int, float)
    return type(value) is hint if hint in _WORDS else True


def described(hint: Any) -> str:
    """An annotation in words, as in `a list of whole numbers, or None`."""
    return _in_words(hint, several=False)


def _in_words(hint: Any, several: bool) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_in_words(part, several) for part in parts)
    if origin is typing.Literal:
        return f"one of {list(parts)}"
    if origin in (list, tuple, Sequence):
        lists = "lists" if several else "a list"
        if _is_fixed(hint):
            return f"{lists} of {len(parts)}: {', '.join(map(described, parts))}"
        return f"{lists} of {_in_words(parts[0], several=True)}" if parts else lists
    return _WORDS[hint][several] if hint in _WORDS else str(hint)


def _is_fixed(hint: Any) -> bool:
    """Whether it is a tuple with a type for each place."""
    parts = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and bool(parts) and parts[-1] is not Ellipsis


def check_types(options: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """ValueError for an option whose value is not what its annotation says."""
    for option, value in options.items():
        if not fits(value, hints.get(option, Any)):
            raise ValueError(f"{option}={value!r} must be {described(hints[option])}")
