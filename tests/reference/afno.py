"""The adaptive Fourier neural operator, frequency by frequency and block by block."""

import torch
from torch import Tensor

from tests.reference.fourier_filter import from_half_spectrum, spectrum, star_relu


def softshrink(x: Tensor, threshold: float) -> Tensor:
    return torch.sign(x) * torch.clamp(x.abs() - threshold, min=0)


def afno(state: dict[str, Tensor], x: Tensor, shrink: float = 0.01) -> Tensor:
    """The mixer on (B, H, W, C) with the parameters `state` by their published names."""
    y = star_relu(x @ state["pwconv1.weight"].t(), state, "act1.")
    w1, b1, w2, b2 = (torch.complex(*state[name]) for name in ("w1", "b1", "w2", "b2"))
    height, width = x.shape[1:3]
    coefficients = {}
    for kh in range(height):
        for kw in range(width // 2 + 1):
            blocks = []
            for n, part in enumerate(spectrum(y, kh, kw).chunk(len(w1), dim=1)):
                hidden = part @ w1[n] + b1[n]
                hidden = torch.complex(torch.relu(hidden.real), torch.relu(hidden.imag))
                out = hidden @ w2[n] + b2[n]
                out = torch.complex(softshrink(out.real, shrink), softshrink(out.imag, shrink))
                blocks.append(out)
            coefficients[kh, kw] = torch.cat(blocks, 1)
    return (y + from_half_spectrum(coefficients, height, width)) @ state["pwconv2.weight"].t()
