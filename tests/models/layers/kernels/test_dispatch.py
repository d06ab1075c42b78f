"""Where the kernels are available the layers use them, and compute what they compute without."""

import pytest
import torch

from models.layers import kernels, quads
from models.layers.dilated import DilatedAttention
from models.layers.fourier import fourier_filter
from models.layers.grained import ragged_attention
from tests.models.layers.kernels.tools import assert_close


@pytest.fixture
def compare(device, monkeypatch):
    """Check that a function of tensors uses the kernel `name` where it is available, to the same effect."""

    def run(function, inputs, name):
        used = []
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args: used.append(name) or kernel(*args))
        results = []
        for available in (False, True):
            monkeypatch.setattr(kernels, "available", lambda *args, answer=available: answer)
            assert not used
            leaves = [x.detach().to(device).requires_grad_() for x in inputs]
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert used == [name]
        for plain, with_kernel in zip(*results, strict=True):
            # On a GPU products of three TF32 parts come close to float32.
            assert_close(with_kernel, plain.double(), 1e-5 if device.type == "cpu" else 2e-5)

    return run


def test_dilated_attention_uses_its_kernel(compare, device):
    module = DilatedAttention(24, 3).to(device)
    compare(module, [torch.randn(2, 5, 4, 24)], "dilated_attention")


@pytest.mark.parametrize("num_filters", [3, None])
def test_fourier_filters_use_their_kernel(num_filters, compare, monkeypatch):
    monkeypatch.setattr(quads, "eager_on_cpu", lambda *tensors: False)
    inputs = [torch.randn(2, 5, 6, 8), torch.randn(5, 4, num_filters or 8, 2)]
    if num_filters:
        inputs.append(torch.randn(2, num_filters, 8))
    compare(
        lambda x, filters, routing=None: fourier_filter(x, filters, routing, "matmul"),
        inputs,
        "filter_quads",
    )


def test_grained_queries_use_their_kernel(compare):
    lengths = [1, 9, 4]
    inputs = [torch.randn(14, 16), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)]
    compare(
        lambda q, k, v: ragged_attention(q, k, v, torch.tensor(lengths, device=q.device)),
        inputs,
        "ragged_attention",
    )
