"""All architectures behind `build_model(config)` and `create_model(name)`.

Importing this package imports every module in it, so a new architecture is one file here and its
YAML files under `configs/`; nothing has to list it. No architectures are `backbone` (the contract),
`registry` (the schema), `pretrained` (loading weights), `timm_registry`, `folding` and `deployment` (copies
for inference); `heads/` makes detectors and segmenters of them.
"""

import importlib
import logging
import pkgutil
from collections.abc import Mapping
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from utils.spelling import nearest

from . import registry
from .backbone import Backbone
from .heads import DenseModel, find_head
from .heads.dense import pyramid_of
from .layers.eager import plain_operators
from .timm_registry import register_in_timm

__all__ = [
    "Backbone",
    "build_model",
    "create_model",
    "list_models",
    "plain_operators",
    "variant_file",
]

_LOG = logging.getLogger(__name__)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")


def build_model(config: Any, **overrides: Any) -> Backbone:
    """The network that a config describes, with fresh weights: a classifier, or a backbone with a head.

    Args:
        config: a frozen CfgNode of `load_config`.
        overrides: constructor keywords of the architecture that replace config values, such as `num_classes`.

    Raises:
        ValueError: MODEL.TYPE or MODEL.HEAD.TYPE is unknown, a keyword is not one of its constructor's, or a
            value is refused: by the checks of its config key, or by a constructor.
    """
    if config.TASK == "classification":
        return _build_backbone(config, overrides)
    classes = overrides.pop("num_classes", config.MODEL.NUM_CLASSES)
    if not classes:
        raise ValueError(
            f"TASK='{config.TASK}' needs to know the number of classes: set MODEL.NUM_CLASSES, or "
            "DATA.DATA_PATH to the data"
        )
    entry = find_head(config.MODEL.HEAD.TYPE, config.TASK)
    backbone = _build_backbone(config, overrides | dict(num_classes=0))
    pyramid, features = pyramid_of(backbone)
    keywords = {name: _get(config, key) for name, key in entry.keys.items()}
    try:
        head = entry.cls(features, classes, **keywords)
    except ValueError as error:
        raise _named(error, f"MODEL.HEAD.{entry.node}") from error
    return DenseModel(backbone, pyramid, head, entry.task)


def _build_backbone(config: Any, overrides: Mapping[str, Any]) -> Backbone:
    from config import checked  # here, because config.py reads the schema from this package

    entry = registry.find(config.MODEL.TYPE)
    unknown = sorted(set(overrides) - set(entry.keys))
    if unknown:
        close = sorted({match for word in unknown for match in nearest(word, entry.keys)})
        raise ValueError(
            f"{entry.cls.__name__} has no argument {unknown}; did you mean one of {close}?"
        )
    keywords = {
        name: checked(key, overrides[name], f"the keyword {name}")
        if name in overrides
        else _get(config, key)
        for name, key in entry.keys.items()
    }
    if keywords["num_classes"] is None:
        keywords["num_classes"] = 1000
    try:
        return entry.cls(**keywords)
    except ValueError as error:
        raise _named(error, f"MODEL.{entry.node}") from error


def _get(config: Any, key: str) -> Any:
    return reduce(getitem, key.split("."), config)


def _named(error: ValueError, node: str) -> ValueError:
    """Layers speak of their own arguments; the user set a key."""
    return error if str(error).startswith("MODEL.") else ValueError(f"{node}: {error}")


def create_model(name: str | Path, **overrides: Any) -> Backbone:
    """The published variant `name`, or that of a YAML file (`.yaml`), constructor keywords overridden.

    Example:
        create_model("dhvt_tiny_cifar_patch4", num_classes=10)
    """
    return build_model(_load_variant(name), **overrides)


def list_models() -> list[str]:
    """Names of all published variants, sorted."""
    return sorted(_variants())


def variant_file(name: str) -> Path:
    """The YAML file of variant `name`; ValueError names the nearest ones."""
    if name not in _variants():
        close = nearest(name, _variants())
        raise ValueError(
            f"no model is named '{name}'; did you mean one of {close}? models.list_models() has all"
        )
    return _variants()[name]


def _load_variant(name: str | Path) -> Any:
    from config import load_config  # here, as in build_model

    name = str(name)
    return load_config(name if name.endswith((".yaml", ".yml")) else variant_file(name))


@cache
def _variants() -> dict[str, Path]:
    """A variant is a YAML file that declares its stem as MODEL.NAME; experiments inherit it."""
    found = {}
    for path in sorted(CONFIG_DIR.glob("[!_]*/*.yaml")):
        try:
            # The parser in C, where there is one: this runs at every start.
            content = yaml.load(
                path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            )
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            _LOG.warning("%s is no variant, it cannot be read as YAML: %s", path, error)
            continue
        model = content.get("MODEL") if isinstance(content, dict) else None
        if not isinstance(model, dict) or model.get("NAME") != path.stem:
            continue
        if path.stem in found:
            _LOG.warning(
                "%s is not used: %s has the name %s, too", path, found[path.stem], path.stem
            )
        else:
            found[path.stem] = path
    return found


register_in_timm(list_models(), _load_variant, build_model)
