"""Dotted names: of modules and parameters, of the values in nested sections, of classes and functions."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any


def is_under(name: str, prefix: str) -> bool:
    """Whether `name` is that of the module or parameter `prefix`, or of something in it."""
    return name == prefix or name.startswith(prefix + ".")


def is_under_any(name: str, prefixes: Iterable[str]) -> bool:
    """Whether `name` is that of one of `prefixes`, or of something in it."""
    return any(is_under(name, prefix) for prefix in prefixes)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, value) of what nested dicts hold, a CfgNode's too: `{"A": {"B": 1}}` -> `("A.B", 1)`."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def origin(factory: Any) -> tuple[str, str]:
    """Where a class or function is written; a module that is loaded again has the same, a copied file not."""
    if isinstance(factory, partial):
        module, name = origin(factory.func)
        return module, f"partial({name}, {factory.args}, {factory.keywords})"
    return factory.__module__, factory.__qualname__


def check_decorator(name: Any, decorator: str) -> None:
    """TypeError where `decorator` stands without its brackets and gets the class in place of the name."""
    if not isinstance(name, str):
        raise TypeError(f'write @{decorator}("a_name"), not @{decorator}: it gets {name!r}')
