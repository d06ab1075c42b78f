"""Simple feature pyramid: a plain ViT's one map, brought to several strides without a top-down path.

Paper:      arXiv:2203.16527, Sec. 3 and Appendix A.2 (ViTDet): the finer maps by transposed convolutions
            with a layer norm and GELU between two of them, the coarser ones by max pooling
Deviations: the 1x1 and 3x3 convolutions that bring all maps to 256 channels are the heads' own (their FPN).
"""

import math
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn


class SimplePyramid(nn.Module):
    """One map -> maps of the strides asked for; each halving of the stride halves the width.

    Args:
        channels: width of the map.
        stride: of the map, in pixels of the image.
        strides: of the maps wanted; each is `stride` times a power of two, above or below one.

    Attributes:
        features: one `dict(channels, stride)` per map, as `Backbone.feature_info`.
    """

    def __init__(self, channels: int, stride: int, strides: Sequence[int] = (4, 8, 16, 32)) -> None:
        super().__init__()
        self.features = []
        self.branches = nn.ModuleList()
        for wanted in strides:
            steps = round(math.log2(stride / wanted))  # how often the resolution doubles
            if wanted * 2.0**steps != stride:
                raise ValueError(
                    f"a map of stride {stride} cannot be brought to stride {wanted}: not a power of two apart"
                )
            width = max(1, channels >> max(0, steps))
            self.branches.append(_branch(channels, steps))
            self.features.append(dict(channels=width, stride=wanted))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, channels, h, w) -> one (B, C_i, h * stride / s_i, w * stride / s_i) per entry of `features`.

        Coarser maps are rounded up.
        """
        return [branch(x) for branch in self.branches]


def _branch(channels: int, steps: int) -> nn.Sequential:
    """Doubles the resolution `steps` times, or halves it if that is negative."""
    layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-steps)]
    for step in range(steps):
        if step:
            layers += [LayerNorm2d(channels), nn.GELU()]
        width = max(1, channels // 2)
        layers.append(nn.ConvTranspose2d(channels, width, 2, 2))
        channels = width
    return nn.Sequential(*layers)
