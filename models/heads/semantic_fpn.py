"""Semantic FPN: the levels of a feature pyramid, each brought to stride 4 by convolutions, and summed.

Paper:      arXiv:1901.02446, Sec. 3.1 and Fig. 3
Deviations: batch norm for group norm, no convolution between sum and classifier but dropout, as the models on
            ADE20K of PVT, PoolFormer and DFFormer have it (mmsegmentation's FPNHead)
"""

from torch import Tensor, nn

from .fpn import FeaturePyramid
from .pixels import PixelHead, conv_norm_act, resized
from .registry import register_head


@register_head("semantic_fpn", task="segmentation")
class SemanticFPN(PixelHead):
    """Logits have the size of the first map.

    Args:
        features: channels and stride of each map; a stride is twice the one before.
        fpn_channels: of all levels of the pyramid.
        channels: of what is summed.
    """

    def __init__(
        self,
        features: list[dict[str, int]],
        num_classes: int,
        *,
        fpn_channels: int = 256,
        channels: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        self.fpn = FeaturePyramid([info["channels"] for info in features], fpn_channels)
        # As many convolutions as doublings to the first level, which has one itself.
        self.chains = nn.ModuleList(
            nn.ModuleList(
                conv_norm_act(channels if step else fpn_channels, channels)
                for step in range(max(level, 1))
            )
            for level in range(len(features))
        )

    def features(self, maps: list[Tensor]) -> Tensor:
        maps = self.fpn(maps)
        return sum(self._to_first_level(maps, level) for level in range(len(maps)))

    def _to_first_level(self, maps: list[Tensor], level: int) -> Tensor:
        """(B, fpn_channels, h_l, w_l) -> (B, channels, h_0, w_0)."""
        x = maps[level]
        for step, block in enumerate(self.chains[level], start=1):
            # To the next finer level: twice the size, but for sides that are not multiples of the strides.
            x = resized(block(x), maps[max(level - step, 0)].shape[-2:])
        return x
