"""Maps as quads: the real DFT along both axes by matrix products, and complex filters as real numbers.

With cosine and sine rows of the DFT along each axis a map becomes four quarter spectra, the quads cc, cs, sc,
ss (first letter: along H). X(+-kh, kw) = cc -+ ss - i (+-sc + cs), so multiplying by a complex filter and
going back to a real map is a real 4x4 matrix per pair of frequencies. It needs no complex numbers and no FFT
library: compilers and ONNX take it. With S1, S2, D1 and D2 of `quad_table` it is

    cc' =  S1 cc + S2 cs + D2 sc - D1 ss      sc' = -D2 cc + D1 cs + S1 sc + S2 ss
    cs' = -S2 cc + S1 cs + D1 sc + D2 ss      ss' = -D1 cc - D2 cs - S2 sc + S1 ss

in `filter_quads`, in `_multiply` in place, in `_gradient_of_filters` by its entries, and in the kernels.

Shapes: B batch, H/W map, C channels, K filters of a bank, h = H//2 + 1, F = W//2 + 1;
        half spectra are (H, F), quads (h, F)
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .eager import eager_on_cpu, piece
from .table_cache import Constants

_TABLES = Constants(limit=256)


def quad_table(filters: Tensor) -> Tensor:
    """Filters (H, F, K, 2) -> (4, h, F, K): S1, S2, D1, D2.

    S1 and S2 are the real and the imaginary half sum of the filters at +kh and -kh, D1 and D2 the half
    differences.
    """
    half = filters.shape[0] // 2 + 1
    filters = filters.to(torch.promote_types(filters.dtype, torch.float32))
    plus = filters[:half]
    minus = torch.cat([filters[:1], filters[1:].flip(0)])[:half]  # rows -kh modulo H
    return torch.cat([plus + minus, plus - minus], dim=-1).mul(0.5).permute(3, 0, 1, 2).contiguous()


def filter_by_quads(x: Tensor, table: Tensor, routing: Tensor | None) -> Tensor:
    """Maps (B, H, W, C) filtered by `table` (4, h, F, K) of `quad_table`, with `routing` (B, K, C) a bank.

    Eager on a CPU a few images at a time, so that their quads stay in the caches.
    """
    if not eager_on_cpu(x, table, routing):
        return from_quads(filter_quads(to_quads(x), table, routing), (x.shape[1], x.shape[2]))
    inputs = (x, table) if routing is None else (x, table, routing)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _FilterOnCpu.apply(x, table, routing)
    return _filter_pieces(x, table, routing)


def filter_quads(quads: Tensor, table: Tensor, routing: Tensor | None) -> Tensor:
    """Quads (B, 2, h, 2, F, C) of maps -> those of the filtered maps."""
    if kernels.available(quads):
        return kernels.filter_quads(quads, table, routing)
    s1, s2, d1, d2 = _weighted(table, routing).unbind(1)
    (cc, cs), (sc, ss) = (row.unbind(2) for row in quads.unbind(1))
    cosine = [s1 * cc - d1 * ss + d2 * sc + s2 * cs, s1 * cs - s2 * cc + d2 * ss + d1 * sc]
    sine = [s1 * sc - d2 * cc + s2 * ss + d1 * cs, s1 * ss - d1 * cc - s2 * sc - d2 * cs]
    return torch.stack([torch.stack(cosine, 2), torch.stack(sine, 2)], 1)


def _weighted(table: Tensor, routing: Tensor | None) -> Tensor:
    """Table (4, h, F, K), routing (B, K, C) -> (B, 4, h, F, C); without one (1, 4, h, F, K)."""
    if routing is None:
        return table[None]
    # Linear in the routing, so one small product per image replaces the complex filter of each channel.
    matrix = table.flatten(0, 2)  # 4 * h * F, K
    # bmm, because `@` would fold the batch and return channels with a stride.
    filters = torch.bmm(matrix.expand(routing.shape[0], -1, -1), routing)
    return filters.unflatten(1, table.shape[:3])


def _filter_pieces(
    x: Tensor, table: Tensor, routing: Tensor | None, keep: Tensor | None = None
) -> Tensor:
    """`filter_by_quads` without gradients, a few images at a time; their quads go to `keep`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part in _image_pieces(x):
        quads = to_quads(x[part])
        if keep is not None:
            keep[part] = quads
        filters = _weighted(table, None if routing is None else routing[part])
        out[part] = from_quads(_multiply(quads, filters), (x.shape[1], x.shape[2]))
    return out


