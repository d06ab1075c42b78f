"""Object detection: boxes with classes, and instance segmentation, where the head makes masks too."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from data.dense.detection import decode_masks
from utils.pictures import draw_objects, side_by_side

from .detection_metrics import CocoEvaluator, choose_evaluator
from .objective import check_task, with_auxiliary

__all__ = ["CocoEvaluator", "DetectionTask", "build_task"]

Target = Mapping[str, Any]
Detection = dict[str, Any]

# Bytes that masks of full size may take while they are encoded: 62 of 1333x800 at a time.
_MASK_BYTES = 2**26


class DetectionTask:
    """Losses of a detection head, and its detections in pixels of the stored images.

    Args:
        num_classes: at least 1; labels are 0 ... K-1.
        evaluator: what computes the metrics, of `detection_metrics.EVALUATORS`.
    """

    metric = "AP"

    def __init__(self, num_classes: int, *, evaluator: str = "auto") -> None:
        if num_classes < 1:
            raise ValueError(f"MODEL.NUM_CLASSES={num_classes}: detection needs at least 1")
        self.num_classes = num_classes
        self.backend = choose_evaluator(evaluator)

    def check(self, model: nn.Module) -> None:
        """ValueError unless `model` has a head for detection."""
        check_task(model, "detection")

    def losses(self, model: nn.Module, batch: tuple[Tensor, Sequence[Target]]) -> dict[str, Tensor]:
        """Images (B, C, H, W), targets -> loss, the head's parts of it, and the model's own losses."""
        parts = model(*batch)
        return with_auxiliary(model, sum(parts.values()), parts)

    def predict(self, model: nn.Module, batch: tuple[Tensor, Sequence[Target]]) -> list[Detection]:
        """Images (B, C, H, W), targets with `size` and `original_size` -> one dict per image, on the CPU.

        `boxes` (N, 4) xyxy in pixels of the stored image and within it, `scores` (N,), `labels` (N,); with
        a mask head `masks`, run-length codes of the stored image's size, as COCO's json has them; `bad`, the
        number of the head's outputs that are nan and of its detections that are not finite, all left out.
        """
        return [
            _to_original(found, target)
            for found, target in zip(model(*batch), batch[1], strict=True)
        ]

    def evaluator(
        self,
        classes: Sequence[str] = (),
        category_ids: Sequence[int] = (),
        record: bool = False,
    ) -> CocoEvaluator:
        """A fresh evaluator for one pass over a loader; options as those of `CocoEvaluator`."""
        return CocoEvaluator(
            self.num_classes,
            evaluator=self.backend,
            classes=classes,
            category_ids=category_ids,
            record=record,
        )

    def describe(self, metrics: Mapping[str, float]) -> str:
        """AP of boxes, and of masks if there are some."""
        shown = [
            f"{label} {metrics[name]:.3f}"
            for label, name in (
                ("AP", "AP"),
                ("AP50", "AP50"),
                ("AP75", "AP75"),
                ("mask AP", "mask_AP"),
                ("mask AP50", "mask_AP50"),
            )
            if name in metrics
        ]
        return f" * {' '.join([*shown, ''])}({metrics['images']:.0f} images)"

    def picture(
        self,
        image: Tensor,
        found: Detection,
        target: Target,
        classes: Sequence[str] = (),
        threshold: float = 0.3,
    ) -> Tensor:
        """What is in an image (left) beside what was found (right), with masks where the model makes them.

        Args:
            image: the stored one, (3, H, W) uint8.
            found: of `predict`.
            target: with `annotations`; crowds are left out.
            classes: names, one for each label.
            threshold: detections with a lower score are left out.
        """
        annotations = [a for a in target["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float64).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        size = tuple(image.shape[1:])
        with_masks = "masks" in found and all(a.get("segmentation") for a in annotations)
        truth = draw_objects(
            image,
            boxes,
            [a["category_id"] for a in annotations],
            classes=classes,
            masks=_decoded([a["segmentation"] for a in annotations], size) if with_masks else None,
        )
        kept = (found["scores"] >= threshold).nonzero().flatten()
        codes = [found["masks"][index] for index in kept.tolist()] if "masks" in found else None
        prediction = draw_objects(
            image,
            found["boxes"][kept],
            found["labels"][kept],
            classes=classes,
            scores=found["scores"][kept],
            masks=None if codes is None else _decoded(codes, size),
        )
        return side_by_side(truth, prediction)


def build_task(config: Any, num_classes: int, device: torch.device | None = None) -> DetectionTask:
    """The task of a config, for the number of classes that the data has; nothing of it needs a device.

    Raises:
        ValueError: no classes, or an evaluator that is unknown or not installed.
    """
    return DetectionTask(num_classes, evaluator=config.TEST.DETECTION.EVALUATOR)


def encode_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> list[dict[str, Any]]:
    """Masks (N, m, m), probabilities inside boxes (N, 4) of an image of (H, W) -> N run-length codes.

    A mask is resized to its box, whose corners are cut off to whole pixels, and is where it is 1/2 or more.
    The same as `torchvision.models.detection.roi_heads.paste_masks_in_image`, seven times as fast (100 masks
    of 640x480), because only what is inside a box is touched.
    """
    height, width = size
    side = masks.shape[-1]
    padded = F.pad(masks.detach().float().cpu()[:, None], (1,) * 4)  # so that edges fade out
    boxes = boxes.detach().float().cpu()
    centres = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    halves = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((side + 2) / side)
    corners = torch.cat([centres - halves, centres + halves], dim=1).long().tolist()
    step = max(1, _MASK_BYTES // (height * width))
    codes: list[dict[str, Any]] = []
    for start in range(0, len(corners), step):
        share = corners[start : start + step]
        # Columns of an image lie one after the other, as `encode` wants them.
        canvas = np.zeros((len(share), width, height), dtype=np.uint8)
        for index, (x0, y0, x1, y1) in enumerate(share):
            sides = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
            mask = F.interpolate(padded[start + index, None], sides, mode="bilinear")[0, 0] >= 0.5
            left, top = max(x0, 0), max(y0, 0)
            right, bottom = min(x1 + 1, width), min(y1 + 1, height)
            inside = mask[top - y0 : bottom - y0, left - x0 : right - x0]
            canvas[index, left:right, top:bottom] = inside.T.numpy()
        for code in coco_mask.encode(canvas.transpose(2, 1, 0)):
            codes.append(dict(size=[height, width], counts=code["counts"].decode("ascii")))
    return codes


def _to_original(found: Mapping[str, Tensor], target: Target) -> Detection:
    """Detections in pixels of the transformed image -> of the stored one."""
    found = {name: value.detach().cpu() for name, value in found.items()}
    bad = int(found.get("bad", 0))
    boxes, scores = found["boxes"].float(), found["scores"].float()
    finite = boxes.isfinite().all(dim=1) & scores.isfinite()
    (height, width), (h, w) = target["original_size"], target["size"]
    # Sides are rounded when an image is resized, so the ratio of one is not that of the other.
    boxes = boxes * torch.tensor([width / w, height / h] * 2)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=boxes.dtype))
    detection: Detection = dict(
        boxes=boxes[finite],
        scores=scores[finite],
        labels=found["labels"][finite],
        bad=bad + int((~finite).sum()),
    )
    if "masks" in found:
        detection["masks"] = encode_masks(
            found["masks"][finite], detection["boxes"], (height, width)
        )
    return detection


def _decoded(codes: Sequence[Any], size: tuple[int, int]) -> Tensor:
    """Polygons or run lengths, as COCO's json has them -> masks (N, H, W), bool."""
    return torch.from_numpy(decode_masks(codes, size)).bool()
