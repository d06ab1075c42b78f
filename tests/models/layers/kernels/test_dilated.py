"""Dilated attention on the GPU equals the loop over pixels, forward and backward."""

import pytest
import torch

from models.layers import kernels
from tests.models.layers.kernels.tools import assert_one_graph, assert_sound, check
from tests.reference import dilated_attention as literal

# Batch, map, heads, head_dim, kernel, dilation.
CASES = [
    (2, (5, 7), 3, 24, 3, (1, 2, 3)),  # as published: head_dim is no power of two
    (1, (2, 5), 4, 3, 5, (1, 3)),  # two heads per dilation, neighbours beyond the whole map
    (1, (9, 1), 2, 8, 3, (2,)),
    (3, (1, 1), 1, 1, 3, (1,)),
    (1, (4, 3), 2, 32, 1, (1,)),
]


def random_qkv(batch, size, heads, head_dim, device, dtype=torch.float32):
    return torch.randn(batch, *size, 3 * heads * head_dim).to(device, dtype)


def plain(qkv, *args):
    return literal.dilated_attention(qkv.permute(0, 3, 1, 2), *args).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("batch", "size", "heads", "head_dim", "kernel", "dilation"), CASES)
def test_equals_the_loop_forward_and_backward(
    batch, size, heads, head_dim, kernel, dilation, device
):
    args = (heads, kernel, dilation, 0.7)
    qkv = random_qkv(batch, size, heads, head_dim, device)
    check(lambda x: kernels.dilated_attention(x, *args), lambda x: plain(x, *args), [qkv])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype, device):
    args = (3, 3, (1, 2, 3), 0.4)
    qkv = random_qkv(1, (3, 5), 3, 24, device, dtype)
    check(lambda x: kernels.dilated_attention(x, *args), lambda x: plain(x, *args), [qkv])


def test_large_logits_do_not_overflow(device):
    qkv = random_qkv(1, (3, 4), 2, 4, device) * 10
    args = (2, 3, (1, 2), 1.0)
    # Logits of several hundred leave fewer digits to what is after the point.
    check(lambda x: kernels.dilated_attention(x, *args), lambda x: plain(x, *args), [qkv], 1e-4)


def test_planes_from_a_convolution_are_taken_in_any_order_of_memory(device):
    args = (2, 3, (1, 2), 0.5)
    planes = torch.randn(2, 12, 3, 5).to(device)
    check(
        lambda x: kernels.dilated_attention(x.permute(0, 2, 3, 1), *args),
        lambda x: plain(x.permute(0, 2, 3, 1), *args),
        [planes],
    )


def test_what_backward_needs_is_kept_only_where_there_is_a_backward(device):
    qkv = random_qkv(2, (3, 4), 2, 4, device)
    out, log_sum = torch.ops.mixlab.dilated_attention(qkv, 2, 3, [1, 2], 0.5, False)
    kept_out, kept = torch.ops.mixlab.dilated_attention(qkv, 2, 3, [1, 2], 0.5, True)
    assert torch.equal(out, kept_out)
    assert (log_sum.numel(), kept.shape) == (0, (2, 2, 3, 4))
    with torch.no_grad():
        assert torch.equal(kernels.dilated_attention(qkv.requires_grad_(), 2, 3, (1, 2), 0.5), out)


def test_an_empty_batch_gives_an_empty_result(device):
    qkv = random_qkv(0, (3, 4), 2, 4, device).requires_grad_()
    out = kernels.dilated_attention(qkv, 2, 3, (1, 2), 0.5)
    out.sum().backward()
    assert (out.shape, qkv.grad.shape) == ((0, 3, 4, 8), (0, 3, 4, 24))


def test_the_operator_keeps_its_promises_to_the_compiler(device):
    qkv = random_qkv(2, (1, 2), 2, 4, device).requires_grad_()
    for keep in (True, False):
        assert_sound(
            torch.ops.mixlab.dilated_attention.default,
            (qkv if keep else qkv.detach(), 2, 3, [1, 2], 0.5, keep),
        )


def test_compiles_to_one_graph_for_all_batches(device):
    batches = [(random_qkv(n, (1, 3), 2, 4, device),) for n in (2, 3)]
    assert_one_graph(lambda x: kernels.dilated_attention(x, 2, 3, (1, 2), 0.5), *batches)
