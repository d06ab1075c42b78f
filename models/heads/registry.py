"""Which heads exist for dense tasks, and the config schema that their constructors' signatures define.

`@register_head("retinanet", task="detection")` creates `MODEL.HEAD.RETINANET.FPN_CHANNELS` from the keyword
`fpn_channels: int = 256`, as `models/registry.py` does for backbones. A head is one file in this folder.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from models.registry import Field, signature_fields
from utils.names import check_decorator, origin
from utils.spelling import nearest

# What every head is given beside its own keywords: the maps it gets, and the number of classes.
GIVEN = ("features", "num_classes")

_HEADS: dict[str, "HeadEntry"] = {}


@dataclass(frozen=True)
class HeadEntry:
    """A registered head; `fields` maps lower-case keywords to their `Field`."""

    name: str
    task: str
    cls: type[nn.Module]
    fields: dict[str, Field]

    @property
    def needs_masks(self) -> bool:
        """Whether training takes the masks of objects; heads say so by a class attribute of this name."""
        return getattr(self.cls, "needs_masks", False)

    @property
    def node(self) -> str:
        """Name of the config node below MODEL.HEAD."""
        return self.name.upper()

    @property
    def keys(self) -> dict[str, str]:
        """Keyword of the constructor -> config key."""
        return {keyword: f"MODEL.HEAD.{self.node}.{keyword.upper()}" for keyword in self.fields}


def register_head(name: str, *, task: str) -> Callable[[type], type]:
    """Class decorator: make a head known as MODEL.HEAD.TYPE `name`, for TASK `task`.

    Raises:
        TypeError: a keyword that cannot become a config key.
        ValueError: the name is taken.
    """
    check_decorator(name, "register_head")

    def decorate(cls: type) -> type:
        if name in _HEADS and origin(_HEADS[name].cls) != origin(cls):
            raise ValueError(
                f"MODEL.HEAD.TYPE='{name}' is registered twice: {_HEADS[name].cls} and {cls}"
            )
        _HEADS[name] = HeadEntry(name, task, cls, signature_fields(cls, GIVEN))
        return cls

    return decorate


def find_head(name: str, task: str) -> HeadEntry:
    """The entry of MODEL.HEAD.TYPE `name`; ValueError unless there is one, and it is made for `task`."""
    fitting = [entry.name for entry in head_entries() if entry.task == task]
    entry = _HEADS.get(name)
    if entry is None or entry.task != task:
        close = nearest(name, fitting)[:1]
        hint = f"; did you mean {close[0]!r}?" if close and entry is None else ""
        raise ValueError(
            f"MODEL.HEAD.TYPE='{name}' is no head for TASK='{task}', must be one of {fitting}{hint}"
        )
    return entry


def head_entries() -> list[HeadEntry]:
    """All registered heads, by name."""
    return [_HEADS[name] for name in sorted(_HEADS)]
