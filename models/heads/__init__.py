"""Detectors and segmenters on the pyramid of any backbone; importing this package registers all heads."""

import importlib
import pkgutil

from .dense import DenseModel
from .registry import find_head, head_entries

__all__ = ["DenseModel", "find_head", "head_entries"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
