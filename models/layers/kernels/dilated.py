"""Multi-scale dilated attention with all dilations in one launch; see `models/layers/dilated.py`.

Forward: a program holds the queries of one head in a small tile of positions and walks over the k * k
neighbours with an online softmax, so that queries, keys and values come from memory once (tiles share
their neighbours through the caches) and no copy of a neighbourhood exists. Kept for the backward pass:
the input, and per query the logarithm of its softmax denominator. Backward gathers: the queries that see
a key sit at the opposite offsets, so nothing is added atomically and the result does not depend on order.

Shapes: B batch, H/W map, C channels (num_heads * head_dim, heads dilation after dilation), T taps = k * k,
        P positions of a tile, D head_dim rounded up to a power of two
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import tuned, work_class

# Triton's exponential is base 2.
LOG2E = tl.constexpr(math.log2(math.e))

_TILES = [
    triton.Config({"TILE_Y": y, "TILE_X": x}, num_warps=warps)
    for y, x, warps in ((8, 8, 4), (4, 8, 4), (4, 8, 2), (4, 16, 4), (8, 16, 8))
]


def dilated_attention(
    qkv: Tensor, num_heads: int, kernel_size: int, dilation: Sequence[int], scale: float
) -> Tensor:
    """Queries, keys and values (B, H, W, 3C) -> weighted values (B, H, W, C).

    Channels are (q | k | v, dilation, head of the group, head_dim), the last axis of what a `Linear` puts
    out. A neighbour outside the image has key 0 and value 0 and takes its share of the softmax.
    """
    keep = torch.is_grad_enabled() and qkv.requires_grad
    return _attend(qkv, num_heads, kernel_size, list(dilation), scale, keep)[0]


@torch.library.custom_op("mixlab::dilated_attention", mutates_args=())
def _attend(
    qkv: Tensor, num_heads: int, kernel_size: int, dilation: list[int], scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, C) and, to `keep` for the backward pass, (B, num_heads, H, W) log2 of sums."""
    qkv = qkv.contiguous()
    out, log_sum = _outputs(qkv, num_heads, keep)
    _launch(
        _forward_kernel, qkv, (out, log_sum), num_heads, kernel_size, dilation, scale, KEEP=keep
    )
    return out, log_sum


