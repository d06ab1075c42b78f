"""Complex filters on the quads of maps in one pass over them; see `models/layers/quads.py`.

On quads a filter is a real 4 x 4 matrix of four numbers S1, S2, D1, D2 per pair of frequencies. With
routing, the filter of a channel is a bank's filters weighted by that channel's routing: a program makes
its four numbers in registers, for a tile of frequencies and channels, and the filters never exist.
Backward makes them again; each program writes what it adds to the gradients of table and routing, and a
sum over the programs follows, so nothing is added atomically.

Shapes: B batch, h = H//2 + 1, F = W//2 + 1, C channels, K filters of the bank (without routing K = C);
        f frequency pairs and c channels of a tile
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Frequency pairs and most channels of a tile; fixed, so that partial sums do not depend on a measurement.
_TILE_F, _MAX_TILE_C = 16, 128

# Where sums over images stay in registers: with more channels a multiprocessor has room for one program, not
# for two.
_MAX_TILE_C_SUMMED = 64

# Programs that keep a large GPU busy; beyond them sums over images are made in registers.
_MANY_PROGRAMS = 1024


def filter_quads(quads: Tensor, table: Tensor, routing: Tensor | None) -> Tensor:
    """Multiply spectra, given as quads, by one filter per channel.

    Args:
        quads: (B, 2, h, 2, F, C), cosine and sine along H and along W.
        table: (4, h, F, K), S1, S2, D1 and D2 of each filter.
        routing: (B, K, C), weights of the filters for each channel; None: the filters are the channels'.

    Returns:
        (B, 2, h, 2, F, C) in the type of `quads`; products and sums are float32.
    """
    return _filter(quads, table, routing)


@torch.library.custom_op("mixlab::filter_quads", mutates_args=())
def _filter(quads: Tensor, table: Tensor, routing: Tensor | None) -> Tensor:
    quads, table = quads.contiguous(), table.contiguous()
    out = torch.empty_like(quads)
    if routing is None:
        _launch(_forward_kernel, quads, table, (quads, out), len(quads), ROUTED=False)
    else:
        routing = routing.contiguous()
        _launch(_forward_kernel, quads, table, (routing, out), len(quads), ROUTED=True)
    return out


@_filter.register_fake
def _(quads: Tensor, table: Tensor, routing: Tensor | None) -> Tensor:
    return torch.empty_like(quads, memory_format=torch.contiguous_format)


@torch.library.custom_op("mixlab::filter_quads_backward", mutates_args=())
def _filter_backward(
    grad: Tensor, quads: Tensor, table: Tensor, routing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of quads, table and routing; the last one is empty without routing."""
    grad, quads, table = grad.contiguous(), quads.contiguous(), table.contiguous()
    batch = quads.shape[0]
    grad_quads = torch.empty_like(quads)
    if routing is None:
        tiles_f, tiles_c = _tiles(quads, _MAX_TILE_C_SUMMED)
        parts = min(batch, triton.cdiv(_MANY_PROGRAMS, tiles_f * tiles_c))
        table_parts = quads.new_empty(parts, *table.shape, dtype=torch.float32)
        outputs = (grad, grad_quads, table_parts)
        _launch(_backward_kernel, quads, table, outputs, parts, _MAX_TILE_C_SUMMED)
        return grad_quads, table_parts.sum(0).to(table.dtype), table.new_empty(0)
    routing = routing.contiguous()
    tiles_f, tiles_c = _tiles(quads)
    table_parts = quads.new_empty(batch * tiles_c, *table.shape, dtype=torch.float32)
    routing_parts = quads.new_empty(tiles_f, *routing.shape, dtype=torch.float32)
    outputs = (grad, grad_quads, routing, table_parts, routing_parts)
    _launch(_routed_backward_kernel, quads, table, outputs, batch)
    return (
        grad_quads,
        table_parts.sum(0).to(table.dtype),
        routing_parts.sum(0).to(routing.dtype),
    )


