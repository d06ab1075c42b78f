"""The plainest head for segmentation: convolutions and a classifier on the coarsest map.

Paper:      arXiv:1411.4038 (FCN-32s); beside another head, on an earlier map: arXiv:1612.01105, Sec. 3.3
Deviations: one convolution of 3x3 before the classifier, as mmsegmentation's auxiliary heads have
"""

from itertools import pairwise

from torch import Tensor, nn

from .pixels import PixelHead, conv_norm_act
from .registry import register_head


@register_head("fcn", task="segmentation")
class FCNHead(PixelHead):
    """Reads the last map only; logits have its size.

    Args:
        features: channels and stride of each map.
        channels: of the convolutions.
        num_convs: of 3x3, each with batch norm and ReLU.
    """

    def __init__(
        self,
        features: list[dict[str, int]],
        num_classes: int,
        *,
        channels: int = 256,
        num_convs: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        if num_convs < 1:
            raise ValueError(f"num_convs={num_convs} must be at least 1")
        self.unused_maps = tuple(range(len(features) - 1))
        widths = [features[-1]["channels"]] + [channels] * num_convs
        self.convs = nn.Sequential(*(conv_norm_act(*pair) for pair in pairwise(widths)))

    def features(self, maps: list[Tensor]) -> Tensor:
        return self.convs(maps[-1])
