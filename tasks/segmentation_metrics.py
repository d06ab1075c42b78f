"""Metrics of semantic segmentation, exact over the pixels of all images of all processes."""

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.heads.pixels import IGNORED
from utils.distributed import all_reduce_sum, gather_object
from utils.pictures import remove_pictures
from utils.tables import write_rows

_LOG = logging.getLogger(__name__)


class SegmentationEvaluator:
    """Intersection over union and accuracy from one confusion matrix of all pixels that count.

    Counts are integers that stay on the device; nothing waits for it before `compute`, but for `record`.

    Args:
        num_classes: K.
        classes: their names; none stands for their numbers.
        category_ids: what the labels are called in the files of the data set, for recorded predictions; none
            records the labels 0 ... K-1.
        record: keep the predicted labels of each image, which `write` makes PNG files of.

    Attributes:
        confusion: (K, K) number of pixels by label (row) and prediction (column), after `compute`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        classes: Sequence[str] = (),
        category_ids: Sequence[int] = (),
        record: bool = False,
    ) -> None:
        self.num_classes = num_classes
        self.classes = list(classes) or [str(label) for label in range(num_classes)]
        for name, given in (("classes", self.classes), ("category_ids", category_ids)):
            if given and len(given) != num_classes:
                raise ValueError(
                    f"{len(given)} {name} were given, and the model has {num_classes} classes"
                )
        self.category_ids, self.record = list(category_ids), record
        self.confusion: np.ndarray | None = None
        self._images = 0
        # Pixels by label and prediction; then ignored ones, wrong labels, and those without prediction.
        self._counts = torch.zeros(num_classes**2 + 3, dtype=torch.int64)
        self._files: dict[str, bytes] = {}  # PNG by image id

    @torch.no_grad()
    def update(self, output: Sequence[Tensor], batch: tuple[Any, list[dict[str, Any]]]) -> None:
        """Count label maps (H, W), 255 where there is no prediction, against the targets' `mask` (H, W).

        Raises:
            ValueError: the two have different sizes.
        """
        for labels, target in zip(output, batch[1], strict=True):
            mask = target["mask"]
            if labels.shape != mask.shape:
                raise ValueError(
                    f"{target.get('file', target['image_id'])}: the mask has {tuple(mask.shape)} pixels, and "
                    f"{tuple(labels.shape)} are predicted; masks must have the size of their images"
                )
            self._count(labels.flatten().long(), mask.flatten().long())
            self._images += 1
            if self.record:
                self._files[str(target["image_id"])] = self._encoded(labels)

    def compute(self) -> dict[str, float]:
        """mIoU, mAcc and aAcc in percent, and the numbers of images and of classes in mIoU, of all processes.

        Classes that neither occur nor are predicted have no part in mIoU, those that do not occur none in
        mAcc (mean of the classes' accuracies). aAcc is the share of right pixels. Where nothing counts, which
        is an error unless predictions are recorded, there is the number of images only.

        Raises:
            FloatingPointError: there are pixels without prediction, as logits that are nan leave them.
            ValueError: there was no image on any process, no pixel that counts, or a label that is no class.
        """
        images = int(all_reduce_sum(torch.tensor(self._images)))
        counts = all_reduce_sum(self._counts).cpu().numpy()
        if self.record:
            parts = gather_object(self._files) or []
            self._files = {name: file for part in parts for name, file in part.items()}
        ignored, wrong, missing = counts[-3:].tolist()
        if not images:
            raise ValueError("nothing to evaluate: the loaders of all processes are empty")
        if wrong:
            raise ValueError(
                f"labels of {wrong} pixels are neither 0 ... {self.num_classes - 1} nor {IGNORED} (ignored): "
                "the masks are of other classes than the model"
            )
        if missing:
            raise FloatingPointError(
                f"logits of {missing} pixels are nan: the weights are damaged, or half precision overflows "
                "(try AMP_ENABLE False)"
            )
        self.confusion = counts[:-3].reshape(self.num_classes, self.num_classes)
        if not self.confusion.any():
            problem = f"all {ignored} pixels of the masks are {IGNORED} (ignored)"
            if self.record:
                _LOG.warning("no scores: %s", problem)
                return {"images": images}
            raise ValueError(f"nothing to evaluate: {problem}")
        right = self.confusion.trace() / self.confusion.sum()
        ious = self.class_ious()
        return {
            "mIoU": round(float(np.nanmean(ious)), 6),
            "mAcc": round(float(np.nanmean(self.class_accuracies())), 6),
            "aAcc": round(100 * float(right), 6),
            "images": images,
            "classes": int(np.isfinite(ious).sum()),
        }

    def class_ious(self) -> np.ndarray:
        """Intersection over union of each class in percent, nan where it has no pixel; after `compute`."""
        right = self.confusion.diagonal()
        return _percent(right, self.confusion.sum(0) + self.confusion.sum(1) - right)

    def class_accuracies(self) -> np.ndarray:
        """Share of the pixels of each class that are found, in percent, nan where it has none."""
        return _percent(self.confusion.diagonal(), self.confusion.sum(1))

    def write(self, folder: Path, suffix: str = "") -> list[Path]:
        """`classes<suffix>.csv`, and with `record` `labels<suffix>/<image id>.png` -> the table, the folder.

        After `compute`, in the first process. Columns: label, class, IoU and accuracy in percent (empty where
        there are none), pixels of the class, pixels predicted as it; no table where no pixel counts. PNG
        files that an earlier run left in that folder are removed.
        """
        written = (
            [self._write_table(folder / f"classes{suffix}.csv")] if self.confusion.any() else []
        )
        if not self.record:
            return written
        root = folder / f"labels{suffix}"
        remove_pictures(root)
        for name, content in sorted(self._files.items()):
            path = root / f"{name}.png"
            # The name comes from the data set: it may hold folders, but must not lead elsewhere.
            if not path.resolve().is_relative_to(root.resolve()):
                raise ValueError(f"image id {name!r} is no name for a file below {root}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return [*written, root]

    def _write_table(self, path: Path) -> Path:
        columns = (
            range(self.num_classes),
            self.classes,
            map(_cell, self.class_ious()),
            map(_cell, self.class_accuracies()),
            self.confusion.sum(1).tolist(),
            self.confusion.sum(0).tolist(),
        )
        header = ["label", "class", "iou", "acc", "pixels", "predicted"]
        write_rows(path, header, zip(*columns, strict=True))
        return path

    def _count(self, labels: Tensor, mask: Tensor) -> None:
        classes = self.num_classes
        cells = mask * classes + labels
        cells = cells.masked_fill(labels >= classes, classes**2 + 2)
        cells = cells.masked_fill((mask < 0) | (mask >= classes), classes**2 + 1)
        cells = cells.masked_fill(mask == IGNORED, classes**2)
        self._counts = self._counts.to(cells.device)
        # Unlike bincount (and torchmetrics' matrix, built on it) this does not wait for a GPU.
        self._counts.index_add_(0, cells, cells.new_ones(1).expand_as(cells))

    def _encoded(self, labels: Tensor) -> bytes:
        """The map as a PNG file, of 8 bits unless ids are larger."""
        values = labels.cpu().numpy()
        if self.category_ids:
            table = np.full(IGNORED + 1, IGNORED, np.int64)
            table[: self.num_classes] = self.category_ids
            values = table[values].astype(np.uint8 if table.max() <= 255 else np.uint16)
        content = io.BytesIO()
        Image.fromarray(values).save(content, "PNG")
        return content.getvalue()


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(100.0 * part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"
