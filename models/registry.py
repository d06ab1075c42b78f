"""Which architectures exist, and the config schema that their constructors' signatures define.

`@register("dfvt", node="DFvT")` on a `Backbone` subclass creates `MODEL.DFvT.EMBED_DIM` from the
keyword `embed_dim: int = 96`: the signature is the only home of a hyper-parameter and its default.
"""

import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from utils.names import check_decorator, origin
from utils.spelling import nearest

# Keywords that every backbone takes from shared keys, not from its own node.
SHARED_KEYWORDS = {
    "num_classes": "MODEL.NUM_CLASSES",
    "in_chans": "MODEL.IN_CHANS",
    "img_size": "DATA.IMG_SIZE",
    "drop_rate": "MODEL.DROP_RATE",
    "drop_path_rate": "MODEL.DROP_PATH_RATE",
}

_ENTRIES: dict[str, "Entry"] = {}

# Types of the lineage's files that are not here, and why.
_ABSENT = {"swin_moe": "mixture-of-experts models are not part of MixLab"}


@dataclass(frozen=True)
class Field:
    """One config key: its default, the Python types of a value, and those of a list's elements."""

    default: Any
    types: tuple[type, ...]
    elements: tuple[type, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A registered architecture; `fields` maps lower-case keywords to their `Field`."""

    name: str
    node: str
    cls: type
    fields: dict[str, Field]

    @property
    def keys(self) -> dict[str, str]:
        """Keyword of the constructor -> config key, the shared ones included."""
        own = {keyword: f"MODEL.{self.node}.{keyword.upper()}" for keyword in self.fields}
        return own | SHARED_KEYWORDS


def register(name: str, node: str | None = None) -> Callable[[type], type]:
    """Class decorator: make a backbone known as MODEL.TYPE `name`, configured by `MODEL.<node>`.

    Raises:
        TypeError: a keyword that cannot become a config key (positional, no default, no plain type), one of
            `SHARED_KEYWORDS` missing, or a class that is no `Backbone`.
        ValueError: the name is taken.
    """
    check_decorator(name, "register")

    def decorate(cls: type) -> type:
        _check_class(cls)
        if name.lower() in _ENTRIES and origin(_ENTRIES[name.lower()].cls) != origin(cls):
            raise ValueError(
                f"MODEL.TYPE='{name}' is registered twice: {_ENTRIES[name.lower()].cls} and {cls}"
            )
        _ENTRIES[name.lower()] = Entry(
            name.lower(), node or name.upper(), cls, signature_fields(cls)
        )
        return cls

    return decorate


def _check_class(cls: type) -> None:
    """TypeError unless `build_model` can build the class, and the engine use it."""
    from .backbone import Backbone  # here, because architectures import this module first

    if not issubclass(cls, Backbone):
        raise TypeError(
            f"{cls.__name__} must derive from models.Backbone, which is what engines use"
        )
    parameters = [inspect.signature(owner.__init__).parameters for owner in constructors(cls)]
    missing = [key for key in SHARED_KEYWORDS if not any(key in names for names in parameters)]
    if missing:
        raise TypeError(
            f"{cls.__name__}.__init__ lacks {missing}, which every architecture is given; pass them on to a "
            "base class by **keywords, or take them"
        )


def find(name: str) -> Entry:
    """The entry of MODEL.TYPE `name`, without regard to case; ValueError names the nearest ones."""
    entry = _ENTRIES.get(name.lower())
    if name.lower() in _ABSENT:
        raise ValueError(f"MODEL.TYPE='{name}': {_ABSENT[name.lower()]}")
    if entry is None:
        close = nearest(name.lower(), _ENTRIES)
        raise ValueError(
            f"MODEL.TYPE='{name}' is not registered; did you mean one of {close}? "
            f"All: {sorted(_ENTRIES)}"
        )
    return entry


def entries() -> list[Entry]:
    """All registered architectures, by name."""
    return [_ENTRIES[key] for key in sorted(_ENTRIES)]


def signature_fields(cls: type, given: Collection[str] = SHARED_KEYWORDS) -> dict[str, Field]:
    """The config fields that the constructor of `cls` defines; arguments in `given` come from elsewhere.

    `**keywords` stands for those of the next base class; a default of its own comes before the base's.
    """
    fields: dict[str, Field] = {}
    for constructor in constructors(cls):
        own = _own_fields(constructor, given)
        fields |= {keyword: field for keyword, field in own.items() if keyword not in fields}
    return fields


def constructors(cls: type) -> Iterator[type]:
    """The classes whose constructors get keywords of `cls`: while one passes them on, the next."""
    for owner in cls.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        yield owner
        parameters = inspect.signature(owner.__init__).parameters.values()
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break


def _own_fields(cls: type, given: Collection[str]) -> dict[str, Field]:
    """Those that are written out in the constructor of `cls`."""
    hints = typing.get_type_hints(cls.__init__)
    fields = {}
    for keyword, parameter in inspect.signature(cls.__init__).parameters.items():
        if keyword == "self" or keyword in given:
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        where = f"{cls.__name__}.__init__({keyword})"
        if (
            parameter.kind is not inspect.Parameter.KEYWORD_ONLY
            or parameter.default is inspect.Parameter.empty
        ):
            raise TypeError(f"{where}: config keys come from keyword-only arguments with a default")
        default = (
            list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        )
        hint = hints.get(keyword)
        fields[keyword] = Field(default, _accepted_types(hint, where), _element_types(hint, where))
    return fields


def _accepted_types(hint: Any, where: str) -> tuple[type, ...]:
    """Annotation -> types a config value may have: sequences become list, unions are split."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(t for part in typing.get_args(hint) for t in _accepted_types(part, where))
    origin = typing.get_origin(hint) or hint
    if origin in (tuple, list, Sequence):
        return (list,)
    if origin in (bool, int, float, str, type(None)):
        return (origin,)
    raise TypeError(
        f"{where}: annotation {hint!r} is no plain config type "
        "(bool, int, float, str, a sequence of them, or None)"
    )


def _element_types(hint: Any, where: str) -> tuple[type, ...]:
    """Annotation -> types of the elements of its sequences; empty if it has none."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(t for part in parts for t in _element_types(part, where))
    if typing.get_origin(hint) in (tuple, list, Sequence):
        return tuple(t for part in parts if part is not ... for t in _accepted_types(part, where))
    return ()