def _image_pieces(x: Tensor) -> Iterator[slice]:
    """Slices of the batch of (B, H, W, C) that stay in the caches."""
    length = piece(x.shape[1:].numel())
    return (slice(start, start + length) for start in range(0, len(x), length))


def _multiply(quads: Tensor, filters: Tensor, transposed: bool = False) -> Tensor:
    """Quads times the 4 x 4 matrices of the filters (B or 1, 4, h, F, C), or times their transposes.

    S2 and D2 change their signs when transposed. `to_cc` and the others are views of the result.
    """
    s1, s2, d1, d2 = filters.unbind(1)
    sign = -1 if transposed else 1
    out = quads * s1[:, None, :, None]
    (cc, cs), (sc, ss) = (row.unbind(2) for row in quads.unbind(1))
    (to_cc, to_cs), (to_sc, to_ss) = (row.unbind(2) for row in out.unbind(1))
    # Cosines and sines of one axis at once.
    out[:, :, :, 0].addcmul_(s2[:, None], quads[:, :, :, 1], value=sign)
    out[:, :, :, 1].addcmul_(s2[:, None], quads[:, :, :, 0], value=-sign)
    out[:, 0].addcmul_(d2[:, :, None], quads[:, 1], value=sign)
    out[:, 1].addcmul_(d2[:, :, None], quads[:, 0], value=-sign)
    to_cc.addcmul_(d1, ss, value=-1)
    to_cs.addcmul_(d1, sc)
    to_sc.addcmul_(d1, cs)
    to_ss.addcmul_(d1, cc, value=-1)
    return out


class _FilterOnCpu(torch.autograd.Function):
    """Keeps the quads and makes the filters again: they are larger than the maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, routing: Tensor | None) -> Tensor:
        shape = (len(x), 2, table.shape[1], 2, table.shape[2], x.shape[3])
        quads = x.new_empty(shape)
        ctx.save_for_backward(quads, table, routing)
        return _filter_pieces(x, table, routing, keep=quads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        quads, table, routing = ctx.saved_tensors
        grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        grad_table = torch.zeros_like(table)
        grad_routing = None if routing is None else torch.empty_like(routing)
        for part in _image_pieces(grad):
            weights = None if routing is None else routing[part]
            grad_quads = to_quads(grad[part])
            of_filters = _gradient_of_filters(grad_quads, quads[part])
            grad_quads = _multiply(grad_quads, _weighted(table, weights), transposed=True)
            grad_x[part] = from_quads(grad_quads, (grad.shape[1], grad.shape[2]))
            if weights is None:
                grad_table += of_filters.sum(0)
                continue
            of_filters = of_filters.flatten(1, 3)  # B, 4 * h * F, C
            of_table = torch.bmm(of_filters, weights.transpose(1, 2)).sum(0)
            grad_table += of_table.view_as(table)
            matrix = table.flatten(0, 2).t().expand(len(weights), -1, -1)
            grad_routing[part] = torch.bmm(matrix, of_filters)
        return grad_x, grad_table, grad_routing


def _gradient_of_filters(grad: Tensor, quads: Tensor) -> Tensor:
    """Gradient of the filtered quads, quads -> gradient of S1, S2, D1, D2 (B, 4, h, F, C)."""
    (cc, cs), (sc, ss) = (row.unbind(2) for row in quads.unbind(1))
    (g_cc, g_cs), (g_sc, g_ss) = (row.unbind(2) for row in grad.unbind(1))
    out = quads.new_empty(len(quads), 4, *cc.shape[1:])
    s1, s2, d1, d2 = out.unbind(1)
    torch.mul(g_cc, cc, out=s1).addcmul_(g_cs, cs).addcmul_(g_sc, sc).addcmul_(g_ss, ss)
    torch.mul(g_cc, cs, out=s2).addcmul_(g_sc, ss)
    s2.addcmul_(g_cs, cc, value=-1).addcmul_(g_ss, sc, value=-1)
    torch.mul(g_cs, sc, out=d1).addcmul_(g_sc, cs)
    d1.addcmul_(g_cc, ss, value=-1).addcmul_(g_ss, cc, value=-1)
    torch.mul(g_cc, sc, out=d2).addcmul_(g_cs, ss)
    d2.addcmul_(g_sc, cc, value=-1).addcmul_(g_ss, cs, value=-1)
    return out


def to_quads(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, 2, h, 2, F, C): cosine and sine along H, then along W, orthonormal."""
    rows, columns = (_dft_basis(x, n) for n in x.shape[1:3])
    y = (rows @ x.flatten(2)).unflatten(2, x.shape[2:])  # B 2h W C
    return (columns @ y).unflatten(2, (2, -1)).unflatten(1, (2, -1))


