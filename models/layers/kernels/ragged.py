"""Attention of packed queries to the keys of their own image; see `models/layers/grained.py`.

Only the queries are ragged: image i owns the rows offsets[i] to offsets[i + 1], and all images have as
many keys. A program holds a block of one image's queries for one head and walks over the keys with an
online softmax; nothing is padded to the longest image, and the host does not have to know the lengths:
each program finds its image from the offsets. Backward recomputes the probabilities from a logarithm per
query; keys belong to one image, so nothing is added atomically.

Shapes: L rows (queries of all images), C channels (heads * head_dim), B batch, M keys of an image,
        Q queries and N keys of a block, D head_dim rounded up to a power of two
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .tuning import tuned, work_class

# Triton's exponential is base 2.
LOG2E = tl.constexpr(math.log2(math.e))

# What is summed over goes in blocks of one size, so that configurations differ in little but speed. The first
# one fits the registers and the shared memory of every GPU, also where a row has `MAX_ROW` bytes.
_QUERY_BLOCKS = [
    triton.Config({"BLOCK_Q": rows, "BLOCK_K": 64}, num_warps=warps, num_stages=stages)
    for rows, warps, stages in ((32, 8, 2), (64, 4, 2), (64, 4, 3), (32, 4, 2), (128, 8, 2))
]
_KEY_BLOCKS = [
    triton.Config({"BLOCK_Q": 64, "BLOCK_K": keys}, num_warps=warps, num_stages=2)
    for keys, warps in ((32, 8), (64, 4), (32, 4), (64, 8), (128, 8))
]


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Softmax attention, logits divided by sqrt(head_dim), of packed rows to the keys of their own image.

    Args:
        q: (L, C), image after image; k, v: (B, heads, M, C / heads).
        lengths: (B,) rows per image on the device, L together (the host does not look); an image may have
            none.

    Returns:
        (L, C).
    """
    if lengths.shape != k.shape[:1]:
        raise ValueError(
            f"lengths of shape {tuple(lengths.shape)} must be {k.shape[0]} numbers, one per image"
        )
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return _attend(q, k, v, offsets)[0]


