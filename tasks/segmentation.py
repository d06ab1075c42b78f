"""Semantic segmentation: one label per pixel, some of which do not count."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.heads.pixels import IGNORED, MAX_CLASSES
from utils.pictures import draw_labels, legend, side_by_side

from .objective import check_task, with_auxiliary
from .segmentation_metrics import SegmentationEvaluator
from .windows import Looks

__all__ = ["SegmentationEvaluator", "SegmentationTask", "build_task"]


class SegmentationTask:
    """The head makes the losses; here they are summed, and images of any size get their label maps.

    Args:
        num_classes: K, from 2 to 254, as many as masks of bytes have room for.
        looks: how an image is shown to the model; None is as a whole.

    Attributes:
        single_look: what the model says of its last forward pass, it says of the image.
    """

    metric = "mIoU"

    def __init__(self, num_classes: int, looks: Looks | None = None) -> None:
        if not 2 <= num_classes <= MAX_CLASSES:
            raise ValueError(
                f"MODEL.NUM_CLASSES={num_classes}: segmentation needs from 2 to {MAX_CLASSES} classes"
            )
        self.num_classes = num_classes
        self.looks = looks or Looks()
        self.single_look = self.looks.single

    def check(self, model: nn.Module) -> None:
        """ValueError unless `model` has a head for segmentation; runs nothing."""
        check_task(model, "segmentation")

    def losses(
        self, model: nn.Module, batch: tuple[Tensor, list[dict[str, Any]]]
    ) -> dict[str, Tensor]:
        """Images (B, C, H, W) and targets with masks of their size -> loss, its parts, the model's own."""
        parts = model(*batch)
        return with_auxiliary(model, sum(parts.values()), parts)

    def predict(self, model: nn.Module, batch: tuple[Tensor, list[dict[str, Any]]]) -> list[Tensor]:
        """Images and targets with `size` and `original_size` -> labels (H, W) uint8 at each original size."""
        results = []
        for image, target in zip(*batch, strict=True):
            height, width = target["size"]
            size = tuple(target["original_size"])
            results.append(self.looks.labels(model, image[:, :height, :width], size))
        return results

    def evaluator(
        self, classes: Sequence[str] = (), category_ids: Sequence[int] = (), record: bool = False
    ) -> SegmentationEvaluator:
        """A fresh evaluator for one pass over a loader."""
        return SegmentationEvaluator(
            self.num_classes, classes=classes, category_ids=category_ids, record=record
        )

    def describe(self, metrics: Mapping[str, float]) -> str:
        """In the words of mmsegmentation's logs."""
        shown = [f"{key} {metrics[key]:.2f}" for key in ("mIoU", "mAcc", "aAcc") if key in metrics]
        counted = f"{metrics['images']:.0f} images"
        if (classes := metrics.get("classes", self.num_classes)) < self.num_classes:
            counted += f", {classes:.0f} of {self.num_classes} classes"
        return f" * {' '.join([*shown, ''])}({counted})"

    def picture(
        self, image: Tensor, found: Tensor, target: Mapping[str, Any], classes: Sequence[str] = ()
    ) -> Tensor:
        """The labels of an image (left) beside those that were found, and the names of their colours.

        Args:
            image: the stored one, (3, H, W) uint8; it shows through where a pixel does not count.
            found: of `predict`.
            target: with `mask` (H, W).
        """
        maps = [labels.cpu() for labels in (target["mask"], found)]
        names = classes or [str(label) for label in range(self.num_classes)]
        shown = {label for labels in maps for label in labels.unique().tolist()} - {IGNORED}
        pictures = [draw_labels(image, labels, ignored=IGNORED) for labels in maps]
        return side_by_side(*pictures, legend(shown, names, image.shape[1]))


def build_task(config: Any, num_classes: int, device: Any = None) -> SegmentationTask:
    """The task of a config, for the number of classes that the data has; it needs no device.

    Raises:
        ValueError: fewer than 2 or more than 254 classes, or windows that leave gaps.
    """
    test = config.TEST.SEGMENTATION
    looks = Looks(
        mode=test.MODE,
        crop=test.CROP,
        stride=test.STRIDE,
        scales=test.SCALES,
        flip=test.FLIP,
        divisor=config.DATA.SIZE_DIVISOR,
    )
    return SegmentationTask(num_classes, looks)
