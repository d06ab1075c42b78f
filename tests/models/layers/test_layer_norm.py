"""Layer norm that compilers leave to PyTorch's kernel: what `nn.LayerNorm` computes."""

import pytest
import torch
from torch import nn

from models.layers.layer_norm import LayerNorm
from tests.golden_tools import fill_module_
from tests.models.layers.kernels.tools import assert_sound


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def norms(**options):
    """Ours, and PyTorch's with the same weights."""
    ours = fill_module_(LayerNorm(6, **options))
    plain = nn.LayerNorm(6, **options)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours, plain


@pytest.mark.parametrize("bias", [True, False])
def test_compiled_it_is_pytorchs_layer_norm(bias, monkeypatch):
    ours, plain = norms(eps=1e-3, bias=bias)
    calls = []
    forward = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda *a: calls.append(1) or forward(*a))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for batch in (4, 3, 5):
        x = (3 * torch.randn(batch, 7, 6) + 2).requires_grad_()
        y = compiled(x)
        assert not calls, "PyTorch's layer was traced"
        expected = plain(x)
        calls.clear()
        torch.testing.assert_close(y, expected)
        direction = torch.randn(batch, 6, 7).transpose(1, 2)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, *ours.parameters()), direction),
            torch.autograd.grad(expected, (x, *plain.parameters()), direction),
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
        calls.clear()


def test_everywhere_else_it_is_pytorchs(monkeypatch):
    ours, plain = norms()
    x = torch.randn(4, 6)
    monkeypatch.setattr("models.layers.layer_norm._layer_norm", None)
    assert torch.equal(ours(x), plain(x))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x.to(dtype)), plain(x.to(dtype)))
    unweighted = LayerNorm(6, elementwise_affine=False)
    torch.testing.assert_close(torch.compile(unweighted, backend="eager")(x), unweighted(x))


def test_compiled_it_refuses_what_pytorchs_layer_does():
    ours, plain = norms()
    for norm in (torch.compile(ours, backend="aot_eager"), plain):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(torch.randn(4, 5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 7, 6), (0, 6), (6,)])
def test_the_operator_keeps_the_rules_of_operators(shape, bias):
    inputs = (torch.randn(shape), torch.rand(6), torch.randn(6) if bias else None)
    inputs = [x if x is None else x.requires_grad_() for x in inputs]
    assert_sound(torch.ops.mixlab.layer_norm.default, (*inputs, 1e-5))


def test_the_operators_take_any_strides():
    x, grad = (torch.randn(4, 6, 7).transpose(1, 2) for _ in range(2))
    weight = torch.rand(6)
    assert_sound(torch.ops.mixlab.layer_norm.default, (x.requires_grad_(), weight, None, 1e-5))
    mean, inverse = torch.ops.mixlab.layer_norm(x.detach(), weight, None, 1e-5)[1:]
    found = torch.ops.mixlab.layer_norm_backward(grad, x.detach(), mean, inverse, weight)
    y = torch.nn.functional.layer_norm(x, (6,), weight)
    torch.testing.assert_close(found[0], torch.autograd.grad(y, x, grad)[0])
