"""All architectures behind `build_model(config)` and `create_model(name)`.

Importing this package imports every module in it, so a new architecture is one file here and its
YAML files under `configs/`; nothing has to list it. No architectures are `backbone` (the contract),
`registry` (the schema), `pretrained` (loading weights), `timm_registry` and `folding` (batch norms).
"""

import importlib
import logging
import pkgutil
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from utils.spelling import nearest

from . import registry
from .backbone import Backbone
from .timm_registry import register_in_timm

__all__ = ["Backbone", "build_model", "create_model", "list_models", "variant_file"]

_LOG = logging.getLogger(__name__)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")


def build_model(config: Any, **overrides: Any) -> Backbone:
    """The backbone that a config describes, with fresh weights.

    Args:
        config: a frozen CfgNode of `load_config`.
        overrides: constructor keywords that replace config values, such as `num_classes`.

    Raises:
        ValueError: MODEL.TYPE is unknown, a keyword is not one of its constructor's, or a value is
            refused: by the checks of its config key, or by the constructor.
    """
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
        else reduce(getitem, key.split("."), config)
        for name, key in entry.keys.items()
    }
    if keywords["num_classes"] is None:
        keywords["num_classes"] = 1000
    try:
        return entry.cls(**keywords)
    except ValueError as error:
        if str(error).startswith("MODEL."):
            raise
        # Layers speak of their own arguments; the user set a key.
        raise ValueError(f"MODEL.{entry.node}: {error}") from error


def create_model(name: str, **overrides: Any) -> Backbone:
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
        raise ValueError(f"no model is named '{name}'; did you mean one of {close}?")
    return _variants()[name]


def _load_variant(name: str) -> Any:
    from config import load_config  # here, as in build_model

    return load_config(name if name.endswith((".yaml", ".yml")) else variant_file(name))


@cache
def _variants() -> dict[str, Path]:
    """A variant is a YAML file that declares its stem as MODEL.NAME; experiments inherit it."""
    found = {}
    for path in sorted(CONFIG_DIR.glob("[!_]*/*.yaml")):
        try:
            # The parser in C, where there is one: this runs at every start.
            content = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            _LOG.warning("%s is no variant, it cannot be read as YAML: %s", path, error)
            continue
        model = (content or {}).get("MODEL") or {}
        if model.get("NAME") == path.stem:
            found[path.stem] = path
    return found


register_in_timm(list_models(), _load_variant, build_model)
