"""Entry points of torch.hub, one per variant.

torch.hub.load("path/to/mixlab", "dilateformer_tiny", source="local", num_classes=10, weights="tiny.pth")
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from models import Backbone as _Backbone
from models import create_model as _create_model
from models import list_models as _list_models
from models.pretrained import load_pretrained as _load_pretrained

dependencies = ["numpy", "safetensors", "timm", "torch", "torchvision", "yacs", "yaml"]


def _entry_point(name: str) -> _Callable[..., _Backbone]:
    def create(weights: str = "", **keywords: _Any) -> _Backbone:
        model = _create_model(name, **keywords)
        if weights:
            _load_pretrained(model, weights)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""Variant '{name}'.

    Args:
        weights: file or http(s) URL of a checkpoint; empty keeps fresh weights.
        keywords: of the constructor, such as num_classes, in_chans, img_size and drop_path_rate.
    """
    return create


globals().update({name: _entry_point(name) for name in _list_models()})
