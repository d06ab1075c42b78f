"""Convolutional patch embedding of DHVT."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import GELU
from .batch_norm import BatchNorm2d
from .eager import channels_last, in_pieces_if_idle
from .plain import has_hooks, is_plain


class Affine(nn.Module):
    """x * alpha + beta per channel of a map (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # One channel would be repeated without a word.
        if not torch.jit.is_tracing() and x.shape[1] != self.alpha.shape[1]:
            raise ValueError(f"{x.shape[1]} channels, where {self.alpha.shape[1]} are expected")
        return torch.addcmul(self.beta, x, self.alpha)


class ConvStem(nn.Module):
    """Sequential overlapping patch embedding (SOPE): 3x3 stride-2 convolutions between two affine maps.

    DHVT, arXiv:2210.05958, Sec. 3.

    Shapes: (B, in_chans, H, W) -> (B, dim, ceil(H / patch_size), ceil(W / patch_size)).

    Args:
        dim: width of the tokens; each convolution before the last has half the width of the next.
        patch_size: a power of two, one convolution per factor of 2.
    """

    def __init__(self, dim: int, patch_size: int = 16, in_chans: int = 3):
        super().__init__()
        depth = patch_size.bit_length() - 1
        if depth < 1 or patch_size != 2**depth or dim % 2 ** (depth - 1):
            raise ValueError(
                f"patch_size={patch_size} with embed_dim={dim}: the stem halves the map per convolution, so "
                "patch_size must be a power of two (2, 4, 8, 16) and patch_size / 2 must divide embed_dim"
            )
        self.first_width = dim >> (depth - 1)
        widths = [in_chans, *(dim >> i for i in reversed(range(depth)))]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            conv = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, BatchNorm2d(width_out)), GELU()]
        self.pre_affine = Affine(in_chans)
        # The last convolution is linear, but the released patch-2 models activate their only one.
        self.proj = nn.Sequential(*(layers if depth == 1 else layers[:-1]))
        self.post_affine = Affine(dim)

    def forward(self, x: Tensor) -> Tensor:
        values = self.first_width * x.shape[2] * x.shape[3] // 4
        x = channels_last(x)
        return in_pieces_if_idle(self, self._layers, x, values)

    def _layers(self, x: Tensor) -> Tensor:
        if self._trains_plainly(x):
            (first, *others), *rest = self.proj
            x = self._affine_convolution(first, x)
            for layer in (*others, *rest):
                x = layer(x)
        else:
            x = self.proj(self.pre_affine(x))
        return self.post_affine(x)

    def _trains_plainly(self, x: Tensor) -> bool:
        """Whether nobody needs what lies between the affine map and the first convolution."""
        return (
            self.training
            and torch.is_grad_enabled()
            and not x.requires_grad
            and x.is_floating_point()
            and is_plain(self.proj[0][0], nn.Conv2d)
            and not has_hooks(self.pre_affine)
        )

    def _affine_convolution(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """conv(pre_affine(x)), with the affine map as part of the weights.

        Training then needs no gradient of the largest map there is. The offset is the weight of one more
        channel, of ones, since the border around the image is 0 and not the offset.
        """
        alpha, beta = self.pre_affine.alpha, self.pre_affine.beta
        weight = torch.cat([conv.weight * alpha, (conv.weight * beta).sum(1, keepdim=True)], dim=1)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = channels_last(x)
        return F.conv2d(x, weight, conv.bias, stride=conv.stride, padding=conv.padding)
