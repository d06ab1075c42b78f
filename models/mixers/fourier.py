"""Mixers in the Fourier domain: dynamic filter, global filter, AFNO.

Papers:  DFFormer, arXiv:2303.03932, Sec. 3; GFNet, arXiv:2107.00645; AFNO, arXiv:2111.13587
Shapes:  B batch, H/W map, C width, M = expansion * C, K filters of a bank, F = W//2 + 1
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..layers.activations import StarReLU, made_inplace
from ..layers.checks import hidden_width
from ..layers.eager import in_pieces_if_idle
from ..layers.fourier import fourier_filter, spectral_mlp
from ..layers.linear import Linear
from ..layers.mlp import Mlp
from ..layers.quads import quad_table
from ..layers.resize import resize_complex_filter
from ..layers.table_cache import TableCache
from .registry import register_mixer


class _SpectralMixer(nn.Module):
    """Linear C -> M, activation, something in the Fourier domain, Linear M -> C; no biases.

    Attributes:
        fourier: "auto", "fft" or "matmul", see `layers/fourier.py`.
    """

    fourier = "auto"

    def __init__(self, dim: int, act: type[nn.Module], drop: float, expansion: float):
        super().__init__()
        self.hidden_dim = hidden_width(dim, expansion, "expansion")
        self.pwconv1 = Linear(dim, self.hidden_dim, bias=False)
        self.act1 = made_inplace(act())
        self.pwconv2 = Linear(self.hidden_dim, dim, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.shape[1] * x.shape[2]
        return in_pieces_if_idle(self, self.mix, x, positions * self.hidden_dim, positions)

    def mix(self, x: Tensor) -> Tensor:
        """`forward` for all images at once."""
        y = self.spectral(self.act1(self.pwconv1(x)), x)
        return self.drop(self.pwconv2(y.to(x.dtype)))

    def spectral(self, y: Tensor, x: Tensor) -> Tensor:
        """Expanded map (B, H, W, M) and mixer input (B, H, W, C) -> (B, H, W, M)."""
        raise NotImplementedError


class _FilterMixer(_SpectralMixer):
    """A spectral mixer whose filters are tables over the frequencies of the native grid."""

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        num_filters: int | None,
        act: type[nn.Module],
        drop: float,
        expansion: float,
    ):
        super().__init__(dim, act, drop, expansion)
        shape = (grid[0], grid[1] // 2 + 1, num_filters or self.hidden_dim, 2)
        self.complex_weights = nn.Parameter(torch.randn(shape) * 0.02)
        self._resized = TableCache()

    def filters(self, y: Tensor) -> Tensor:
        """The table at the size of the map `y` (B, H, W, M): (H, W//2 + 1, filters, 2)."""
        size = (y.shape[1], y.shape[2] // 2 + 1)
        if size == tuple(self.complex_weights.shape[:2]):
            return self.complex_weights
        resize = partial(resize_complex_filter, new=size)
        return self._resized.get("complex_weights", self.complex_weights, size, resize)

    def filtered(self, y: Tensor, routing: Tensor | None = None) -> Tensor:
        """The map (B, H, W, M) through the filters, with their bank weighted by `routing` (B, K, M)."""

        filters = self.filters(y)

        def table() -> Tensor:
            size = (filters.shape[0], filters.shape[1])
            weights = self.complex_weights
            return self._resized.get("quads", weights, size, lambda _: quad_table(filters))

        return fourier_filter(y, filters, routing, self.fourier, table)

    def train(self, mode: bool = True) -> "_FilterMixer":
        self._resized.clear()
        return super().train(mode)

    def token_map(self) -> Tensor:
        """Amplitudes of the native half spectra, (filters, H, W//2 + 1), frequency 0 first."""
        return self.complex_weights.detach().norm(dim=-1).permute(2, 0, 1)


@register_mixer("dynamic_filter")
class DynamicFilter(_FilterMixer):
    """Each image and channel has its own mean of K learned filters, weighted by an MLP on the pooled input.

    Args:
        num_filters: size K of the bank.
        reweight_ratio: hidden width of the routing MLP / C.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: tuple[int, int],
        num_filters: int = 4,
        reweight_ratio: float = 0.25,
        expansion: float = 2.0,
        act: type[nn.Module] = StarReLU,
        drop: float = 0.0,
    ):
        if num_filters < 1:
            raise ValueError(f"num_filters={num_filters} must be at least 1")
        super().__init__(dim, grid, num_filters, act, drop, expansion)
        hidden_width(dim, reweight_ratio, "reweight_ratio")
        # StarReLU whatever `act` is: the published ablations of the activation keep it here.
        self.reweight = Mlp(
            dim, reweight_ratio, act=StarReLU, bias=False, out_dim=num_filters * self.hidden_dim
        )

    def spectral(self, y: Tensor, x: Tensor) -> Tensor:
        routing = self.reweight(x.mean(dim=(1, 2))).unflatten(1, (-1, self.hidden_dim))
        return self.filtered(y, routing.softmax(dim=1))


@register_mixer("global_filter")
class GlobalFilter(_FilterMixer):
    """One learned filter per channel."""

    def __init__(
        self,
        dim: int,
        *,
        grid: tuple[int, int],
        expansion: float = 2.0,
        act: type[nn.Module] = StarReLU,
        drop: float = 0.0,
    ):
        super().__init__(dim, grid, None, act, drop, expansion)

    def spectral(self, y: Tensor, x: Tensor) -> Tensor:
        return self.filtered(y)


@register_mixer("afno")
class AFNO(_SpectralMixer):
    """A complex block-diagonal MLP shared by all frequencies, so it has no table and fits any size.

    Args:
        num_blocks: blocks of the MLP's weights.
        shrink: threshold of the soft shrinkage that makes the spectrum sparse.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_blocks: int = 8,
        shrink: float = 0.01,
        expansion: float = 2.0,
        act: type[nn.Module] = StarReLU,
        drop: float = 0.0,
    ):
        super().__init__(dim, act, drop, expansion)
        if num_blocks < 1 or self.hidden_dim % num_blocks:
            raise ValueError(
                f"num_blocks={num_blocks} must be a positive divisor of the width {self.hidden_dim} "
                f"(= expansion * {dim})"
            )
        if shrink < 0:
            raise ValueError(f"shrink={shrink} must be 0 or more; 0 shrinks nothing")
        self.shrink = shrink
        width = self.hidden_dim // num_blocks
        self.w1 = nn.Parameter(torch.randn(2, num_blocks, width, width) * 0.02)
        self.b1 = nn.Parameter(torch.randn(2, num_blocks, width) * 0.02)
        self.w2 = nn.Parameter(torch.randn(2, num_blocks, width, width) * 0.02)
        self.b2 = nn.Parameter(torch.randn(2, num_blocks, width) * 0.02)

    def spectral(self, y: Tensor, x: Tensor) -> Tensor:
        layers = [(self.w1, self.b1), (self.w2, self.b2)]
        return y + spectral_mlp(y, layers, self.shrink, self.fourier)