@torch.library.custom_op("mixlab::ragged_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The output (L, C), and for the backward pass (heads, L) log2 of the softmax denominators."""
    q, k, v = q.contiguous(), _rows(k), _rows(v)
    out, log_sum = _outputs(q, k)
    _launch(_forward_kernel, q, k, v, offsets, (out, log_sum), _query_blocks)
    return out, log_sum


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(q, k)


@torch.library.custom_op("mixlab::ragged_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (L, C) and of k and v (B, heads, M, d)."""
    grad, q, k, v = grad.contiguous(), q.contiguous(), _rows(k), _rows(v)
    grads = _like(q, k, v)
    delta = torch.empty_like(log_sum)
    common = (grad, log_sum, delta)
    # The first kernel leaves in `delta` what the second one needs of each query.
    _launch(_grad_query_kernel, q, k, v, offsets, (*common, out, grads[0]), _query_blocks)
    _launch(_grad_key_value_kernel, q, k, v, offsets, (*common, *grads[1:]), _key_blocks)
    return grads


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q, k, v)


def _outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((k.shape[1], q.shape[0]), dtype=torch.float32)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _rows(x: Tensor) -> Tensor:
    """Keys or values in any order of their rows, as projections leave them, but with rows in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_attend_backward(grad, *ctx.saved_tensors), None


_attend.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mixlab.ragged_attention)
def _flops(q: torch.Size, k: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Two products, as `torch.utils.flop_counter` counts fused attention."""
    return 4 * q[0] * q[1] * k[2]


@register_flop_formula(torch.ops.mixlab.ragged_attention_backward)
def _backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """Five products: the logits are made once more."""
    return 10 * q[0] * q[1] * k[2]


def _query_blocks(q: Tensor, k: Tensor, meta: dict) -> int:
    # Each image may end in a block that is not full.
    return (triton.cdiv(q.shape[0], meta["BLOCK_Q"]) + k.shape[0]) * k.shape[1]


def _key_blocks(q: Tensor, k: Tensor, meta: dict) -> int:
    return triton.cdiv(k.shape[2], meta["BLOCK_K"]) * k.shape[0] * k.shape[1]


def _launch(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    others: tuple[Tensor, ...],
    programs: Any,
) -> None:
    batch, heads, num_keys, head_dim = k.shape
    # Three products of TF32 parts come close to float32's precision, on the tensor cores.
    exact = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    if k.numel():
        # Triton launches on the current device, which need not be the tensor's.
        with torch.cuda.device_of(q):
            kernel[lambda meta: (programs(q, k, meta),)](
                q,
                k,
                v,
                offsets,
                *others,
                batch,
                q.shape[0],
                num_keys,
                *k.stride()[:3],
                *v.stride()[:3],
                head_dim**-0.5,
                work_class(q.shape[0] * num_keys),
                HEADS=heads,
                HEAD_DIM=head_dim,
                D=max(16, triton.next_power_of_2(head_dim)),  # 16: the least that tl.dot takes
                BATCH=triton.next_power_of_2(batch),
                PRECISION="tf32x3" if exact else "tf32",
            )


@tuned(_QUERY_BLOCKS, key=["HEAD_DIM", "work"])
@triton.jit(do_not_specialize=["work", "num_rows"])
def _forward_kernel(
    q,
    k,
    v,
    offsets,
    out,
    log_sum,
    batch,
    num_rows,
    num_keys,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    scale,
    work,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(0) % HEADS
    image, start, end = _queries(offsets, batch, HEADS, BATCH, BLOCK_Q)
    if start >= end:
        return
    rows = start + tl.arange(0, BLOCK_Q)
    q_tile = _load(q + head * HEAD_DIM, rows, end, HEADS * HEAD_DIM, HEAD_DIM, D)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, D], tl.float32)
    for first in range(0, num_keys, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        k_tile = _load(k, keys, num_keys, k_row, HEAD_DIM, D)
        v_tile = _load(v, keys, num_keys, v_row, HEAD_DIM, D)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        logits = tl.where((keys < num_keys)[None, :], logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink, weights = tl.exp2(top - new_top), tl.exp2(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        top = new_top
    _store(out + head * HEAD_DIM, mixed / total[:, None], rows, end, HEADS * HEAD_DIM, HEAD_DIM, D)
    tl.store(log_sum + head * num_rows + rows, top + tl.log2(total), mask=rows < end)


@tuned(_QUERY_BLOCKS, key=["HEAD_DIM", "work"])
@triton.jit(do_not_specialize=["work", "num_rows"])
def _grad_query_kernel(
    q,
    k,
    v,
    offsets,
    grad,
    log_sum,
    delta,
    out,
    grad_q,
    batch,
    num_rows,
    num_keys,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    scale,
    work,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the queries, and `delta`, the dots of output and gradient."""
    head = tl.program_id(0) % HEADS
    image, start, end = _queries(offsets, batch, HEADS, BATCH, BLOCK_Q)
    if start >= end:
        return
    C: tl.constexpr = HEADS * HEAD_DIM
    rows = start + tl.arange(0, BLOCK_Q)
    q_tile = _load(q + head * HEAD_DIM, rows, end, C, HEAD_DIM, D)
    g_tile = _load(grad + head * HEAD_DIM, rows, end, C, HEAD_DIM, D)
    out_tile = _load(out + head * HEAD_DIM, rows, end, C, HEAD_DIM, D)
    log_total = tl.load(log_sum + head * num_rows + rows, mask=rows < end, other=0.0)
    mean = tl.sum(out_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    tl.store(delta + head * num_rows + rows, mean, mask=rows < end)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    total = tl.zeros([BLOCK_Q, D], tl.float32)
    for first in range(0, num_keys, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        k_tile = _load(k, keys, num_keys, k_row, HEAD_DIM, D)
        v_tile = _load(v, keys, num_keys, v_row, HEAD_DIM, D)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
        # Keys beyond the last are 0, but where all exponentials are tiny their share would be infinite.
        logits = tl.where((keys < num_keys)[None, :], logits, -float("inf"))
        probs = tl.exp2(logits - log_total[:, None])
        d_probs = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        d_logits = probs * (d_probs - mean[:, None])
        total += tl.dot(d_logits.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    _store(grad_q + head * HEAD_DIM, total * scale, rows, end, C, HEAD_DIM, D)


@tuned(_KEY_BLOCKS, key=["HEAD_DIM", "work"])
@triton.jit(do_not_specialize=["work", "num_rows"])
def _grad_key_value_kernel(
    q,
    k,
    v,
    offsets,
    grad,
    log_sum,
    delta,
    grad_k,
    grad_v,
    batch,
    num_rows,
    num_keys,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    scale,
    work,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of a block of keys and values from all queries of their image, after `_grad_query_kernel`."""
    C: tl.constexpr = HEADS * HEAD_DIM
    program = tl.program_id(0)
    head = program % HEADS
    blocks = tl.cdiv(num_keys, BLOCK_K)
    image = (program // HEADS // blocks).to(tl.int64)
    keys = program // HEADS % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = _load(k + image * k_image + head * k_head, keys, num_keys, k_row, HEAD_DIM, D)
    v_tile = _load(v + image * v_image + head * v_head, keys, num_keys, v_row, HEAD_DIM, D)
    total_k = tl.zeros([BLOCK_K, D], tl.float32)
    total_v = tl.zeros([BLOCK_K, D], tl.float32)
    end = tl.load(offsets + image + 1)
    for start in range(tl.load(offsets + image), end, BLOCK_Q):
        # Queries beyond the last are 0 with gradient 0, and so is what they add.
        rows = start + tl.arange(0, BLOCK_Q)
        q_tile = _load(q + head * HEAD_DIM, rows, end, C, HEAD_DIM, D)
        g_tile = _load(grad + head * HEAD_DIM, rows, end, C, HEAD_DIM, D)
        log_total = tl.load(log_sum + head * num_rows + rows, mask=rows < end, other=0.0)
        mean = tl.load(delta + head * num_rows + rows, mask=rows < end, other=0.0)
        logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)
        logits = tl.where((keys < num_keys)[:, None], logits, -float("inf"))
        probs = tl.exp2(logits - log_total[None, :])  # N Q
        total_v += tl.dot(probs.to(g_tile.dtype), g_tile, input_precision=PRECISION)
        d_probs = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        d_logits = probs * (d_probs - mean[None, :])
        total_k += tl.dot(d_logits.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    first = (image * HEADS + head) * num_keys * HEAD_DIM
    _store(grad_k + first, total_k * scale, keys, num_keys, HEAD_DIM, HEAD_DIM, D)
    _store(grad_v + first, total_v, keys, num_keys, HEAD_DIM, HEAD_DIM, D)


@triton.jit
def _queries(offsets, batch, HEADS: tl.constexpr, BATCH: tl.constexpr, BLOCK_Q: tl.constexpr):
    """This program's image, the first of its rows, and the end of the image's rows; none if it is 0."""
    block = tl.program_id(0) // HEADS
    i = tl.arange(0, BATCH)
    first = tl.load(offsets + i, mask=i < batch, other=0)
    end = tl.load(offsets + i + 1, mask=i < batch, other=0)
    blocks = (end - first + BLOCK_Q - 1) // BLOCK_Q
    before = tl.cumsum(blocks, 0) - blocks
    mine = (block >= before) & (block < before + blocks)  # one image, or none after the last block
    image = tl.sum(tl.where(mine, i, 0), 0)
    start = tl.sum(tl.where(mine, first + (block - before) * BLOCK_Q, 0), 0)
    return image.to(tl.int64), start, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _load(base, rows, end, STRIDE, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """A head's channels (rows, D); 0 from the row `end` on."""
    d = tl.arange(0, D)
    at = base + rows.to(tl.int64)[:, None] * STRIDE + d[None, :]
    return tl.load(at, mask=(rows < end)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store(base, value, rows, end, STRIDE, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Write a head's channels (rows, D) before the row `end`."""
    d = tl.arange(0, D)
    at = base + rows.to(tl.int64)[:, None] * STRIDE + d[None, :]
    mask = (rows < end)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)
