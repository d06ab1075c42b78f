"""The interface of a token mixer, and the names they go by in MODEL.METAFORMER.MIXERS.

A mixer is a module that maps (B, H, W, C) to (B, H, W, C) for any H and W. Its constructor takes the width
and keywords. Those that `MixerContext` names are filled in by the frame; the others are options, plain data
with a default, that a YAML file sets as in `"dynamic_filter(num_filters=2)"`. A mixer may have

- `init_()`: its own start, called after the frame has initialised all Linear and convolutions;
- `token_map() -> Tensor | None`: what explanation tools draw of the last evaluation forward;
- `aux_losses() -> dict[str, Tensor]`: weighted losses of the last training forward, by name.
"""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from utils.spelling import nearest

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])

# Block applied to rows (..., C): its norm, then what is given as the mixer, then its feed-forward network.
Update = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

_FACTORIES: dict[str, Callable[..., nn.Module]] = {}


@dataclass(frozen=True)
class MixerContext:
    """What the frame knows about a block's place; a mixer's constructor names the fields that it wants.

    Attributes:
        num_heads: heads of the stage's width at the frame's head width, at least 1.
        grid: height and width of the stage's map at the configured image size.
        stage: number of the stage; its stride is 4 * 2**stage.
        index: number of the block in its stage, for mixers that alternate.
        act: activation inside the mixer.
        drop: dropout after the mixer's last projection.
    """

    num_heads: int = 1
    grid: tuple[int, int] = (14, 14)
    stage: int = 0
    index: int = 0
    act: type[nn.Module] = nn.GELU
    drop: float = 0.0


class QueryMixer(nn.Module):
    """A mixer that runs its whole block, feed-forward network included, for chosen rows only.

    The feed-forward network must be token-wise. The rows may be some of the tokens or made from them.
    """

    cost_depends_on_images = False  # as in `Backbone`

    def forward(self, x: Tensor, norm: Callable[[Tensor], Tensor], update: Update) -> Tensor:
        """Block input (B, H, W, C) -> block output (B, H, W, C).

        Args:
            norm: the first norm of the block, for keys and values.
            update: `update(rows, mix)` -> what the block makes of `rows` (..., C); `mix` gets them
                normalised and says what mixing adds to them.
        """
        raise NotImplementedError


def register_mixer(name: str) -> Callable[[Factory], Factory]:
    """Decorator for a class or function `(dim, *, ...) -> nn.Module`: make it known as mixer `name`.

    Raises:
        ValueError: the name is taken, or is no Python identifier.
    """

    def decorate(factory: Factory) -> Factory:
        if not name.isidentifier():
            raise ValueError(f"mixer name '{name}' is no identifier, so no YAML file could name it")
        if name in _FACTORIES and _FACTORIES[name].__qualname__ != factory.__qualname__:
            raise ValueError(
                f"mixer '{name}' is registered twice: {_FACTORIES[name]} and {factory}"
            )
        _FACTORIES[name] = factory
        return factory

    return decorate


def list_mixers() -> list[str]:
    """Names of all registered mixers, sorted."""
    return sorted(_FACTORIES)


def build_mixer(spec: str, dim: int, context: MixerContext) -> nn.Module:
    """The mixer that `spec` describes: `name` or `name(option=value, ...)`; options beat the context.

    Raises:
        ValueError: the spec cannot be read, or names an unknown mixer or option.
    """
    name, options = parse_spec(spec)
    if name not in _FACTORIES:
        raise ValueError(
            f"MODEL.METAFORMER.MIXERS: no mixer is named '{name}'; did you mean one of "
            f"{nearest(name, _FACTORIES)}? All: {list_mixers()}"
        )
    keywords = list(inspect.signature(_FACTORIES[name]).parameters)[1:]
    unknown = sorted(set(options) - set(keywords))
    if unknown:
        raise ValueError(
            f"MODEL.METAFORMER.MIXERS: '{spec}': mixer '{name}' has no option {unknown}; it takes {keywords}"
        )
    fixed = sorted({"act", "grid", "stage", "index", "drop"} & set(options))
    if fixed:
        raise ValueError(
            f"MODEL.METAFORMER.MIXERS: '{spec}': {fixed} follow from the frame, not from the mixer: set "
            "MODEL.METAFORMER.ACT, DATA.IMG_SIZE or MODEL.DROP_RATE"
        )
    given = {key: value for key, value in vars(context).items() if key in keywords}
    return _FACTORIES[name](dim, **(given | options))


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """`"dilated(dilations=[1, 2])"` -> ("dilated", {"dilations": [1, 2]}); values are Python literals."""
    match = re.fullmatch(r"\s*([^\W\d]\w*)\s*(\(.*\))?\s*", spec, re.DOTALL)
    try:
        # Under another name, because `global` is a word of Python's own.
        call = ast.parse(f"mixer{match[2] or '()'}", mode="eval").body if match else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return match[1], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        pass  # reported below, together with what parses but is no call
    raise ValueError(
        f"MODEL.METAFORMER.MIXERS: cannot read '{spec}'; write 'name' or 'name(option=value, ...)' "
        "with literal values"
    )