def from_quads(quads: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `to_quads`: its transpose, which also drops what sits in the zero rows of the basis."""
    rows, columns = (_dft_basis(quads, n) for n in size)
    y = rows.t() @ quads.flatten(1, 2).flatten(2)  # B H 2F*C
    return columns.t() @ y.unflatten(2, (columns.shape[0], -1))


def real_spectrum(x: Tensor) -> Tensor:
    """(B, H, W, C) -> orthonormal (B, 2, h, F, 2, C): rows +kh and -kh, ..., real and imaginary part."""
    (cc, cs), (sc, ss) = (row.unbind(2) for row in to_quads(x).unbind(1))
    plus, minus = torch.stack([cc - ss, -(sc + cs)], 3), torch.stack([cc + ss, sc - cs], 3)
    return torch.stack([plus, minus], 1) / _pair_scale(x, x.shape[1:3])


def from_real_spectrum(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `real_spectrum`; like irfft2 it keeps the real map's part of a free spectrum."""
    plus, minus = (spectrum * (0.5 * _pair_scale(spectrum, size))).unbind(1)
    (ap, bp), (am, bm) = plus.unbind(3), minus.unbind(3)
    cosine, sine = torch.stack([ap + am, -(bp + bm)], 2), torch.stack([bm - bp, am - ap], 2)
    return from_quads(torch.stack([cosine, sine], 1), size)


def _pair_scale(like: Tensor, size: tuple[int, int]) -> Tensor:
    """Orthonormal rows of cosines hold sqrt(2) of a frequency that has a mirror image: (h, F, 1, 1)."""
    return _kept(_make_pair_scale, size, like)


def _dft_basis(like: Tensor, n: int) -> Tensor:
    """(2 * (n//2 + 1), n): rows of cosines, then of sines, orthonormal, in the type of `like`."""
    return _kept(_make_dft_basis, (n,), like)


def _kept(make: Callable[..., Tensor], lengths: tuple[int, ...], like: Tensor) -> Tensor:
    """`make(*lengths, device)` in the type and on the device of `like`, made once."""
    # In double precision, which not all accelerators have. A compiler makes the table in each pass: a
    # CPU's would be copied to the GPU each time.
    where = like.device if like.device.type == "cuda" else torch.device("cpu")
    key = (make, lengths, like.dtype, like.device)
    return _TABLES.get(key, lambda: make(*lengths, where).to(like.device, like.dtype))


def _make_pair_scale(height: int, width: int, device: torch.device) -> Tensor:
    rows, columns = (_multiplicity(n, device).sqrt() for n in (height, width))
    return (rows[:, None] * columns)[..., None, None]


def _make_dft_basis(n: int, device: torch.device) -> Tensor:
    steps = torch.arange(n, device=device)
    # Integer phases modulo n keep the angles, and so the float32 table, exact to the last bit.
    angle = (steps[: n // 2 + 1, None] * steps % n).double() * (2 * math.pi / n)
    scale = (_multiplicity(n, device) / n).sqrt()[:, None]
    return torch.cat([angle.cos() * scale, angle.sin() * scale])


def _multiplicity(n: int, device: torch.device) -> Tensor:
    """How many of the n frequencies each of 0..n//2 stands for: 2, but 1 for 0 and (n even) n/2."""
    k = torch.arange(n // 2 + 1, device=device)
    return 2.0 - ((k == 0) | (2 * k == n)).double()
