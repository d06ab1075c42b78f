"""Filtering of maps in the Fourier domain, by the FFT or by real matrix products.

Both ways compute irfft2(rfft2(x) * filter), orthonormal, over the two spatial axes of (B, H, W, C)
maps. The product with a free filter is not the half spectrum of a real map; like `torch.fft.irfft2`
we ignore the imaginary parts that it leaves in the columns 0 and (W even) W/2.

The real way: with cosine and sine rows of the DFT along each axis a map becomes four quarter spectra,
the quads cc, cs, sc, ss (first letter: along H). X(+-kh, kw) = cc -+ ss - i (+-sc + cs), so multiplying
by a complex filter and going back to a real map is a real 4x4 matrix per pair of frequencies. It needs
no complex numbers and no FFT library: compilers and ONNX take it.

Shapes: B batch, H/W map, C channels, K filters of a bank, h = H//2 + 1, F = W//2 + 1;
        half spectra are (H, F), quads (h, F)
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels
from .eager import eager_on_cpu, is_eager, piece
from .precision import without_autocast
from .table_cache import Constants

FOURIER_WAYS = ("auto", "fft", "matmul")

# Height + width of maps whose way is not measured, and up to which it is matrix products by default.
_SMALL, _LARGE = 64, 200

_CHOICES: dict[tuple[Any, ...], str] = {}
_TABLES = Constants(limit=256)


def fourier_filter(
    x: Tensor,
    filters: Tensor,
    routing: Tensor | None = None,
    way: str = "auto",
    table: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Multiply the spectrum of each channel by a complex filter.

    Args:
        x: (B, H, W, C); computed in float32 at least, also under autocast.
        filters: (H, W//2 + 1, C, 2), real and imaginary parts; with `routing` a bank (H, W//2 + 1, K, 2).
        routing: (B, K, C), each channel's filter is the bank weighted by it.
        way: one of `FOURIER_WAYS`.
        table: returns `quad_table(filters)`, where the caller keeps one.

    Returns:
        (B, H, W, C) in float32, or in float64 if `x` is.
    """
    _check_way(way)
    size = x.shape[1:3]
    half = (size[0], size[1] // 2 + 1)
    if filters.shape[:2] != half:
        raise ValueError(
            f"filters of size {tuple(filters.shape[:2])} do not fit the half spectrum {half} of a "
            f"{tuple(size)} map; resample them with resize_complex_filter"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Half-precision FFTs exist for powers of two only, and lose the small coefficients.
    with without_autocast(x):
        x = x.to(dtype)
        routing = None if routing is None else routing.to(dtype)

        def run(way: str) -> Tensor:
            if way == "fft":
                return _filter_by_fft(x, filters.to(dtype), routing)
            numbers = quad_table(filters) if table is None else table()
            return _filter_by_matmul(x, numbers.to(dtype), routing)

        return run(_choose(x, run) if way == "auto" else way)


def spectral_mlp(x: Tensor, layers: list[tuple[Tensor, Tensor]], shrink: float, way: str) -> Tensor:
    """Pass each frequency through a complex block-diagonal MLP with ReLU (AFNO, arXiv:2111.13587).

    Args:
        x: (B, H, W, C).
        layers: weight (2, blocks, C/blocks, C/blocks), last two as [in, out], and bias (2, blocks, C/blocks)
            of each layer; index 0 of the first axis is the real part.
        shrink: threshold of the soft shrinkage of the real and of the imaginary parts.

    Returns:
        (B, H, W, C) in float32, or in float64 if `x` is.
    """
    _check_way(way)
    size = (x.shape[1], x.shape[2])
    with without_autocast(x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        way = _way_by_size(x) if way == "auto" else way
        if way == "fft":
            # Part before channel makes one real block matrix out of each complex one.
            y = torch.view_as_real(torch.fft.rfft2(x, dim=(1, 2), norm="ortho")).transpose(-1, -2)
        else:
            y = _quads_to_spectrum(_quads(x), size)
        blocks = layers[0][0].shape[1]
        y = y.unflatten(-1, (blocks, -1)).transpose(-2, -3).flatten(-2)  # ... blocks, 2 * C/blocks
        for depth, (weight, bias) in enumerate(layers):
            real, imag = weight.to(x.dtype)
            matrix = torch.cat([torch.cat([real, imag], 2), torch.cat([-imag, real], 2)], 1)
            y = torch.einsum("...ni,nio->...no", y, matrix) + torch.cat(
                bias.to(x.dtype).unbind(), 1
            )
            y = F.softshrink(y, shrink) if depth == len(layers) - 1 else F.relu(y)
        y = y.unflatten(-1, (2, -1)).transpose(-2, -3).flatten(-2)  # ... 2 C
        if way == "matmul":
            return _from_quads(_spectrum_to_quads(y, size), size)
        y = torch.view_as_complex(y.transpose(-1, -2).contiguous())
        return torch.fft.irfft2(y, s=size, dim=(1, 2), norm="ortho")


def set_fourier_way(model: nn.Module, way: str) -> None:
    """Let every Fourier mixer of `model` compute in one of `FOURIER_WAYS`; ONNX can express "matmul"."""
    _check_way(way)
    for module in model.modules():
        if hasattr(module, "fourier"):
            module.fourier = way


def _check_way(way: str) -> None:
    if way not in FOURIER_WAYS:
        raise ValueError(f"fourier='{way}' is unknown; choose one of {FOURIER_WAYS}")


# -- the choice ----------------------------------------------------------------------------------


def _way_by_size(x: Tensor) -> str:
    """The faster way for a training step on two cores with float32: matrix products, unless they are large.

    Compilers and exporters get matrix products at any size, since few of them know complex numbers.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "matmul"
    return "matmul" if x.shape[1] + x.shape[2] <= _LARGE else "fft"


def _choose(x: Tensor, run: Callable[[str], Tensor]) -> str:
    """The way for maps like `x`: by their size where gradients are needed, else as measured once.

    Training must repeat itself to the last bit, so no clock may take part there.
    """
    way = _way_by_size(x)
    if (
        x.shape[1] + x.shape[2] <= _SMALL
        or torch.is_grad_enabled()
        or torch.are_deterministic_algorithms_enabled()
        or not (is_eager(x) and x.device.type in ("cpu", "cuda"))
    ):
        return way
    size = tuple(x.shape[1:3])
    key = (size, x[:, 0, 0].numel().bit_length(), x.dtype, x.device, torch.get_num_threads())
    if key not in _CHOICES:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return way
        _CHOICES[key] = _faster(way, x, run)
    return _CHOICES[key]


def _faster(way: str, x: Tensor, run: Callable[[str], Tensor]) -> str:
    """`way`, unless the other one takes clearly less time in the best of a few alternating runs."""
    seconds = dict.fromkeys(("fft", "matmul"), math.inf)
    for attempt in range(4):
        for candidate in seconds:
            start = _clock(x.device)
            run(candidate)
            if attempt:  # the first one makes plans and tables
                seconds[candidate] = min(seconds[candidate], _clock(x.device) - start)
    other = "fft" if way == "matmul" else "matmul"
    return other if seconds[other] < 0.9 * seconds[way] else way


def _clock(device: torch.device) -> float:
    """Seconds, when `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- by the FFT ----------------------------------------------------------------------------------


def _filter_by_fft(x: Tensor, filters: Tensor, routing: Tensor | None) -> Tensor:
    size = x.shape[1:3]
    # Planes are contiguous for the transform, and the bank's product with the routing comes out the same way.
    spectrum = torch.fft.rfft2(x.permute(0, 3, 1, 2).contiguous(), norm="ortho")  # B C H F
    if routing is None:
        planes = torch.view_as_complex(filters.contiguous()).permute(2, 0, 1)
    else:
        bank = filters.permute(2, 0, 1, 3).flatten(1)  # K, H * F * 2
        planes = (routing.transpose(1, 2) @ bank).unflatten(2, (*spectrum.shape[2:], 2))
        planes = torch.view_as_complex(planes)
    keeps = torch.is_grad_enabled() or torch.compiler.is_compiling()
    spectrum = spectrum * planes if keeps else spectrum.mul_(planes)
    x = torch.fft.irfft2(spectrum, s=size, norm="ortho")
    return x.permute(0, 2, 3, 1).contiguous()  # B H W C


# -- by real matrix products ---------------------------------------------------------------------


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


def _filter_by_matmul(x: Tensor, table: Tensor, routing: Tensor | None) -> Tensor:
    if not eager_on_cpu(x):
        return _from_quads(_filter_quads(_quads(x), table, routing), (x.shape[1], x.shape[2]))
    inputs = (x, table) if routing is None else (x, table, routing)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _FilterOnCpu.apply(x, table, routing)
    return _filter_pieces(x, table, routing)


def _filter_quads(quads: Tensor, table: Tensor, routing: Tensor | None) -> Tensor:
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
    """`_filter_by_matmul` without gradients, a few images at a time; their quads go to `keep`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part in _image_pieces(x):
        quads = _quads(x[part])
        if keep is not None:
            keep[part] = quads
        filters = _weighted(table, None if routing is None else routing[part])
        out[part] = _from_quads(_multiply(quads, filters), (x.shape[1], x.shape[2]))
    return out


def _image_pieces(x: Tensor) -> Iterator[slice]:
    """Slices of the batch of (B, H, W, C) that stay in the caches."""
    length = piece(x.shape[1:].numel())
    return (slice(start, start + length) for start in range(0, len(x), length))


def _multiply(quads: Tensor, filters: Tensor, transposed: bool = False) -> Tensor:
    """Quads times the 4 x 4 matrices of the filters (B or 1, 4, h, F, C), or times their transposes."""
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
            grad_quads = _quads(grad[part])
            of_filters = _gradient_of_filters(grad_quads, quads[part])
            grad_quads = _multiply(grad_quads, _weighted(table, weights), transposed=True)
            grad_x[part] = _from_quads(grad_quads, (grad.shape[1], grad.shape[2]))
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


def _quads(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, 2, h, 2, F, C): cosine and sine along H, then along W, orthonormal."""
    rows, columns = (_dft_basis(x, n) for n in x.shape[1:3])
    y = (rows @ x.flatten(2)).unflatten(2, x.shape[2:])  # B 2h W C
    return (columns @ y).unflatten(2, (2, -1)).unflatten(1, (2, -1))


def _from_quads(quads: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `_quads`: its transpose, which also drops what sits in the zero rows of the basis."""
    rows, columns = (_dft_basis(quads, n) for n in size)
    y = rows.t() @ quads.flatten(1, 2).flatten(2)  # B H 2F*C
    return columns.t() @ y.unflatten(2, (columns.shape[0], -1))


def _quads_to_spectrum(quads: Tensor, size: tuple[int, int]) -> Tensor:
    """Quads -> orthonormal spectrum (B, 2, h, F, 2, C): rows +kh and -kh, ..., real and imaginary part."""
    (cc, cs), (sc, ss) = (row.unbind(2) for row in quads.unbind(1))
    plus, minus = torch.stack([cc - ss, -(sc + cs)], 3), torch.stack([cc + ss, sc - cs], 3)
    return torch.stack([plus, minus], 1) / _pair_scale(quads, size)


def _spectrum_to_quads(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `_quads_to_spectrum`; like irfft2 it keeps the real map's part of a free spectrum."""
    plus, minus = (spectrum * (0.5 * _pair_scale(spectrum, size))).unbind(1)
    (ap, bp), (am, bm) = plus.unbind(3), minus.unbind(3)
    cosine, sine = torch.stack([ap + am, -(bp + bm)], 2), torch.stack([bm - bp, am - ap], 2)
    return torch.stack([cosine, sine], 1)


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
