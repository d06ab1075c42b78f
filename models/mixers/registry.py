"""The interface of a token mixer, and the names they go by in MODEL.METAFORMER.MIXERS.

A mixer is a module that maps (B, H, W, C) to (B, H, W, C) for any H and W. Its constructor takes the width
and keywords. Those that `MixerContext` names are filled in by the frame; the others are options, plain data
with a default, that a YAML file sets as in `"dynamic_filter(num_filters=2)"`. Their types are checked against
the annotations (`options`), their ranges by the constructor, whose ValueError is passed on with the spec. A
mixer may have

- `init_()`: its own start, called after the frame has initialised all Linear and convolutions;
- `token_map() -> Tensor | None`: what explanation tools draw of the last evaluation forward, kept by itself
  until the next `train()` or `eval()`, and not on copies;
- `attention_maps(x) -> dict[str, Tensor]`: kind -> what it attends to with such an input, kept by the frame;
- `aux_losses() -> dict[str, Tensor]`: weighted losses of the last training forward, by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from utils.names import check_decorator, origin
from utils.spelling import nearest

from .options import check_types, keywords_of, parse_spec

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])

# Block applied to rows (..., C): its norm, then what is given as the mixer, then its feed-forward network.
Update = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

# Keywords that only the frame sets.
FRAME_KEYWORDS = ("act", "drop", "grid", "index", "stage")
# Options of the mixers that can ask other queries than all tokens.
QUERY_OPTIONS = ("keep_rate", "grained", "splits", "budget", "budget_weight")

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
    check_decorator(name, "register_mixer")

    def decorate(factory: Factory) -> Factory:
        if not name.isidentifier():
            raise ValueError(f"mixer name '{name}' is no identifier, so no YAML file could name it")
        if name in _FACTORIES and origin(_FACTORIES[name]) != origin(factory):
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
        ValueError: the spec cannot be read, names an unknown mixer or option, or gives an option a value
            that the mixer does not take.
    """
    name, options = parse_spec(spec)
    if name not in _FACTORIES:
        raise ValueError(
            f"MODEL.METAFORMER.MIXERS: no mixer is named '{name}'; did you mean one of "
            f"{nearest(name, _FACTORIES)}? All: {list_mixers()}"
        )
    parameters = keywords_of(_FACTORIES[name])
    given = {key: value for key, value in vars(context).items() if key in parameters}
    try:
        _check_options(name, options, parameters)
        return _FACTORIES[name](dim, **(given | options))
    except ValueError as error:
        derived = str(error).startswith("num_heads=") and "num_heads" not in options
        hint = "; num_heads follows from MODEL.METAFORMER.HEAD_DIM" if derived else ""
        raise ValueError(f"MODEL.METAFORMER.MIXERS: '{spec}': {error}{hint}") from error


def _check_options(name: str, options: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """ValueError for options that mixer `name` does not have, and for values of another type."""
    unknown = [option for option in options if option not in parameters]
    if unknown and set(unknown) <= set(QUERY_OPTIONS):
        takers = [mixer for mixer in list_mixers() if unknown[0] in keywords_of(_FACTORIES[mixer])]
        raise ValueError(
            f"{unknown[0]} needs global keys for each query, so that a query need not be one of the tokens; "
            f"mixer '{name}' has none. Mixers that take it: {takers}"
        )
    if unknown:
        takes = sorted(set(parameters) - set(FRAME_KEYWORDS))
        raise ValueError(f"mixer '{name}' has no option {unknown}; it takes {takes}")
    fixed = sorted(set(FRAME_KEYWORDS) & set(options))
    if fixed:
        raise ValueError(
            f"{fixed} follow from the frame, not from the mixer: set MODEL.METAFORMER.ACT, DATA.IMG_SIZE or "
            "MODEL.DROP_RATE"
        )
    check_types(options, parameters)
