"""Separable convolution as a mixer (MetaFormer baselines, arXiv:2210.13452, Sec. 2.2)."""

from torch import Tensor, nn

from ..layers.activations import StarReLU
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
        if kernel_size % 2 == 0:
            raise ValueError(
                f"sepconv: kernel_size must be odd to keep the size, got {kernel_size}"
            )
        hidden = int(expansion * dim)
        self.pwconv1 = nn.Linear(dim, hidden, bias=False)
        self.act1 = act()
        self.dwconv = nn.Conv2d(
            hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=False
        )
        self.pwconv2 = nn.Linear(hidden, dim, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.pwconv1(x))
        # The permuted view is a channels_last map, which the convolution takes and gives without a copy.
        x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.pwconv2(x))
