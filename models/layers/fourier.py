"""Filtering of maps in the Fourier domain, by the FFT or by real matrix products.

Both ways compute irfft2(rfft2(x) * filter), orthonormal, over the two spatial axes of (B, H, W, C)
maps. The product with a free filter is not the half spectrum of a real map; like `torch.fft.irfft2`
we ignore the imaginary parts that it leaves in the columns 0 and (W even) W/2.

The real way is in `quads.py`: no complex numbers and no FFT library, which compilers and ONNX take.

Shapes: B batch, H/W map, C channels, K filters of a bank, F = W//2 + 1;
        half spectra are (H, F)
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import is_captured, is_eager
from .precision import without_autocast
from .quads import filter_by_quads, from_real_spectrum, quad_table, real_spectrum

FOURIER_WAYS = ("auto", "fft", "matmul")

# Height + width of maps: up to the first, products are always fast enough that nothing is measured; up to the
# second they are the way where nothing may be measured.
_SMALL, _LARGE = 64, 200

_CHOICES: dict[tuple[Any, ...], str] = {}


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

        def filtered(chosen: str) -> Tensor:
            if chosen == "fft":
                return _filter_by_fft(x, filters.to(dtype), routing)
            numbers = quad_table(filters) if table is None else table()
            return filter_by_quads(x, numbers.to(dtype), routing)

        return filtered(_choose(x, filtered) if way == "auto" else way)


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
            y = real_spectrum(x)
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
            return from_real_spectrum(y, size)
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
        if is_captured(x):
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
