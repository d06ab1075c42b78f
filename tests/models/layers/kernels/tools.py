"""What the tests of all kernels share: closeness per type, and derivatives in double precision."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Relative to the largest number that is expected; numbers are of the order of 1.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), 0.1)
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * scale, f"off by {error / scale:.1e} of {scale:.1e}"


def check(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tolerance: float | None = None,
) -> None:
    """`kernel` has the output and the gradients of `plain`, which computes in double precision."""
    tolerance = TOLERANCE[inputs[0].dtype] if tolerance is None else tolerance
    inputs = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().cpu().requires_grad_() for x in inputs]
    out, expected = kernel(*inputs), plain(*wide)
    assert out.dtype == inputs[0].dtype
    assert_close(out.cpu(), expected, tolerance)
    grad = torch.randn_like(expected).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, grad.to(out.device))
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    for x, actual, should_be in zip(inputs, grads, expected_grads, strict=True):
        assert actual.dtype == x.dtype
        assert_close(actual.cpu(), should_be, tolerance)


def assert_one_graph(kernel: Callable[..., Tensor], *batches: Sequence[Tensor]) -> None:
    """Compiled in one graph for all sizes of the batches, forward and backward, `kernel` stays what it is."""
    torch.compiler.reset()
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True, dynamic=True)
    for inputs in batches:
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        learned = [x for x in inputs if x.requires_grad]
        out, expected = compiled(*inputs), kernel(*inputs)
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out.square().sum(), learned)
        expected_grads = torch.autograd.grad(expected.square().sum(), learned)
        assert all(map(torch.equal, grads, expected_grads))


def assert_sound(operator: Any, args: tuple) -> None:
    """Schema, derivative and shapes without data are what PyTorch and its compiler rely on."""
    with warnings.catch_warnings():
        # The check itself asks tensors for gradients that they do not keep.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        torch.library.opcheck(operator, args)
