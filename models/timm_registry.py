"""The variants in timm's registry: `import models; timm.create_model("dilateformer_tiny", num_classes=10)`.

Every variant is there as `mixlab_<name>`, and under its own name unless timm has a model of that name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timm.models import is_model, register_model
from torch import nn

from .layers.tokens import to_pair
from .pretrained import load_pretrained

PREFIX = "mixlab_"


def register_in_timm(
    names: Iterable[str], load: Callable[[str], Any], build: Callable[..., nn.Module]
) -> None:
    """Add variants to timm's registry; what is there already stays, and nothing is built.

    Args:
        load: variant name -> its config, called when the model is asked for.
        build: config, constructor keywords -> model.
    """
    for name in names:
        for alias in (name, PREFIX + name):
            if not is_model(alias):
                register_model(_entry_point(name, alias, load, build))


def _entry_point(
    name: str, alias: str, load: Callable[[str], Any], build: Callable[..., nn.Module]
) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        cache_dir: str | None = None,
        **keywords: Any,
    ) -> nn.Module:
        if pretrained_cfg:
            raise ValueError(
                f"timm.create_model('{alias}'): there is no pretrained configuration {pretrained_cfg!r}; "
                "name a file by pretrained_cfg_overlay=dict(file=...)"
            )
        if keywords.pop("features_only", False):
            raise ValueError(
                f"timm.create_model('{alias}', features_only=True) is not offered; "
                "call forward_pyramid of the model, whose maps feature_info describes"
            )
        return build_timm_model(
            load(name), build, name, pretrained, dict(pretrained_cfg_overlay or {}), keywords
        )

    create.__name__ = create.__qualname__ = alias
    create.__doc__ = f"Variant '{name}' of MixLab; keywords are those of its constructor."
    return create


def build_timm_model(
    config: Any,
    build: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    overlay: dict[str, Any],
    keywords: dict[str, Any],
) -> nn.Module:
    """The model of `config`, with the attribute `pretrained_cfg` that timm's programs read.

    Raises:
        ValueError: weights are wanted and none are named, or a keyword is not the constructor's.
    """
    if pretrained and "file" not in overlay:
        raise ValueError(
            f"'{name}': MixLab hosts no weights; leave pretrained=True out, or name a checkpoint by "
            "pretrained_cfg_overlay=dict(file='...')"
        )
    model = build(config, **keywords)
    if pretrained:
        load_pretrained(model, overlay["file"])
    in_chans = keywords.get("in_chans", config.MODEL.IN_CHANS)
    size = to_pair(keywords.get("img_size", config.DATA.IMG_SIZE))
    model.pretrained_cfg = {
        "architecture": name,
        "num_classes": model.num_classes,
        "input_size": (in_chans, *size),
        "mean": tuple(config.DATA.MEAN),
        "std": tuple(config.DATA.STD),
        "interpolation": config.DATA.INTERPOLATION,
        "crop_pct": config.TEST.CROP_RATIO if config.TEST.CROP else 1.0,
        "crop_mode": config.TEST.CROP_MODE if config.TEST.CROP else "squash",
        **overlay,
    }
    return model
