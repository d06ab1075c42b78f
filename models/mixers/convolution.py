"""Separable convolution as a mixer (MetaFormer baselines, arXiv:2210.13452, Sec. 2.2)."""

from torch import Tensor, nn

from ..layers.activations import StarReLU, made_inplace
from ..layers.checks import hidden_width
from ..layers.depthwise import DepthwiseConv2d
from ..layers.eager import in_pieces_if_idle
from ..layers.linear import Linear
from .registry import register_mixer


@register_mixer("sepconv")
class SepConv(nn.Module):
    """Linear, activation, depth-wise convolution, Linear; no biases. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 7,
        expansion: float = 2.0,
        act: type[nn.Module] = StarReLU,
        drop: float = 0.0,
    ):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(
                f"kernel_size={kernel_size} must be positive and odd, to keep the map's size"
            )
        self.hidden = hidden = hidden_width(dim, expansion, "expansion")
        self.pwconv1 = Linear(dim, hidden, bias=False)
        self.act1 = made_inplace(act())
        self.dwconv = DepthwiseConv2d(hidden, kernel_size, bias=False)
        self.pwconv2 = Linear(hidden, dim, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.shape[1] * x.shape[2]
        values = positions * self.hidden
        return in_pieces_if_idle(self, self.mix, x, values, positions)

    def mix(self, x: Tensor) -> Tensor:
        """`forward` for all images at once."""
        x = self.act1(self.pwconv1(x))
        # The permuted view is a channels_last map, which the convolution takes and gives without a copy.
        x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.pwconv2(x))
