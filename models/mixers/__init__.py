"""Token mixers for the MetaFormer frame (`models/metaformer.py`), by name.

Importing this package imports every module in it, so a new mixer is one file here with `@register_mixer`
and one YAML file that names it.
"""

import importlib
import pkgutil

from .registry import MixerContext, QueryMixer, build_mixer, list_mixers, register_mixer

__all__ = ["MixerContext", "QueryMixer", "build_mixer", "list_mixers", "register_mixer"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
