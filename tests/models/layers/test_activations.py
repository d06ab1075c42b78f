"""Squared activations in bfloat16: not widened by CUDA's autocast, and one map kept for the backward pass."""

import pytest
import torch
import torch.nn.functional as F

from models.layers.activations import SquaredReLU, StarReLU
from tests.operators import Operators

# What CUDA's autocast computes in float32 (ATen/autocast_mode.h), of operators that these could call.
WIDENED = {"pow", "prod", "exp", "cumsum", "norm", "linalg_vector_norm", "dist", "square"}


def make(cls):
    act = cls()
    for parameter, value in zip(act.parameters(), (1.3, -0.4), strict=False):
        torch.nn.init.constant_(parameter, value)
    return act


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("cls", [StarReLU, SquaredReLU])
def test_nothing_is_widened_in_bfloat16(cls, grad):
    act = make(cls)
    x = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    with torch.set_grad_enabled(grad), Operators() as operators:
        with torch.autocast("cpu", torch.bfloat16):
            out = act(x)
        if grad:
            out.backward(torch.ones_like(out))
    assert out.dtype == torch.bfloat16
    assert {dtype for _, shape, dtype in operators.results if shape == x.shape} == {torch.bfloat16}
    assert "relu" in operators.names
    assert not WIDENED & set(operators.names)


@pytest.mark.parametrize("cls", [StarReLU, SquaredReLU])
def test_bfloat16_has_the_values_and_gradients_of_double_precision(cls):
    act = make(cls)
    x = torch.randn(4096).bfloat16().requires_grad_()
    wide, exact = x.detach().double().requires_grad_(), make(cls).double()
    direction = torch.rand(4096).bfloat16()  # of one sign: rounding does not cancel in sums
    out, expected = act(x), exact(wide)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=1e-2)
    found = torch.autograd.grad(out, (x, *act.parameters()), direction)
    wanted = torch.autograd.grad(expected, (wide, *exact.parameters()), direction.double())
    for gradient, reference in zip(found, wanted, strict=True):
        assert (gradient.double() - reference).norm() < 1e-2 * reference.norm()


@pytest.mark.parametrize("cls", [StarReLU, SquaredReLU])
def test_one_map_is_kept_for_the_backward_pass(cls):
    act, kept = make(cls), {}
    x = torch.randn(64, dtype=torch.bfloat16, requires_grad=True) * 1

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        act(x)
    assert sum(size for size in kept.values() if size > 8) == x.nbytes


def test_float16_has_squares_in_float32_where_autocast_gives_them():
    """Beyond 65504 float16 is infinite; a product would be so before it is multiplied by the scale."""
    with Operators() as operators:
        SquaredReLU()(torch.tensor([300.0, 2.0], dtype=torch.float16))
    assert "pow" in operators.names
    assert "mul" not in operators.names


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # PyTorch's own
def test_star_relu_in_bfloat16_has_the_derivatives_of_its_formula():
    act = make(StarReLU)
    names = ("scale", "bias")

    def run(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(act, state, x)

    def formula(x, scale, bias):
        y = F.relu(x.double())
        return scale.double() * y * y + bias.double()

    def close(found, expected):
        torch.testing.assert_close(found.double(), expected.double(), rtol=3e-2, atol=3e-2)

    x = torch.randn(5, 7, dtype=torch.bfloat16)
    inputs = (x, act.scale.detach(), act.bias.detach())
    tangents = (x.cos(), torch.tensor([0.3]), torch.tensor([-0.7]))
    for function in zip(
        *(torch.func.jvp(f, inputs, tangents) for f in (run, formula)), strict=True
    ):
        close(*function)
    mapped = torch.vmap(run, in_dims=(0, None, None))(*inputs)
    close(mapped, formula(*inputs))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    once = [
        torch.autograd.grad(f(*inputs).double().square().sum(), inputs, create_graph=True)
        for f in (run, formula)
    ]
    twice = [
        torch.autograd.grad(sum(g.double().sum() for g in gradients), inputs) for gradients in once
    ]
    for found, expected in (once, twice):
        for gradient, reference in zip(found, expected, strict=True):
            assert (gradient - reference).norm() < 6e-2 * reference.norm()
    outputs = run(*inputs)
    directions = torch.randn(3, 5, 7).bfloat16()
    several = torch.autograd.grad(
        outputs, inputs, directions, is_grads_batched=True, retain_graph=True
    )
    for i, direction in enumerate(directions):
        one = torch.autograd.grad(outputs, inputs, direction, retain_graph=True)
        torch.testing.assert_close([gradient[i] for gradient in several], list(one))