@_attend.register_fake
def _(
    qkv: Tensor, num_heads: int, kernel_size: int, dilation: list[int], scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    return _outputs(qkv, num_heads, keep)


@torch.library.custom_op("mixlab::dilated_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    qkv: Tensor,
    log_sum: Tensor,
    num_heads: int,
    kernel_size: int,
    dilation: list[int],
    scale: float,
) -> Tensor:
    """Gradient of qkv (B, H, W, 3C) from that of the output (B, H, W, C)."""
    qkv, grad = qkv.contiguous(), grad.contiguous()
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(log_sum)
    args = (num_heads, kernel_size, dilation, scale)
    # The first kernel leaves in `delta` what the second one needs of the queries around a key.
    for kernel in (_grad_query_kernel, _grad_key_value_kernel):
        _launch(kernel, qkv, (grad, log_sum, delta, grad_qkv), *args)
    return grad_qkv


@_attend_backward.register_fake
def _(grad: Tensor, qkv: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _outputs(qkv: Tensor, num_heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = qkv.shape
    sums = (batch, num_heads, height, width) if keep else (0,)
    return (
        qkv.new_empty(batch, height, width, channels // 3),
        qkv.new_empty(sums, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, *ctx.args, keep = inputs
    assert keep, "a gradient is wanted of a call that kept nothing for it"
    ctx.save_for_backward(qkv, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_qkv = _attend_backward(grad, *ctx.saved_tensors, *ctx.args)
    return grad_qkv, None, None, None, None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


def _launch(
    kernel: Any,
    qkv: Tensor,
    others: tuple[Tensor, ...],
    num_heads: int,
    kernel_size: int,
    dilation: list[int],
    scale: float,
    **flags: bool,
) -> None:
    """One program per image, tile and head; heads of a tile are neighbours, since they share cache lines."""
    batch, height, width, channels = qkv.shape
    head_dim = channels // 3 // num_heads

    def grid(meta: dict) -> tuple[int]:
        tiles = triton.cdiv(height, meta["TILE_Y"]) * triton.cdiv(width, meta["TILE_X"])
        return (batch * tiles * num_heads,)

    if qkv.numel():
        # Triton launches on the current device, which need not be the tensor's.
        with torch.cuda.device_of(qkv):
            kernel[grid](
                qkv,
                *others,
                height,
                width,
                scale,
                work_class(batch * num_heads * height * width),
                HEADS=num_heads,
                HEAD_DIM=head_dim,
                D=triton.next_power_of_2(head_dim),
                KERNEL=kernel_size,
                DILATION=tuple(dilation),
                **flags,
            )


@tuned(_TILES, key=["HEAD_DIM", "KERNEL", "work"])
@triton.jit(do_not_specialize=["work"])
def _forward_kernel(
    qkv,
    out,
    log_sum,
    height,
    width,
    scale,
    work,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    KEEP: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    C: tl.constexpr = HEADS * HEAD_DIM
    image, head, y, x = _place(height, width, HEADS, TILE_Y, TILE_X)
    r = _dilation_of(head, HEADS, DILATION)
    qkv += image * height * width * 3 * C + head * HEAD_DIM
    q = _load(qkv, y, x, height, width, 3 * C, HEAD_DIM, D) * (scale * LOG2E)  # P D
    top = tl.full([TILE_Y * TILE_X], -float("inf"), tl.float32)
    total = tl.zeros([TILE_Y * TILE_X], tl.float32)
    mixed = tl.zeros([TILE_Y * TILE_X, D], tl.float32)
    for row in tl.range(KERNEL):
        for column in tl.static_range(KERNEL):
            at_y, at_x = y + (row - KERNEL // 2) * r, x + (column - KERNEL // 2) * r
            # Zeros outside the image are what the softmax is to see there.
            k = _load(qkv + C, at_y, at_x, height, width, 3 * C, HEAD_DIM, D)
            v = _load(qkv + 2 * C, at_y, at_x, height, width, 3 * C, HEAD_DIM, D)
            logit = tl.sum(q * k, 1)
            new_top = tl.maximum(top, logit)
            shrink, weight = tl.exp2(top - new_top), tl.exp2(logit - new_top)
            total = total * shrink + weight
            mixed = mixed * shrink[:, None] + weight[:, None] * v
            top = new_top
    out += image * height * width * C + head * HEAD_DIM
    _store(out, mixed / total[:, None], y, x, height, width, C, HEAD_DIM, D)
    if KEEP:
        log_sum += (image * HEADS + head) * height * width
        tl.store(log_sum + y * width + x, top + tl.log2(total), mask=(y < height) & (x < width))


@tuned(_TILES, key=["HEAD_DIM", "KERNEL", "work"])
@triton.jit(do_not_specialize=["work"])
def _grad_query_kernel(
    qkv,
    grad,
    log_sum,
    delta,
    grad_qkv,
    height,
    width,
    scale,
    work,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Gradients of the queries, and `delta`, the mean of a query's dots grad . v under its softmax."""
    C: tl.constexpr = HEADS * HEAD_DIM
    image, head, y, x = _place(height, width, HEADS, TILE_Y, TILE_X)
    r = _dilation_of(head, HEADS, DILATION)
    first = image * height * width
    qkv += first * 3 * C + head * HEAD_DIM
    grad += first * C + head * HEAD_DIM
    q = _load(qkv, y, x, height, width, 3 * C, HEAD_DIM, D) * (scale * LOG2E)
    g = _load(grad, y, x, height, width, C, HEAD_DIM, D)
    per_query = (image * HEADS + head) * height * width + y * width + x
    inside = (y < height) & (x < width)
    log_total = tl.load(log_sum + per_query, mask=inside, other=0.0)
    mean = tl.zeros([TILE_Y * TILE_X], tl.float32)
    keys = tl.zeros([TILE_Y * TILE_X, D], tl.float32)
    scored_keys = tl.zeros([TILE_Y * TILE_X, D], tl.float32)
    for row in tl.range(KERNEL):
        for column in tl.static_range(KERNEL):
            at_y, at_x = y + (row - KERNEL // 2) * r, x + (column - KERNEL // 2) * r
            k = _load(qkv + C, at_y, at_x, height, width, 3 * C, HEAD_DIM, D)
            v = _load(qkv + 2 * C, at_y, at_x, height, width, 3 * C, HEAD_DIM, D)
            prob = tl.exp2(tl.sum(q * k, 1) - log_total)
            score = prob * tl.sum(g * v, 1)
            mean += score
            keys += prob[:, None] * k
            scored_keys += score[:, None] * k
    grad_q = (scored_keys - mean[:, None] * keys) * scale
    tl.store(delta + per_query, mean, mask=inside)
    grad_qkv += first * 3 * C + head * HEAD_DIM
    _store(grad_qkv, grad_q, y, x, height, width, 3 * C, HEAD_DIM, D)


@tuned(_TILES, key=["HEAD_DIM", "KERNEL", "work"])
@triton.jit(do_not_specialize=["work"])
def _grad_key_value_kernel(
    qkv,
    grad,
    log_sum,
    delta,
    grad_qkv,
    height,
    width,
    scale,
    work,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Gradients of keys and values from the queries that see them, after `_grad_query_kernel`."""
    C: tl.constexpr = HEADS * HEAD_DIM
    image, head, y, x = _place(height, width, HEADS, TILE_Y, TILE_X)
    r = _dilation_of(head, HEADS, DILATION)
    first = image * height * width
    qkv += first * 3 * C + head * HEAD_DIM
    grad += first * C + head * HEAD_DIM
    log_sum += (image * HEADS + head) * height * width
    delta += (image * HEADS + head) * height * width
    k = _load(qkv + C, y, x, height, width, 3 * C, HEAD_DIM, D) * (scale * LOG2E)
    v = _load(qkv + 2 * C, y, x, height, width, 3 * C, HEAD_DIM, D)
    grad_k = tl.zeros([TILE_Y * TILE_X, D], tl.float32)
    grad_v = tl.zeros([TILE_Y * TILE_X, D], tl.float32)
    for row in tl.range(KERNEL):
        for column in tl.static_range(KERNEL):
            at_y, at_x = y + (row - KERNEL // 2) * r, x + (column - KERNEL // 2) * r
            # No query outside the image: q and g are 0 there, and with them all that is added.
            q = _load(qkv, at_y, at_x, height, width, 3 * C, HEAD_DIM, D)
            g = _load(grad, at_y, at_x, height, width, C, HEAD_DIM, D)
            inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
            log_total = tl.load(log_sum + at_y * width + at_x, mask=inside, other=0.0)
            mean = tl.load(delta + at_y * width + at_x, mask=inside, other=0.0)
            prob = tl.exp2(tl.sum(q * k, 1) - log_total)
            grad_v += prob[:, None] * g
            grad_k += (prob * (tl.sum(g * v, 1) - mean))[:, None] * q
    grad_qkv += first * 3 * C + head * HEAD_DIM
    _store(grad_qkv + C, grad_k * scale, y, x, height, width, 3 * C, HEAD_DIM, D)
    _store(grad_qkv + 2 * C, grad_v, y, x, height, width, 3 * C, HEAD_DIM, D)


@triton.jit
def _place(height, width, HEADS: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """This program's image and head, and the rows and columns (P,) of its tile."""
    program = tl.program_id(0)
    head = program % HEADS
    across = tl.cdiv(width, TILE_X)
    tiles = tl.cdiv(height, TILE_Y) * across
    # A batch may have more than 2**31 elements; one image has not.
    image = (program // HEADS // tiles).to(tl.int64)
    tile = program // HEADS % tiles
    p = tl.arange(0, TILE_Y * TILE_X)
    return image, head, tile // across * TILE_Y + p // TILE_X, tile % across * TILE_X + p % TILE_X


@triton.jit
def _dilation_of(head, HEADS: tl.constexpr, DILATION: tl.constexpr):
    """Pixels between the neighbours that `head` looks at."""
    r = DILATION[0]
    for group in tl.static_range(1, len(DILATION)):
        r = tl.where(head // (HEADS // len(DILATION)) == group, DILATION[group], r)
    return r


@triton.jit
def _load(base, y, x, height, width, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """A head's channels (P, D) at positions of a map, float32; 0 outside."""
    d = tl.arange(0, D)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = base + ((y * width + x) * STRIDE)[:, None] + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(
    base, value, y, x, height, width, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr
):
    """Write a head's channels (P, D) where the positions exist."""
    d = tl.arange(0, D)
    inside = (y < height) & (x < width)
    at = base + ((y * width + x) * STRIDE)[:, None] + d[None, :]
    tl.store(at, value.to(base.dtype.element_ty), inside[:, None] & (d < HEAD_DIM)[None, :])
