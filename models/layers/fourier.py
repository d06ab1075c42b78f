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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import without_autocast

FOURIER_WAYS = ("fft", "matmul")

_BASES: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def fourier_filter(
    x: Tensor, filters: Tensor, routing: Tensor | None = None, way: str = "fft"
) -> Tensor:
    """Multiply the spectrum of each channel by a complex filter.

    Args:
        x: (B, H, W, C); computed in float32 at least, also under autocast.
        filters: (H, W//2 + 1, C, 2), real and imaginary parts; with `routing` a bank (H, W//2 + 1, K, 2).
        routing: (B, K, C), each channel's filter is the bank weighted by it.
        way: one of `FOURIER_WAYS`.

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
        x, filters = x.to(dtype), filters.to(dtype)
        routing = None if routing is None else routing.to(dtype)
        apply = _filter_by_fft if way == "fft" else _filter_by_matmul
        return apply(x, filters, routing)


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
    """Let every Fourier mixer of `model` compute by "fft" or by "matmul" (the one that ONNX can express)."""
    _check_way(way)
    for module in model.modules():
        if hasattr(module, "fourier"):
            module.fourier = way


def _check_way(way: str) -> None:
    if way not in FOURIER_WAYS:
        raise ValueError(f"fourier='{way}' is unknown; choose one of {FOURIER_WAYS}")


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
    x = torch.fft.irfft2(spectrum * planes, s=size, norm="ortho")
    return x.permute(0, 2, 3, 1).contiguous()  # B H W C


# -- by real matrix products ---------------------------------------------------------------------


def _filter_by_matmul(x: Tensor, filters: Tensor, routing: Tensor | None) -> Tensor:
    size = (x.shape[1], x.shape[2])
    quads = _quads(x)
    s1, s2, d1, d2 = _quad_filters(filters, routing)
    (cc, cs), (sc, ss) = (row.unbind(2) for row in quads.unbind(1))
    cosine = [s1 * cc - d1 * ss + d2 * sc + s2 * cs, s1 * cs - s2 * cc + d2 * ss + d1 * sc]
    sine = [s1 * sc - d2 * cc + s2 * ss + d1 * cs, s1 * ss - d1 * cc - s2 * sc - d2 * cs]
    return _from_quads(torch.stack([torch.stack(cosine, 2), torch.stack(sine, 2)], 1), size)


def _quad_filters(filters: Tensor, routing: Tensor | None) -> tuple[Tensor, ...]:
    """Filters -> S1, S2 (real and imaginary half sum of the rows +-kh) and D1, D2 (half difference)."""
    height = filters.shape[0]
    plus = filters[: height // 2 + 1]
    minus = torch.cat([filters[:1], filters[1:].flip(0)])[: height // 2 + 1]  # rows -kh modulo H
    parts = torch.cat([plus + minus, plus - minus], dim=-1).mul(0.5)  # h F K 4
    if routing is None:
        return parts.unbind(-1)
    # Linear in the routing, so one small product per image replaces the complex filter of each channel.
    matrix = parts.permute(3, 0, 1, 2).flatten(0, 2)  # 4 * h * F, K
    # bmm, because `@` would fold the batch and return channels with a stride.
    filters = torch.bmm(matrix.expand(routing.shape[0], -1, -1), routing)
    return filters.unflatten(1, (4, *parts.shape[:2])).unbind(1)


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
    rows, columns = (_multiplicity(n).sqrt() for n in size)
    return (rows[:, None] * columns)[..., None, None].to(like)


def _multiplicity(n: int) -> Tensor:
    """How many of the n frequencies each of 0..n//2 stands for: 2, but 1 for 0 and (n even) n/2."""
    count = torch.full((n // 2 + 1,), 2.0, dtype=torch.float64, device="cpu")
    count[0] = 1.0
    if n % 2 == 0:
        count[-1] = 1.0
    return count


def _dft_basis(like: Tensor, n: int) -> Tensor:
    """(2 * (n//2 + 1), n): rows of cosines, then of sines, orthonormal, in the type of `like`."""
    key = (n, like.dtype, like.device)
    if key in _BASES:
        return _BASES[key]
    if torch.compiler.is_compiling():  # nothing is kept, and exporters cannot save the contexts
        return _make_dft_basis(*key)
    # An inference tensor in the table could not be used by a later training step.
    with torch.inference_mode(False), torch.no_grad():
        basis = _make_dft_basis(*key)
    if type(basis) is torch.Tensor:
        if len(_BASES) >= 256:
            _BASES.clear()  # many sizes come by in detection; the tables are cheap to make again
        _BASES[key] = basis
    return basis


def _make_dft_basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    steps = torch.arange(n, device="cpu")
    # Integer phases modulo n keep the angles, and so the float32 table, exact to the last bit.
    angle = (steps[: n // 2 + 1, None] * steps % n).double() * (2 * math.pi / n)
    scale = (_multiplicity(n) / n).sqrt()[:, None]
    return torch.cat([angle.cos() * scale, angle.sin() * scale]).to(dtype=dtype, device=device)
