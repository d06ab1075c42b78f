"""Dotted names of modules and parameters."""

from collections.abc import Iterable


def is_under(name: str, prefix: str) -> bool:
    """Whether `name` is that of the module or parameter `prefix`, or of something in it."""
    return name == prefix or name.startswith(prefix + ".")


def is_under_any(name: str, prefixes: Iterable[str]) -> bool:
    """Whether `name` is that of one of `prefixes`, or of something in it."""
    return any(is_under(name, prefix) for prefix in prefixes)
