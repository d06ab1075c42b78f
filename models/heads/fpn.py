"""Feature pyramid network: maps of one width, each with what the coarser ones know.

Paper:  arXiv:1612.03144, Sec. 3 (top-down path) and footnote 1 (the level below the last);
        arXiv:1708.02002, Sec. 4 (two more levels by convolutions)
Built on torchvision's `FeaturePyramidNetwork`. Like mmdet's `FPN`, which the published recipes used, and
unlike torchvision's detectors, weights start from Xavier's uniform distribution, and the two extra
convolutions have no ReLU in between and always read the last input (torchvision's `LastLevelP6P7` reads the
last output when the widths agree).
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from models.layers.precision import without_autocast

# Levels that each choice of `extra` adds.
EXTRA_LEVELS = {"none": 0, "pool": 1, "convs": 2}


class FeaturePyramid(FeaturePyramidNetwork):
    """Top-down path over maps of any widths, fine to coarse.

    Args:
        in_channels: width of each input map, fine to coarse.
        channels: width of all output maps.
        extra: "none"; "pool": one level more, every second position of the last output (R-CNN); "convs": two
            levels more, by stride-2 convolutions from the last input (RetinaNet).
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int = 256, extra: str = "none"
    ) -> None:
        if extra not in EXTRA_LEVELS:
            raise ValueError(
                f"extra={extra!r} of a feature pyramid must be one of {[*EXTRA_LEVELS]}"
            )
        in_channels = list(in_channels)
        blocks = None
        if extra == "pool":
            blocks = LastLevelMaxPool()
        elif extra == "convs":
            blocks = _ConvLevels(in_channels[-1], channels)
        super().__init__(in_channels, channels, blocks)
        self.num_extra = EXTRA_LEVELS[extra]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def strides(self, in_strides: Sequence[int]) -> list[int]:
        """Strides of the inputs -> strides of the outputs."""
        extra = [in_strides[-1] * 2 ** (i + 1) for i in range(self.num_extra)]
        return [*in_strides, *extra]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) per input -> one (B, channels, H_i, W_i) each, then the extra levels."""
        named = OrderedDict((str(i), x) for i, x in enumerate(maps))
        return list(super().forward(named).values())


class _ConvLevels(ExtraFPNBlock):
    """Two levels more, by 3x3 convolutions of stride 2: from the last input, and from the first of them."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels, 3, 2, 1)
        self.second = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        first = _convolved(self.first, x[-1])
        second = _convolved(self.second, first)
        return [*results, first, second], [*names, "first", "second"]


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """In the precision of its weights on a CPU.

    Of a map one pixel wide, PyTorch's bfloat16 gradient for the taps that see only the padding is whatever
    was in memory (seen with 2.14).
    """
    if x.device.type != "cpu":
        return conv(x)
    with without_autocast(x):
        return conv(x.to(conv.weight.dtype))
