"""Batch norm that compilers leave to PyTorch's kernel: what `nn.BatchNorm2d` computes and keeps."""

import copy

import pytest
import torch
from torch import nn

from models.layers.batch_norm import BatchNorm2d
from tests.golden_tools import fill_module_
from tests.models.layers.kernels.tools import assert_sound


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def norms():
    """Ours, and PyTorch's with the same weights and statistics."""
    ours = fill_module_(BatchNorm2d(6))
    plain = nn.BatchNorm2d(6)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours, plain


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_training_is_that_of_pytorchs_batch_norm(layout, monkeypatch):
    ours, plain = norms()
    calls = []
    forward = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *a: calls.append(1) or forward(*a))
    compiled = torch.compile(ours.train(), backend="aot_eager", fullgraph=True)
    for batch in (4, 3, 5):
        x = (3 * torch.randn(batch, 6, 5, 7) + 2).contiguous(memory_format=layout)
        x.requires_grad_()
        y = compiled(x)
        assert not calls, "PyTorch's layer was traced"
        expected = plain(x)
        calls.clear()
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=layout)
        direction = torch.randn(batch, 6, 5, 7)  # in the other layout once
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, *ours.parameters()), direction),
            torch.autograd.grad(expected, (x, *plain.parameters()), direction),
        )
        torch.testing.assert_close(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_everywhere_else_it_is_pytorchs(training):
    ours, plain = norms()
    x = torch.randn(4, 6, 5, 7)
    assert torch.equal(ours.train(training)(x), plain.train(training)(x))
    assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))
    frozen = copy.deepcopy(ours).eval()
    assert torch.equal(torch.compile(frozen, backend="eager", fullgraph=True)(x), frozen(x))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 6, 1, 1), "more than 1 value per channel"), ((6, 5, 7), "expected 4D input")],
)
def test_compiled_training_refuses_what_pytorchs_layer_does(shape, message):
    ours, plain = norms()
    compiled = torch.compile(ours.train(), backend="aot_eager")
    for norm, errors in ((compiled, (RuntimeError, ValueError)), (plain.train(), ValueError)):
        with pytest.raises(errors, match=message):
            norm(torch.randn(shape))
    assert torch.equal(ours.running_mean, plain.running_mean)
    assert torch.equal(ours.running_var, plain.running_var)


def test_an_empty_batch_passes_and_leaves_the_statistics():
    ours, plain = norms()
    x = torch.randn(0, 6, 5, 7)
    assert torch.compile(ours.train(), backend="aot_eager")(x).shape == plain.train()(x).shape
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def other_axes(*shape):
    """A map that is neither contiguous nor channels-last."""
    return torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("made", [torch.randn, other_axes])
def test_the_operator_keeps_the_rules_of_operators(made):
    inputs = (made(4, 6, 5, 7), torch.rand(6), torch.randn(6))
    assert_sound(torch.ops.mixlab.batch_norm.default, (*(t.requires_grad_() for t in inputs), 1e-5))


def test_several_gpus_synchronise_it():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(BatchNorm2d(6)))
    assert type(converted[0]) is nn.SyncBatchNorm
