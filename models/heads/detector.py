"""What all detectors share: the maps they read, their pyramid, what they keep at test, and how they count."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor, nn

from .boxes import AnchorGrid, first_map
from .fpn import FeaturePyramid
from .nms import Suppression


class DetectionHead(nn.Module):
    """A feature pyramid on the coarsest maps; subclasses say what is found on its levels.

    Their own keywords come before `**shared`, which stands for those here.

    Args:
        features: `dict(channels, stride)` of each map, fine to coarse.
        num_classes: K.
        num_maps: how many of the maps are used, the coarsest ones.
        fpn_channels: width of the pyramid, and of what reads it.
        extra_levels: coarser levels that the pyramid adds, see `FeaturePyramid`: "convs" two of them, from
            the last map; "pool" one; "none".
        anchor_ratios: height over width.
        score_threshold, nms_threshold, detections_per_image: what is kept at test.
        soft_nms, soft_nms_sigma, soft_nms_min_score: as in `Suppression`.
    """

    needs_masks: ClassVar[bool] = False

    def __init__(
        self,
        features: list[dict[str, int]],
        num_classes: int,
        *,
        num_maps: int = 4,
        fpn_channels: int = 256,
        extra_levels: str = "pool",
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        soft_nms: str = "none",
        soft_nms_sigma: float = 0.5,
        soft_nms_min_score: float = 0.001,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.first_map = first_map(features, num_maps)
        self.unused_maps = tuple(range(self.first_map))
        used = features[self.first_map :]
        self.map_strides = [f["stride"] for f in used]
        self.fpn = FeaturePyramid([f["channels"] for f in used], fpn_channels, extra_levels)
        self.anchor_ratios = anchor_ratios
        self.score_threshold = score_threshold
        self.suppress = Suppression(
            nms_threshold, detections_per_image, soft_nms, soft_nms_sigma, soft_nms_min_score
        )
        self._counting = False

    def anchor_grid(self, scales: Sequence[float]) -> AnchorGrid:
        """Anchors of all levels, with sides of `scales` strides."""
        strides = self.fpn.strides(self.map_strides)
        return AnchorGrid(strides, self.map_strides[-1], scales, self.anchor_ratios)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """All maps of `features` -> levels (B, fpn_channels, h, w) of the pyramid, fine to coarse."""
        return self.fpn(maps[self.first_map :])

    @contextmanager
    def counting(self) -> Iterator[None]:
        """While it is entered, evaluation runs what papers count, which no image makes more or less."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False
