"""Filters in the Fourier domain frequency by frequency, and the mixers made of them, written out."""

import math

import torch
from torch import Tensor


def spectrum(x: Tensor, kh: int, kw: int) -> Tensor:
    """One orthonormal Fourier coefficient of each channel of (B, H, W, C): complex (B, C)."""
    height, width = x.shape[1:3]
    wave = torch.exp(-1j * phase(height, width, kh, kw))
    return (x * wave[None, :, :, None]).sum((1, 2)) / math.sqrt(height * width)


def phase(height: int, width: int, kh: int, kw: int) -> Tensor:
    """(H, W) angle of the plane wave (kh, kw)."""
    y, x = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    return 2 * math.pi * (kh * y[:, None] / height + kw * x / width)


def from_half_spectrum(
    coefficients: dict[tuple[int, int], Tensor], height: int, width: int
) -> Tensor:
    """Inverse of `spectrum` from the columns 0..W//2: along H first, then the real map along W."""
    out = 0
    for kw in range(width // 2 + 1):
        column = 0  # B H C
        for kh in range(height):
            wave = torch.exp(1j * phase(height, 1, kh, 0))[:, 0]
            column = column + coefficients[kh, kw][:, None] * wave[None, :, None]
        if kw == 0 or 2 * kw == width:
            column = column.real + 0j  # a real signal has no imaginary part here
        wave = torch.exp(1j * phase(1, width, 0, kw))[0]
        share = 1 if kw == 0 or 2 * kw == width else 2  # the mirror column that is not stored
        out = out + share * (column[:, :, None] * wave[None, None, :, None]).real
    return out / math.sqrt(height * width)


def filtered(x: Tensor, filters: Tensor, routing: Tensor | None = None) -> Tensor:
    """(B, H, W, C) by complex filters (H, F, C), or by a bank (H, F, K) and routing (B, K, C)."""
    height, width = x.shape[1:3]
    coefficients = {}
    for kh in range(height):
        for kw in range(width // 2 + 1):
            weight = filters[kh, kw]
            if routing is not None:
                weight = sum(weight[k] * routing[:, k] for k in range(len(weight)))
            coefficients[kh, kw] = spectrum(x, kh, kw) * weight
    return from_half_spectrum(coefficients, height, width)


def star_relu(x: Tensor, state: dict[str, Tensor], prefix: str) -> Tensor:
    return state[prefix + "scale"] * torch.relu(x) ** 2 + state[prefix + "bias"]


def dynamic_filter(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """DFFormer's mixer on (B, H, W, C) with the parameters `state` by their published names."""
    filters = torch.view_as_complex(state["complex_weights"])
    num_filters = filters.shape[-1]
    hidden = x.mean((1, 2)) @ state["reweight.fc1.weight"].t()
    hidden = star_relu(hidden, state, "reweight.act.") @ state["reweight.fc2.weight"].t()
    width = hidden.shape[1] // num_filters
    logits = torch.stack([hidden[:, k * width : (k + 1) * width] for k in range(num_filters)], 1)
    routing = logits.exp() / logits.exp().sum(1, keepdim=True)
    y = star_relu(x @ state["pwconv1.weight"].t(), state, "act1.")
    return filtered(y, filters, routing) @ state["pwconv2.weight"].t()


def global_filter(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """GFFormer's mixer on (B, H, W, C)."""
    y = star_relu(x @ state["pwconv1.weight"].t(), state, "act1.")
    y = filtered(y, torch.view_as_complex(state["complex_weights"]))
    return y @ state["pwconv2.weight"].t()
