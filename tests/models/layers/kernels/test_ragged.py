"""Attention of packed queries equals attention of each image by itself, forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.layers import kernels
from tests.models.layers.kernels.tools import assert_one_graph, assert_sound, check

# Rows per image, heads, keys per image, head_dim; blocks are 64 queries and 64 keys.
CASES = [
    ([3, 5], 2, 7, 8),
    ([70, 0, 1, 5], 3, 67, 24),  # very different lengths, more than one block of both
    ([1, 130, 64], 1, 130, 32),
    ([4], 2, 1, 16),
]


def random_inputs(lengths, heads, num_keys, head_dim, device, dtype=torch.float32):
    """Rows (L, C), and keys and values as one projection leaves them: (B, M, 2, heads, head_dim)."""
    rows = torch.randn(sum(lengths), heads * head_dim)
    keys_values = torch.randn(len(lengths), num_keys, 2, heads, head_dim)
    return [rows.to(device, dtype), keys_values.to(device, dtype)]


def split(keys_values):
    return keys_values.permute(2, 0, 3, 1, 4).unbind(0)


def plain(q, keys_values, lengths):
    outs = []
    for rows, k, v in zip(q.split(lengths), *split(keys_values), strict=True):
        rows = rows.unflatten(1, (k.shape[0], -1)).transpose(0, 1)  # h l d
        probs = (rows @ k.mT / rows.shape[-1] ** 0.5).softmax(-1)
        outs.append((probs @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


def run(q, keys_values, lengths):
    return kernels.ragged_attention(q, *split(keys_values), torch.tensor(lengths, device=q.device))


@pytest.mark.parametrize(("lengths", "heads", "num_keys", "head_dim"), CASES)
def test_equals_each_image_by_itself_forward_and_backward(
    lengths, heads, num_keys, head_dim, device
):
    inputs = random_inputs(lengths, heads, num_keys, head_dim, device)
    # Three TF32 products come close to a float32 product, not all the way.
    tolerance = 3e-6 if device.type == "cpu" else 2e-5
    check(lambda *x: run(*x, lengths), lambda *x: plain(*x, lengths), inputs, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("matrix products of bfloat16 are wrong in Triton 3.9's interpreter")
    inputs = random_inputs([9, 40, 2], 2, 70, 32, device, dtype)
    check(lambda *x: run(*x, [9, 40, 2]), lambda *x: plain(*x, [9, 40, 2]), inputs)


def test_large_logits_do_not_overflow(device):
    inputs = [x * 10 for x in random_inputs([3, 5], 2, 7, 16, device)]
    # Logits of several hundred leave fewer digits to what is after the point.
    check(lambda *x: run(*x, [3, 5]), lambda *x: plain(*x, [3, 5]), inputs, 1e-3)


def test_logits_far_below_zero_leave_no_trace_of_keys_that_do_not_exist(device):
    q, keys_values = random_inputs([3, 5], 2, 7, 16, device)
    with torch.no_grad():
        q += 10
        keys_values[:, :, 0] -= 10
    check(lambda *x: run(*x, [3, 5]), lambda *x: plain(*x, [3, 5]), [q, keys_values], 1e-3)


def test_values_without_contiguous_rows_are_taken(device):
    q, keys_values = random_inputs([3, 5], 2, 7, 8, device)
    inputs = [q, keys_values.mT.contiguous().mT]
    check(lambda *x: run(*x, [3, 5]), lambda *x: plain(*x, [3, 5]), inputs, 2e-5)


def test_no_rows_at_all_give_an_empty_result_and_no_gradient(device):
    q, keys_values = (x.requires_grad_() for x in random_inputs([0, 0], 2, 7, 8, device))
    out = run(q, keys_values, [0, 0])
    out.sum().backward()
    assert out.shape == (0, 16)
    assert not keys_values.grad.any()


@pytest.mark.parametrize("lengths", [[8], [3, 3, 2]])
def test_lengths_that_do_not_fit_are_an_error(lengths, device):
    q, keys_values = random_inputs([3, 5], 2, 7, 8, device)
    with pytest.raises(ValueError, match=r"2 numbers, one per image"):
        run(q, keys_values, lengths)


def test_its_products_are_counted():
    """Models with grained queries cannot be counted on the meta device, so it is done where they run."""
    pytest.importorskip("triton")
    q, keys_values = random_inputs([3, 5], 2, 7, 8, "meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = kernels.ragged_attention(q.requires_grad_(), *split(keys_values), lengths)
        product = 2 * 8 * 7 * 16
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
        assert counter.get_total_flops() == (2 + 5) * product


def test_the_operator_keeps_its_promises_to_the_compiler(device):
    q, keys_values = (x.requires_grad_() for x in random_inputs([3, 5], 2, 7, 8, device))
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    assert_sound(torch.ops.mixlab.ragged_attention.default, (q, *split(keys_values), offsets))


def test_compiles_to_one_graph_for_all_lengths(device):
    def attend(q, keys_values, lengths):
        return kernels.ragged_attention(q, *split(keys_values), lengths)

    batches = []
    for lengths in ([3, 5], [2, 9, 4]):
        inputs = random_inputs(lengths, 2, 7, 8, device)
        batches.append((*inputs, torch.tensor(lengths, device=device)))
    assert_one_graph(attend, *batches)
