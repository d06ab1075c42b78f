"""Deployed copies: the same numbers as the model, by folded norms and packed weights."""

import copy
import pickle

import pytest
import torch
from torch import nn

from models import create_model, deployment
from models.deployment import deploy, pack_weights
from models.layers.activations import GELU, SiLU
from models.layers.linear import Linear, PointwiseConv2d
from models.layers.packed import PackedWeight, can_pack
from tests.golden_tools import fill_module_, relative_error
from tests.small_models import SMALL

pytestmark = pytest.mark.skipif(
    not can_pack(torch.empty(1, 1)), reason="this PyTorch has no oneDNN operators"
)


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """A processor that multiplies by oneDNN, whatever runs the tests."""
    monkeypatch.setattr(deployment, "multiplies_by_onednn", lambda: True)


@pytest.fixture
def products(monkeypatch):
    """Activations of the packed products that were made."""
    made, compute = [], PackedWeight.compute

    def noted(self, x, bias, name):
        made.append(name)
        return compute(self, x, bias, name)

    monkeypatch.setattr(PackedWeight, "compute", noted)
    return made


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_a_deployed_model_computes_the_same_by_packed_weights(family, products):
    name, overrides = SMALL[family]
    model = fill_module_(create_model(name, num_classes=10, **overrides)).eval()
    images = torch.randn(3, 3, overrides["img_size"], overrides["img_size"])
    expected = model(images)
    assert not products
    copied = deploy(model)
    assert relative_error(copied(images), expected) < 1e-5
    assert products
    assert type(model) is type(copied)
    assert not any(isinstance(m, PointwiseConv2d) for m in model.modules())
    size = 2 * overrides["img_size"]  # the layout serves any number of rows
    larger = torch.randn(1, 3, size, size)
    assert relative_error(copied(larger), model(larger)) < 1e-5


@torch.no_grad()
def test_other_processors_fold_only(monkeypatch, products):
    monkeypatch.setattr(deployment, "multiplies_by_onednn", lambda: False)
    deploy(create_model("dhvt_tiny_cifar_patch4", num_classes=10))(torch.randn(1, 3, 32, 32))
    assert not products


@pytest.mark.parametrize("act", [GELU(), SiLU()])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_an_activation_is_part_of_the_product(act, bias, products):
    layer, x = Linear(24, 40, bias=bias), 3 * torch.randn(2, 5, 24)
    expected = act(layer(x))
    pack_weights(layer)
    torch.testing.assert_close(layer.activated(x, act), expected, rtol=1e-5, atol=2e-6)
    assert products == ["gelu" if isinstance(act, nn.GELU) else "swish"]
    other = nn.Tanh()
    torch.testing.assert_close(layer.activated(x, other), other(layer(x)))


@torch.no_grad()
def test_pointwise_convolutions_of_both_layouts(products):
    conv, x = nn.Conv2d(8, 12, 1), torch.randn(2, 8, 5, 3)
    expected = conv(x)
    pack_weights(conv)
    torch.testing.assert_close(conv(x), expected)
    assert not products
    y = conv(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert products
    others = nn.ModuleList([nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1, stride=2)])
    pack_weights(others)
    assert {type(module) for module in others} == {nn.Conv2d}


def written(layer):
    layer.weight.mul_(2)


def loaded(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def replaced(layer):
    layer.weight = nn.Parameter(2 * layer.weight)


def widened(layer):
    layer.double()


@pytest.mark.parametrize("change", [written, loaded, replaced, widened])
@torch.no_grad()
def test_changed_weights_are_not_multiplied_by_as_they_were(change, products):
    layer = Linear(24, 40)
    pack_weights(layer)
    change(layer)
    x = torch.randn(5, 24, dtype=layer.weight.dtype)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not products
    pack_weights(layer)
    layer(x)
    assert products == ([] if change is widened else ["none"])


def test_gradients_and_autocast_take_the_plain_weight(products):
    layer, x = Linear(24, 40), torch.randn(70, 24)
    pack_weights(layer)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not products


@torch.no_grad()
def test_inputs_of_another_width_get_pytorchs_error(products):
    layer = Linear(24, 40)
    pack_weights(layer)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(5, 23))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies_of_a_deployed_model_have_plain_weights(way, products):
    model = deploy(create_model("dhvt_tiny_cifar_patch4", num_classes=10))
    images = torch.randn(1, 3, 32, 32)
    expected = model(images)
    products.clear()
    twin = way(model)
    assert relative_error(twin(images), expected) < 1e-5
    assert not products
    deploy(twin)(images)
    assert products


@torch.no_grad()
def test_a_deployed_model_compiles_with_its_packed_weights(products):
    torch.compiler.reset()
    model = deploy(create_model("dhvt_tiny_cifar_patch4", num_classes=10))
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (2, 3, 5):
        images = torch.randn(batch, 3, 32, 32)
        expected = model(images)
        eager = list(products)
        products.clear()
        assert relative_error(run(images), expected) < 1e-5
        assert products == eager
        products.clear()
    model.head.weight.add_(1)
    expected = model(images)
    products.clear()
    assert relative_error(run(images), expected) < 1e-5
    assert len(products) == len(eager) - 1
    torch.compiler.reset()


def test_the_operator_of_compiled_copies_keeps_the_rules_of_operators():
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(2, 5, 8)
    packed = PackedWeight(weight)
    for act in ("gelu", "swish", "none"):
        inputs = (x, weight, bias, act, packed.number)
        torch.library.opcheck(torch.ops.mixlab.packed_linear.default, inputs)


def test_weights_that_their_parent_multiplies_by_are_packed_once():
    model = deploy(create_model("swin_tiny_patch4_window7_224", depths=[1, 1, 1, 1]))
    attn = model.layers[0].blocks[0].attn
    assert attn.packed_qkv is not None
    assert attn.qkv.packed is None
    assert attn.proj.packed is not None
