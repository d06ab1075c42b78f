"""Linear layers by another library: the numbers of `F.linear`, and only where it suits."""

import pytest
import torch
import torch.nn.functional as F
from torch import func, nn
from torch.utils.flop_counter import FlopCounterMode

from models.layers import linear as module
from models.layers.linear import Linear
from models.layers.packed import PackedWeight
from tests.models.layers.kernels.tools import assert_sound


@pytest.fixture
def onednn(monkeypatch):
    """The processor that prefers oneDNN, with two threads; returns whether the last call went there."""
    calls = []
    monkeypatch.setattr(module, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def conv2d(*args):
        calls.append("onednn")
        return convolve(*args)

    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", conv2d)
    return calls


def strided(x):
    """The same values with the channels apart in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.clone, strided])
@pytest.mark.parametrize("shape", [(64, 24), (2, 9, 7, 24), (6, 10, 9, 24)])
def test_a_convolution_gives_the_values_and_gradients_of_f_linear(shape, layout, bias, onednn):
    layer = Linear(24, 40, bias=bias)
    inputs = [layout(torch.randn(shape)).requires_grad_(), *layer.parameters()]
    out = layer(inputs[0])
    assert onednn == ["onednn"]
    expected = F.linear(*inputs)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()
    direction = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
    )


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(24),
        torch.ones(63, 24),
        torch.ones(0, 24),
        torch.ones(100, 24, dtype=torch.float64),
        torch.ones(100, 24, device="meta"),
    ],
    ids=["vector", "few rows", "nothing", "double", "meta"],
)
def test_other_inputs_go_to_f_linear(x, onednn):
    layer = Linear(24, 40).to(x)
    assert layer(x).shape == (*x.shape[:-1], 40)
    assert not onednn


def test_autocast_goes_to_f_linear(onednn):
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(24, 40)(torch.ones(100, 24)).dtype == torch.bfloat16
    assert not onednn


def test_an_exported_program_has_a_linear_layer(onednn):
    program = torch.export.export(Linear(24, 40), (torch.ones(100, 24),))
    assert "linear" in program.graph_module.code
    assert not onednn


@pytest.mark.parametrize("rows", [100, 600])
def test_gradients_have_gradients(rows, onednn):
    layer, x = Linear(24, 40), torch.randn(rows, 24, requires_grad=True)
    inputs, found = (x, *layer.parameters()), []
    for y in (layer(x), F.linear(*inputs)):
        grads = torch.autograd.grad(y.square().mean(), inputs, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        found.append(torch.autograd.grad(penalty, inputs))
    torch.testing.assert_close(*found)
    assert onednn


def gradient_of_each(layer, x):
    def loss(parameters, x):
        return func.functional_call(layer, parameters, (x,)).square().sum()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    return func.vmap(func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([x, 2 * x]))


def along_everything(layer, x):
    inputs = (x, layer.weight.detach(), layer.bias.detach())
    names = ("weight", "bias")

    def forward(x, *parameters):
        return func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    return func.jvp(forward, inputs, tuple(map(torch.cos, inputs)))


def hessian_of_a_bias(layer, x):
    def loss(bias):
        parameters = {"weight": layer.weight, "bias": bias}
        return func.functional_call(layer, parameters, (x,)).sin().sum()

    return func.hessian(loss)(layer.bias.detach())


def batched_gradients(layer, x):
    y = layer(x)
    directions = torch.stack([y.detach().cos(), y.detach().sin()])
    return torch.autograd.grad(y, layer.weight, directions, is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func's own
@pytest.mark.parametrize("rows", [100, 600])
@pytest.mark.parametrize(
    "transform", [gradient_of_each, along_everything, hessian_of_a_bias, batched_gradients]
)
def test_transforms_of_functions_go_through(transform, rows, onednn):
    layer, plain, x = Linear(24, 40), nn.Linear(24, 40), torch.randn(rows, 24)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(transform(layer, x), transform(plain, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [100, 600])
def test_frozen_parts_get_no_gradient(rows, onednn):
    layer, x = Linear(24, 40), torch.randn(rows, 24, requires_grad=True)
    for frozen in (layer.weight, layer.bias, x):
        frozen.requires_grad_(False)
        wanted = [t for t in (x, *layer.parameters()) if t is not frozen]
        got = torch.autograd.grad(layer(x).square().sum(), wanted)
        expected = F.linear(x, layer.weight, layer.bias).square().sum()
        torch.testing.assert_close(got, torch.autograd.grad(expected, wanted))
        frozen.requires_grad_()
    assert onednn


@pytest.mark.parametrize("images", [4, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_takes_the_same_library(bias, images, onednn):
    torch.compiler.reset()
    layer, x = Linear(24, 40, bias=bias), torch.randn(images, 25, 24, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = [x, *layer.parameters()]
    out, expected = compiled(x), F.linear(*inputs)
    assert onednn
    direction = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
    )
    torch.compiler.reset()


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_of_compiled_layers_keeps_the_rules_of_operators(bias):
    inputs = [torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6) if bias else None]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]
    assert_sound(torch.ops.mixlab.linear.default, tuple(inputs))


def test_gradients_of_strided_inputs_have_the_layout_that_compilers_expect():
    inputs = (torch.randn(100, 40), strided(torch.randn(100, 24)), torch.randn(40, 24))
    operator = torch.ops.mixlab.linear_backward.default
    torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


def test_flops_of_a_compiled_layer_are_counted():
    with FlopCounterMode(display=False) as counter:
        torch.ops.mixlab.linear(torch.randn(2, 5, 8), torch.randn(6, 8), None)
    assert counter.get_total_flops() == 2 * 10 * 8 * 6


def test_flops_of_a_compiled_packed_layer_are_counted():
    weight = torch.randn(6, 8)
    packed = PackedWeight(weight)
    with FlopCounterMode(display=False) as counter:
        torch.ops.mixlab.packed_linear(torch.randn(2, 5, 8), weight, None, "none", packed.number)
    assert counter.get_total_flops() == 2 * 10 * 8 * 6


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (dict(cpu_name="AMD EPYC", avx512_f=True), True),
        (dict(cpu_name="AMD EPYC", avx512_f=False), False),
        (dict(cpu_name="Intel(R) Xeon(R) Processor", avx512_f=True), False),
        (dict(architecture="aarch64"), False),
    ],
)
def test_onednn_is_for_processors_whose_wide_instructions_mkl_leaves_idle(
    cpu, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert module._prefers_onednn.__wrapped__() is expected