@_filter_backward.register_fake
def _(
    grad: Tensor, quads: Tensor, table: Tensor, routing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    routing = table.new_empty(0) if routing is None else routing
    tensors = (quads, table, routing)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    quads, table, routing = ctx.saved_tensors
    *grads, grad_routing = _filter_backward(grad, quads, table, routing)
    return *grads, None if routing is None else grad_routing


_filter.register_autograd(_backward, setup_context=_setup_context)


def _tile_c(channels: int, max_tile_c: int) -> int:
    return min(max_tile_c, triton.next_power_of_2(channels))


def _tiles(quads: Tensor, max_tile_c: int = _MAX_TILE_C) -> tuple[int, int]:
    """Tiles of frequency pairs and of channels."""
    _, _, rows, _, columns, channels = quads.shape
    tiles_c = triton.cdiv(channels, _tile_c(channels, max_tile_c))
    return triton.cdiv(rows * columns, _TILE_F), tiles_c


def _launch(
    kernel: Any,
    quads: Tensor,
    table: Tensor,
    others: tuple[Tensor, ...],
    parts: int,
    max_tile_c: int = _MAX_TILE_C,
    **flags: bool,
) -> None:
    """One program per tile of frequencies and channels, and part of the batch."""
    batch, _, rows, _, columns, channels = quads.shape
    tiles_f, tiles_c = _tiles(quads, max_tile_c)
    if quads.numel():
        # Triton launches on the current device, which need not be the tensor's.
        with torch.cuda.device_of(quads):
            kernel[(tiles_f * tiles_c * parts,)](
                quads,
                table,
                *others,
                batch,
                rows,
                columns,
                C=channels,
                K=table.shape[-1],
                TILE_F=_TILE_F,
                TILE_C=_tile_c(channels, max_tile_c),
                **flags,
                num_warps=8,  # with 4, a thread's share of a tile does not fit its registers
            )


@triton.jit
def _forward_kernel(
    quads,
    table,
    routing,
    out,
    batch,
    rows,
    columns,
    C: tl.constexpr,
    K: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_C: tl.constexpr,
    ROUTED: tl.constexpr,
):
    """The argument `routing` is not read where it does not exist."""
    image, f, c, _ = _place(rows, columns, C, TILE_F, TILE_C)
    if ROUTED:
        s1, s2, d1, d2 = _weighted(table, routing + image * K * C, f, c, rows * columns, C, K)
    else:
        s1, s2, d1, d2 = _numbers(table, f, c, rows * columns, C)
    cc, cs, sc, ss = _load(quads, image, f, c, rows, columns, C)
    _store(
        out,
        s1 * cc - d1 * ss + d2 * sc + s2 * cs,
        s1 * cs - s2 * cc + d2 * ss + d1 * sc,
        s1 * sc - d2 * cc + s2 * ss + d1 * cs,
        s1 * ss - d1 * cc - s2 * sc - d2 * cs,
        image,
        f,
        c,
        rows,
        columns,
        C,
    )


@triton.jit
def _backward_kernel(
    quads,
    table,
    grad,
    grad_quads,
    table_parts,
    batch,
    rows,
    columns,
    C: tl.constexpr,
    K: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Without routing; a program sums over every so many images."""
    part, f, c, _ = _place(rows, columns, C, TILE_F, TILE_C)
    size = rows * columns
    programs = tl.cdiv(size, TILE_F) * ((C + TILE_C - 1) // TILE_C)
    numbers = _numbers(table, f, c, size, C)
    sum_s1 = tl.zeros([TILE_F, TILE_C], tl.float32)
    sum_s2 = tl.zeros([TILE_F, TILE_C], tl.float32)
    sum_d1 = tl.zeros([TILE_F, TILE_C], tl.float32)
    sum_d2 = tl.zeros([TILE_F, TILE_C], tl.float32)
    for image in range(part, batch, tl.num_programs(0) // programs):
        g_s1, g_s2, g_d1, g_d2 = _grad_numbers(
            quads, grad, grad_quads, numbers, image, f, c, rows, columns, C
        )
        sum_s1 += g_s1
        sum_s2 += g_s2
        sum_d1 += g_d1
        sum_d2 += g_d2
    at = table_parts + part * 4 * size * C + f[:, None] * C + c[None, :]
    mask = (f < size)[:, None] & (c < C)[None, :]
    tl.store(at, sum_s1, mask=mask)
    tl.store(at + size * C, sum_s2, mask=mask)
    tl.store(at + 2 * size * C, sum_d1, mask=mask)
    tl.store(at + 3 * size * C, sum_d2, mask=mask)


@triton.jit
def _routed_backward_kernel(
    quads,
    table,
    grad,
    grad_quads,
    routing,
    table_parts,
    routing_parts,
    batch,
    rows,
    columns,
    C: tl.constexpr,
    K: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_C: tl.constexpr,
):
    image, f, c, tile_f = _place(rows, columns, C, TILE_F, TILE_C)
    size = rows * columns
    routing += image * K * C
    numbers = _weighted(table, routing, f, c, size, C, K)
    g_s1, g_s2, g_d1, g_d2 = _grad_numbers(
        quads, grad, grad_quads, numbers, image, f, c, rows, columns, C
    )
    tiles_c: tl.constexpr = (C + TILE_C - 1) // TILE_C
    table_parts += (image * tiles_c + tl.program_id(0) % tiles_c) * 4 * size * K
    routing_parts += (tile_f * batch + image) * K * C
    for k in tl.static_range(K):
        at = f * K + k
        t_s1, t_s2, t_d1, t_d2 = _four(table + at, size * K, f < size)
        by_channel = t_s1[:, None] * g_s1 + t_s2[:, None] * g_s2
        by_channel += t_d1[:, None] * g_d1 + t_d2[:, None] * g_d2
        tl.store(routing_parts + k * C + c, tl.sum(by_channel, 0), mask=c < C)
        weight = tl.load(routing + k * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(table_parts + at, tl.sum(g_s1 * weight, 1), mask=f < size)
        tl.store(table_parts + at + size * K, tl.sum(g_s2 * weight, 1), mask=f < size)
        tl.store(table_parts + at + 2 * size * K, tl.sum(g_d1 * weight, 1), mask=f < size)
        tl.store(table_parts + at + 3 * size * K, tl.sum(g_d2 * weight, 1), mask=f < size)


@triton.jit
def _grad_numbers(quads, grad, grad_quads, numbers, image, f, c, rows, columns, C: tl.constexpr):
    """Writes the gradients of the quads; returns those of S1, S2, D1, D2 (f, c), from one image."""
    s1, s2, d1, d2 = numbers
    g_cc, g_cs, g_sc, g_ss = _load(grad, image, f, c, rows, columns, C)
    _store(
        grad_quads,
        s1 * g_cc - s2 * g_cs - d2 * g_sc - d1 * g_ss,
        s2 * g_cc + s1 * g_cs + d1 * g_sc - d2 * g_ss,
        d2 * g_cc + d1 * g_cs + s1 * g_sc - s2 * g_ss,
        s1 * g_ss - d1 * g_cc + d2 * g_cs + s2 * g_sc,
        image,
        f,
        c,
        rows,
        columns,
        C,
    )
    cc, cs, sc, ss = _load(quads, image, f, c, rows, columns, C)
    return (
        g_cc * cc + g_cs * cs + g_sc * sc + g_ss * ss,
        g_cc * cs - g_cs * cc + g_sc * ss - g_ss * sc,
        g_cs * sc - g_cc * ss + g_sc * cs - g_ss * cc,
        g_cc * sc + g_cs * ss - g_sc * cc - g_ss * cs,
    )


@triton.jit
def _place(rows, columns, C: tl.constexpr, TILE_F: tl.constexpr, TILE_C: tl.constexpr):
    """This program's part of the batch, frequency pairs (f,) by rows, channels (c,), and tile of f."""
    program = tl.program_id(0)
    tiles_c: tl.constexpr = (C + TILE_C - 1) // TILE_C
    tiles_f = tl.cdiv(rows * columns, TILE_F)
    tile_f = program // tiles_c % tiles_f
    # A batch may have more than 2**31 elements; one image has not.
    part = (program // tiles_c // tiles_f).to(tl.int64)
    f = tile_f * TILE_F + tl.arange(0, TILE_F)
    return part, f, program % tiles_c * TILE_C + tl.arange(0, TILE_C), tile_f


@triton.jit
def _weighted(table, routing, f, c, size, C: tl.constexpr, K: tl.constexpr):
    """S1, S2, D1, D2 (f, c) of the filters of a bank, weighted for each channel."""
    s1 = tl.zeros([f.shape[0], c.shape[0]], tl.float32)
    s2, d1, d2 = s1, s1, s1
    for k in tl.static_range(K):
        weight = tl.load(routing + k * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        t_s1, t_s2, t_d1, t_d2 = _four(table + f * K + k, size * K, f < size)
        s1 += t_s1[:, None] * weight
        s2 += t_s2[:, None] * weight
        d1 += t_d1[:, None] * weight
        d2 += t_d2[:, None] * weight
    return s1, s2, d1, d2


@triton.jit
def _numbers(table, f, c, size, C: tl.constexpr):
    """S1, S2, D1, D2 (f, c) of a filter per channel."""
    at = table + f[:, None] * C + c[None, :]
    return _four(at, size * C, (f < size)[:, None] & (c < C)[None, :])


@triton.jit
def _four(at, stride, mask):
    """Four numbers in float32 from each address."""
    return (
        tl.load(at, mask=mask, other=0.0).to(tl.float32),
        tl.load(at + stride, mask=mask, other=0.0).to(tl.float32),
        tl.load(at + 2 * stride, mask=mask, other=0.0).to(tl.float32),
        tl.load(at + 3 * stride, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _at(image, f, c, rows, columns, C: tl.constexpr):
    """Offsets (f, c) of cc in (B, 2, h, 2, F, C), from there to cs and to sc; where they exist."""
    row, column = f // columns, f % columns
    offset = image * rows * columns * 4 * C
    offset += ((row * 2 * columns + column) * C)[:, None] + c[None, :]
    mask = (f < rows * columns)[:, None] & (c < C)[None, :]
    return offset, columns * C, rows * columns * 2 * C, mask


@triton.jit
def _load(quads, image, f, c, rows, columns, C: tl.constexpr):
    """The quads cc, cs, sc, ss (f, c) in float32."""
    offset, cs, sc, mask = _at(image, f, c, rows, columns, C)
    return (
        tl.load(quads + offset, mask=mask, other=0.0).to(tl.float32),
        tl.load(quads + offset + cs, mask=mask, other=0.0).to(tl.float32),
        tl.load(quads + offset + sc, mask=mask, other=0.0).to(tl.float32),
        tl.load(quads + offset + sc + cs, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _store(quads, v_cc, v_cs, v_sc, v_ss, image, f, c, rows, columns, C: tl.constexpr):
    """Write the quads (f, c) where they exist."""
    offset, cs, sc, mask = _at(image, f, c, rows, columns, C)
    dtype = quads.dtype.element_ty
    tl.store(quads + offset, v_cc.to(dtype), mask=mask)
    tl.store(quads + offset + cs, v_cs.to(dtype), mask=mask)
    tl.store(quads + offset + sc, v_sc.to(dtype), mask=mask)
    tl.store(quads + offset + sc + cs, v_ss.to(dtype), mask=mask)
