"""Filters on quads equal products of complex spectra, forward and backward."""

import pytest
import torch

from models.layers import kernels
from tests.models.layers.kernels.tools import assert_one_graph, assert_sound, check

# Batch, rows h, columns F, channels, filters of the bank; tiles are 16 pairs and 128 channels at most.
CASES = [
    (2, 3, 3, 8, 4),
    (1, 5, 4, 20, 2),  # two tiles of frequencies, channels that are no power of two
    (2, 2, 3, 150, 3),  # two tiles of channels
    (3, 1, 1, 1, 1),
    (3, 3, 3, 8, None),  # a filter per channel, no routing
    (2, 5, 4, 150, None),
]


def plain(quads, table, routing=None):
    """X(+-kh, kw) = cc -+ ss - i (+-sc + cs), times the filter of each of the two rows, and back."""
    if routing is None:
        s1, s2, d1, d2 = table
    else:
        s1, s2, d1, d2 = torch.einsum("ihfk,bkc->ibhfc", table, routing)
    plus, minus = torch.complex(s1 + d1, s2 + d2), torch.complex(s1 - d1, s2 - d2)
    (cc, cs), (sc, ss) = (row.unbind(2) for row in quads.unbind(1))
    plus = torch.complex(cc - ss, -(sc + cs)) * plus
    minus = torch.complex(cc + ss, sc - cs) * minus
    both, difference = (plus + minus) / 2, (minus - plus) / 2
    cosine, sine = [both.real, -both.imag], [difference.imag, difference.real]
    return torch.stack([torch.stack(cosine, 2), torch.stack(sine, 2)], 1)


def run(quads, table, routing=None):
    return kernels.filter_quads(quads, table, routing)


def random_inputs(batch, rows, columns, channels, num_filters, device, dtype=torch.float32):
    """Quads and table; and routing, if there is a number of filters."""
    quads = torch.randn(batch, 2, rows, 2, columns, channels).to(device, dtype)
    table = torch.randn(4, rows, columns, num_filters or channels).to(device)
    if num_filters is None:
        return [quads, table]
    return [quads, table, torch.randn(batch, num_filters, channels).to(device)]


@pytest.mark.parametrize(("batch", "rows", "columns", "channels", "num_filters"), CASES)
def test_equals_products_of_complex_spectra_forward_and_backward(
    batch, rows, columns, channels, num_filters, device
):
    check(run, plain, random_inputs(batch, rows, columns, channels, num_filters, device))


def test_sums_over_images_in_few_programs_are_complete(device, monkeypatch):
    monkeypatch.setattr("models.layers.kernels.quads._MANY_PROGRAMS", 2)
    check(run, plain, random_inputs(5, 3, 3, 8, None, device))


@pytest.mark.parametrize("num_filters", [4, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype, num_filters, device):
    check(run, plain, random_inputs(2, 3, 4, 24, num_filters, device, dtype))


def test_operands_are_taken_in_any_order_of_memory(device):
    quads, table, routing = random_inputs(2, 3, 4, 6, 2, device)
    inputs = [quads.mT.contiguous().mT, table.mT.contiguous().mT, routing.mT.contiguous().mT]
    check(run, plain, inputs)


@pytest.mark.parametrize("num_filters", [2, None])
def test_an_empty_batch_gives_an_empty_result(num_filters, device):
    inputs = [x.requires_grad_() for x in random_inputs(0, 3, 3, 8, num_filters, device)]
    out = run(*inputs)
    out.sum().backward()
    assert out.shape == inputs[0].shape
    assert not inputs[1].grad.any()


@pytest.mark.parametrize("num_filters", [2, None])
def test_the_operator_keeps_its_promises_to_the_compiler(num_filters, device):
    inputs = [x.requires_grad_() for x in random_inputs(2, 2, 3, 8, num_filters, device)]
    args = (*inputs, None)[:3]
    assert_sound(torch.ops.mixlab.filter_quads.default, args)


@pytest.mark.parametrize("num_filters", [2, None])
def test_compiles_to_one_graph_for_all_batches(num_filters, device):
    batches = [random_inputs(n, 2, 3, 8, num_filters, device) for n in (2, 3)]
    assert_one_graph(run, *batches)
