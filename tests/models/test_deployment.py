"""Deployed copies: the same numbers as the model, by folded norms and packed weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from models import create_model, deployment
from models.deployment import deploy, pack_weights
from models.layers.activations import GELU, SiLU
from models.layers.linear import Linear, PointwiseConv2d, activated
from models.layers.packed import PackedWeight, can_pack
from tests.golden_tools import fill_module_, relative_error
from tests.small_models import SMALL

pytestmark = pytest.mark.skipif(
    not can_pack(nn.Parameter(torch.empty(1, 1))), reason="this PyTorch has no oneDNN operators"
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


def packed(layer):
    """`layer`, its weights laid out."""
    pack_weights(layer.requires_grad_(False))
    return layer


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
    packed(layer)
    torch.testing.assert_close(activated(layer, act, x), expected, rtol=1e-5, atol=2e-6)
    assert products == ["gelu" if isinstance(act, nn.GELU) else "swish"]
    other = nn.Tanh()
    torch.testing.assert_close(activated(layer, other, x), other(layer(x)))


@torch.no_grad()
def test_pointwise_convolutions_of_both_layouts(products):
    conv, x = nn.Conv2d(8, 12, 1), torch.randn(2, 8, 5, 3)
    expected = conv(x)
    packed(conv)
    torch.testing.assert_close(conv(x), expected)
    assert not products
    y = conv(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert products
    others = [
        dict(groups=2),
        dict(stride=2),
        dict(padding=1),
        dict(kernel_size=3),
        dict(dilation=2),
    ]
    others = nn.ModuleList([nn.Conv2d(8, 8, **(dict(kernel_size=1) | other)) for other in others])
    packed(others)
    assert [type(module) for module in others[:4]] == [nn.Conv2d] * 4
    assert type(others[4]) is PointwiseConv2d  # which dilation says nothing about


def written(layer):
    layer.weight.mul_(2)


def loaded(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def replaced(layer):
    layer.weight = nn.Parameter(2 * layer.weight, requires_grad=False)


def assigned(layer):
    state = {name: 2 * value for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def assigned_in_inference_mode(layer):
    with torch.inference_mode():
        assigned(layer)


def rounded(layer):
    layer.bfloat16().float()


def widened(layer):
    layer.double()


CHANGES = [written, loaded, replaced, assigned, assigned_in_inference_mode, rounded, widened]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_weights_are_not_multiplied_by_as_they_were(change, products):
    # A copied parameter is at version 0, as a new one is. New ones often get the memory of those that
    # they replace.
    layer = packed(copy.deepcopy(Linear(192, 192)))
    for _ in range(5):
        change(layer)
        x = torch.randn(5, 192, dtype=layer.weight.dtype)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert not products
    if not layer.weight.is_inference():
        packed(layer)(x)
        assert products == ([] if change is widened else ["none"])


@torch.no_grad()
def test_a_second_layout_takes_the_place_of_the_first(products):
    layer, x = packed(Linear(24, 40)), torch.randn(5, 24)
    layer.weight.mul_(2)
    packed(layer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert products


def test_gradients_and_autocast_take_the_plain_weight(products):
    layer, x = packed(Linear(24, 40)).requires_grad_(True), torch.randn(70, 24)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not products


@pytest.mark.parametrize("fused", [True, False])
def test_a_training_step_shows(fused, products):
    """A fused optimizer writes without raising the version of a parameter."""
    layer, x = packed(Linear(24, 40)).requires_grad_(True), torch.randn(70, 24)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    layer(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_deployed_copies_are_not_for_training():
    model = create_model("dhvt_tiny_cifar_patch4", num_classes=10)
    assert not [p for p in deploy(model).parameters() if p.requires_grad]
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_weights_that_hooks_or_parametrizations_make_are_not_packed(products):
    pruned = Linear(24, 40)
    prune.l1_unstructured(pruned, "weight", 0.5)
    normed = parametrizations.weight_norm(Linear(24, 40))
    swin = create_model("swin_tiny_patch4_window7_224", depths=[1, 1, 1, 1], num_classes=10).eval()
    attn = swin.layers[0].blocks[0].attn
    parametrizations.weight_norm(attn.qkv)
    for layer in (pruned, normed):
        packed(layer)(torch.randn(5, 24))
    assert not products
    images, copied = torch.randn(1, 3, 224, 224), deploy(swin)
    with torch.inference_mode():
        torch.testing.assert_close(copied(images), swin(images))
    assert products  # of its other layers


@torch.no_grad()
def test_hooks_see_a_layer_and_its_activation(products):
    layer, act, x = packed(Linear(24, 40)), GELU(), torch.randn(5, 24)
    layer.register_forward_hook(lambda module, inputs, output: output * 0 + 1)
    torch.testing.assert_close(
        activated(layer, act, x), torch.full((5, 40), F.gelu(torch.ones(())).item())
    )
    act.register_forward_hook(lambda module, inputs, output: output * 0)
    assert activated(packed(Linear(24, 40)), act, x).count_nonzero() == 0
    assert set(products) == {"none"}
    prune.l1_unstructured(layer, "weight", 0.5)
    layer.weight_orig.zero_()
    layer._forward_hooks.clear()
    torch.testing.assert_close(activated(layer, nn.Identity(), x), layer.bias.expand(5, 40))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@torch.no_grad()
def test_transforms_of_functions_take_the_plain_weight():
    plain, x = Linear(24, 40).requires_grad_(False), torch.randn(5, 24)
    layer = packed(copy.deepcopy(plain))
    for primals in (x, x[0]):
        _, expected = torch.func.jvp(plain, (primals,), (torch.ones_like(primals),))
        _, found = torch.func.jvp(layer, (primals,), (torch.ones_like(primals),))
        torch.testing.assert_close(found, expected)

    def by(module):
        return lambda weight: torch.func.functional_call(module, {"weight": weight}, (x,))

    along = torch.randn_like(plain.weight)
    weights = (layer.weight,), (along,)
    found, expected = (torch.func.jvp(by(module), *weights)[1] for module in (layer, plain))
    torch.testing.assert_close(found, expected)
    several = torch.randn(3, 40, 24)
    found, expected = (torch.vmap(by(module))(several) for module in (layer, plain))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.vmap(layer)(x), plain(x))


@pytest.mark.parametrize("bias", [torch.randn(80)[::2], torch.randn(1).expand(40)])
@torch.no_grad()
def test_strides_of_a_bias(bias, products):
    layer, x = packed(Linear(24, 40)), torch.randn(5, 24)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, bias.contiguous()))
    assert products


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@torch.no_grad()
def test_layers_without_width_stay_as_they_are():
    for widths in ((8, 0), (0, 8)):
        layer = nn.Linear(*widths)
        x = torch.randn(5, widths[0])
        torch.testing.assert_close(packed(layer)(x), F.linear(x, layer.weight, layer.bias))


@torch.no_grad()
def test_packed_products_are_counted(products):
    layer = packed(Linear(24, 40))
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 5, 24))
    assert products
    assert counter.get_total_flops() == 2 * 10 * 24 * 40


@torch.no_grad()
def test_inputs_of_another_width_get_pytorchs_error(products):
    layer = packed(Linear(24, 40))
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


@torch.no_grad()
def test_compiled_copies_notice_changed_weights(products):
    """In each place where the operator has a weight arranged, or an activation."""
    torch.compiler.reset()
    name, overrides = SMALL["swin"]
    model = deploy(fill_module_(create_model(name, num_classes=10, **overrides)))
    images = torch.randn(2, 3, overrides["img_size"], overrides["img_size"])
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(images)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    products.clear()
    expected = copy.deepcopy(model)(images)
    assert relative_error(run(images), expected) < 1e-5
    assert not products
    torch.compiler.reset()


@torch.no_grad()
def test_equal_blocks_share_compiled_code():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    blocks = nn.ModuleList([packed(Linear(24, 24)) for _ in range(12)])
    for block in blocks:
        block.compile(backend=backend)
        block(torch.randn(5, 24))
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@torch.no_grad()
def test_exports_hold_plain_weights(products):
    model = deploy(create_model("dhvt_tiny_cifar_patch4", num_classes=10))
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    products.clear()
    exported = torch.export.export(model, (images,), strict=False)
    traced = torch.jit.trace(model, images, check_trace=False)
    assert "mkldnn" not in str(exported.graph)
    assert not products
    for way in (exported.module(), traced):
        assert relative_error(way(images), expected) < 1e-5


def test_the_operator_of_compiled_copies_keeps_the_rules_of_operators():
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(2, 5, 8)
    layout = PackedWeight(weight)
    for act in ("gelu", "swish", "none"):
        inputs = (x, weight, bias, act, layout.number)
        torch.library.opcheck(torch.ops.mixlab.packed_linear.default, inputs)


def test_weights_that_their_parent_multiplies_by_are_packed_once():
    model = deploy(create_model("swin_tiny_patch4_window7_224", depths=[1, 1, 1, 1]))
    attn = model.layers[0].blocks[0].attn
    assert attn.packed_qkv is not None
    assert attn.qkv.packed is None
    assert attn.proj.packed is not None
