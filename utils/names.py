"""Dotted names of modules and parameters."""


def is_under(name: str, prefix: str) -> bool:
    """Whether `name` is that of the module or parameter `prefix`, or of something in it."""
    return name == prefix or name.startswith(prefix + ".")
