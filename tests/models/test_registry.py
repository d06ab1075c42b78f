"""The constructor's signature is the schema of its config node."""

from collections.abc import Sequence

import pytest

from config import load_config
from models import create_model, list_models, registry, variant_file
from models.backbone import Backbone
from models.heads.registry import register_head
from models.mixers import register_mixer
from models.registry import Field, signature_fields


class Example:
    def __init__(
        self,
        *,
        img_size: int = 224,
        num_classes: int = 1000,
        dim: int = 8,
        ratio: float = 2.0,
        depths: Sequence[int] = (1, 2),
        scale: float | None = None,
        mixer: str = "plain",
    ):
        pass


def test_keywords_become_fields_with_default_and_types():
    assert signature_fields(Example) == {
        "dim": Field(8, (int,)),
        "ratio": Field(2.0, (float,)),
        "depths": Field([1, 2], (list,), (int,)),
        "scale": Field(None, (float, type(None))),
        "mixer": Field("plain", (str,)),
    }


def test_a_keyword_without_default_or_plain_type_is_refused():
    class Positional:
        def __init__(self, dim: int):
            pass

    class Callback:
        def __init__(self, *, norm: type = int):
            pass

    with pytest.raises(TypeError, match="keyword-only arguments with a default"):
        signature_fields(Positional)
    with pytest.raises(TypeError, match="no plain config type"):
        signature_fields(Callback)


def test_star_keywords_are_those_of_the_base_with_defaults_of_ones_own():
    class Base:
        def __init__(self, *, dim: int = 8, ratio: float = 2.0):
            pass

    class Both(Base):
        def __init__(self, *, depth: int = 1, dim: int = 16, **base: float):
            pass

    class OwnOnly(Both):
        def __init__(self, *, depth: int = 2):
            pass

    assert signature_fields(Both) == {
        "depth": Field(1, (int,)),
        "dim": Field(16, (int,)),
        "ratio": Field(2.0, (float,)),
    }
    assert signature_fields(OwnOnly) == {"depth": Field(2, (int,))}


class Complete(Backbone):
    def __init__(
        self,
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()


def test_mistakes_in_a_registration_are_told():
    with pytest.raises(TypeError, match=r'write @register\("a_name"\)'):
        registry.register(Complete)
    with pytest.raises(TypeError, match=r'write @register_mixer\("a_name"\)'):
        register_mixer(Complete)
    with pytest.raises(TypeError, match=r'write @register_head\("a_name"\)'):
        register_head(Complete, task="detection")
    with pytest.raises(TypeError, match=r"Example must derive from models\.Backbone"):
        registry.register("example")(Example)

    class Incomplete(Backbone):
        def __init__(self, *, num_classes: int = 10, dim: int = 8):
            super().__init__()

    with pytest.raises(TypeError, match=r"Incomplete.__init__ lacks \['in_chans', 'img_size'"):
        registry.register("incomplete")(Incomplete)


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", {})
    registry.register("Example")(Complete)
    assert registry.find("EXAMPLE").node == "EXAMPLE"

    class Other(Complete):
        pass

    with pytest.raises(ValueError, match="registered twice"):
        registry.register("example")(Other)
    copied = type("Complete", (Complete,), {"__module__": "models.copied"})
    copied.__qualname__ = Complete.__qualname__
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("example")(copied)
    copied.__module__ = Complete.__module__  # loaded again, as in a notebook
    registry.register("example")(copied)


def test_an_unknown_architecture_names_the_nearest_one():
    with pytest.raises(ValueError, match=r"did you mean one of .*dhvt"):
        registry.find("dhtv")


def test_every_registered_architecture_has_a_variant():
    types = {load_config(variant_file(name)).MODEL.TYPE.lower() for name in list_models()}
    assert types == {entry.name for entry in registry.entries()}


def test_an_unknown_variant_names_the_nearest_one():
    with pytest.raises(ValueError, match=r"did you mean one of .*dhvt_tiny_cifar_patch4"):
        create_model("dhvt_tiny_cifar_patch5")


def test_an_unknown_keyword_names_the_nearest_ones():
    with pytest.raises(ValueError, match=r"no argument \['emb_dim'\]; did you mean .*'embed_dim'"):
        create_model("dhvt_tiny_cifar_patch4", emb_dim=8)


@pytest.mark.parametrize(
    ("variant", "node"),
    [
        ("dhvt_tiny_cifar_patch4", "DHVT"),
        ("pvt_tiny_256", "PVT"),
        ("dilateformer_tiny", "DILATEFORMER"),
    ],
)
def test_what_a_layer_refuses_is_said_of_the_config_node(variant, node):
    heads = 5 if node == "DHVT" else [5, 5, 5, 5]
    with pytest.raises(ValueError, match=rf"^MODEL\.{node}: .*num_heads"):
        create_model(variant, num_heads=heads)
