"""Metrics of image classification, exact over the images of all processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import all_gather_object, all_reduce_sum

# Equal intervals of the confidence, as in Guo et al., arXiv:1706.04599.
CALIBRATION_BINS = 15

# Top-1 error of AlexNet, the mean over five severities of each of ImageNet-C's 15 corruptions: the
# normalisers of Hendrycks & Dietterich, arXiv:1903.12261, as github.com/hendrycks/robustness prints them.
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
SEVERITIES = 5


class ClassificationEvaluator:
    """Top-1 and top-5 accuracy and mean cross entropy over the images of all processes.

    With fewer than 5 classes `acc5` is the top-k accuracy of k = num_classes, so 100.
    """

    def __init__(self, num_classes: int) -> None:
        self.k = min(5, num_classes)
        self._sums: Tensor | None = None  # images, top-1, top-5, loss, images with bad logits

    @torch.no_grad()
    def update(self, output: Tensor, batch: tuple[Any, Tensor]) -> None:
        """Count logits (B, num_classes) against labels (B,)."""
        self._count(output.float(), batch[1][:, None])

    def loss(self, output: Tensor, batch: tuple[Any, Tensor]) -> Tensor:
        """Sum of the images' losses, differentiable; what an attack raises."""
        return _losses(output.float(), batch[1][:, None]).sum()

    def compute(self) -> dict[str, float]:
        """acc1 and acc5 in percent, loss, and the number of images, over all processes.

        Raises:
            FloatingPointError: logits of some images are nan or infinite.
            ValueError: there was no image on any process.
        """
        own = torch.zeros(5, dtype=torch.float64) if self._sums is None else self._sums
        images, top1, top5, loss, bad = all_reduce_sum(own).tolist()
        if not images:
            raise ValueError("nothing to evaluate: the loaders of all processes are empty")
        if bad:
            raise FloatingPointError(
                f"logits of {bad:.0f} of {images:.0f} images are nan or infinite: the weights are "
                "damaged, or half precision overflows (try AMP_ENABLE False)"
            )
        # Rounded, because the order of additions depends on the number of processes.
        return {
            "acc1": round(100 * top1 / images, 6),
            "acc5": round(100 * top5 / images, 6),
            "loss": round(loss / images, 6),
            "images": int(images),
        }

    def _count(self, logits: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch to the sums -> its top classes (B, k), and whether each is right, (B, k) bool.

        Args:
            logits: (B, classes), float32.
            accepted: the right classes (B, L); -1 fills up a row that has fewer than L.
        """
        top = logits.topk(self.k, dim=1).indices  # (B, k)
        hits = top[:, :, None].eq(accepted[:, None, :]).any(dim=2)
        losses = _losses(logits, accepted)
        sums = torch.stack(
            [
                torch.ones_like(losses, dtype=torch.float64),
                hits[:, 0].double(),
                hits.any(dim=1).double(),
                losses.double(),
                (~logits.isfinite()).any(dim=1).double(),
            ]
        ).sum(dim=1)
        self._sums = sums if self._sums is None else self._sums + sums
        return top, hits


@dataclass(frozen=True)
class Predictions:
    """What was predicted for each image of a set, in the order of the set; NumPy arrays.

    Attributes:
        indices: (N,) numbers in the set; an unreadable image that was skipped is not among them.
        labels: (N,) label of each.
        classes: (N, k) the most likely classes, best first.
        probabilities: (N, k) of these.
    """

    indices: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


class SetEvaluator(ClassificationEvaluator):
    """The same metrics of an evaluation set whose samples carry their number, and what else is asked for.

    Targets are (B, 2): label, and index in the set. `compute` leaves the details in the attributes.

    Args:
        num_classes: of the model.
        subset: the classes that occur in the set, where they are fewer; the others' logits are left out
            before anything is computed.
        accepted: (N, L) right classes of each image of the set, filled up with -1, in place of its label.
        report: count what `confusion` and the calibration error need.
        record: keep what `predictions` needs.

    Attributes:
        confusion: (classes, classes) number of images by label (row) and prediction (column), in the order
            of `classes`; None without `report`, or with `accepted`.
        predictions: None without `record`.
        classes: labels of the model that rows and columns of `confusion` stand for.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        subset: Sequence[int] | None = None,
        accepted: Tensor | None = None,
        report: bool = False,
        record: bool = False,
    ) -> None:
        self.classes = list(range(num_classes)) if subset is None else sorted(subset)
        super().__init__(len(self.classes))
        if self.classes and self.classes[-1] >= num_classes:
            raise ValueError(
                f"the set has a class {self.classes[-1]}, the model only {num_classes}"
            )
        self.report, self.record = report, record
        self.confusion: Tensor | None = None
        self.predictions: Predictions | None = None
        positions = torch.full((num_classes + 1,), -1)  # the last one stands for -1, no class
        positions[self.classes] = torch.arange(len(self.classes))
        # Moved to the logits' device with the first batch.
        self._kept = None if subset is None else torch.tensor(self.classes)
        self._positions = positions
        self._accepted = accepted
        self._confusion = torch.zeros(len(self.classes) ** 2, dtype=torch.int64)
        self._bins = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64)
        self._records: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def update(self, output: Tensor, batch: tuple[Any, Tensor]) -> None:
        """Count logits (B, num_classes) against targets (B, 2)."""
        logits, accepted = self._restricted(output, batch[1])
        top, hits = self._count(logits, accepted)
        if not self.report and not self.record:
            return
        best = logits.softmax(1).gather(1, top)  # (B, k) probabilities
        labels, indices = batch[1].unbind(1)
        if self.report:
            self._add_to_report(top[:, 0], hits[:, 0], best[:, 0], accepted)
        if self.record:
            named = top if self._kept is None else self._kept[top]
            self._records.append((indices, labels, named, best))

    def loss(self, output: Tensor, batch: tuple[Any, Tensor]) -> Tensor:
        """Sum of the images' losses, differentiable; what an attack raises."""
        return _losses(*self._restricted(output, batch[1])).sum()

    def compute(self) -> dict[str, float]:
        """Those of `ClassificationEvaluator`; with `report` also, in percent:

        - `ece`: expected calibration error, the mean gap between confidence and accuracy in 15 bins of
          the confidence, weighted by their images;
        - `mean_class_acc`: mean over the classes that occur of their top-1 accuracy (not with `accepted`).
        """
        result = super().compute()
        if self.record:
            self.predictions = _gathered(self._records)
        if not self.report:
            return result
        images, right, confidence = all_reduce_sum(self._bins).cpu()
        gap = (right - confidence).abs().sum() / images.sum()
        result["ece"] = round(100 * gap.item(), 6)
        if self._accepted is None:
            side = len(self.classes)
            self.confusion = all_reduce_sum(self._confusion).cpu().view(side, side)
            result["mean_class_acc"] = round(np.nanmean(self.class_accuracies()).item(), 6)
        return result

    def class_accuracies(self) -> np.ndarray:
        """Top-1 accuracy in percent of each of `classes`, nan where none occurs; after `compute`."""
        counts = self.confusion.double().numpy()
        images = counts.sum(1)
        return np.divide(
            100 * counts.diagonal(), images, out=np.full_like(images, np.nan), where=images > 0
        )

    def _restricted(self, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the kept classes (B, classes), and the right ones of each image among them (B, L)."""
        self._to(output.device)
        labels, indices = targets.unbind(1)
        right = labels[:, None] if self._accepted is None else self._accepted[indices]
        logits = output.float()
        return logits if self._kept is None else logits[:, self._kept], self._positions[right]

    def _to(self, device: torch.device) -> None:
        for name in ("_kept", "_positions", "_accepted", "_confusion", "_bins"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                setattr(self, name, tensor.to(device))

    def _add_to_report(
        self, prediction: Tensor, right: Tensor, confidence: Tensor, accepted: Tensor
    ) -> None:
        # (low, high] as in the definition: a confidence of 1 belongs to the last bin.
        bins = (confidence.double() * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
        parts = torch.stack([torch.ones_like(confidence), right.float(), confidence]).double()
        self._bins.index_add_(1, bins, parts)
        if self._accepted is None:
            cells = accepted[:, 0] * len(self.classes) + prediction
            self._confusion.index_add_(0, cells, torch.ones_like(cells))


def corruption_errors(parts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Metrics of `corruption/severity` -> those of ImageNet-C, as in Hendrycks & Dietterich.

    Returns:
        acc1, acc5 and loss: means over severities, then over corruptions: those of the benchmark that are
        there, or all, if none of them is. `images`: of all parts. `mean_error`: 100 - acc1, not normalised.
        `mce`: the mean corruption error, normalised by AlexNet's, only where all 15 corruptions are there
        at all five severities. `errors`: corruption -> error in percent at each severity, and their `mean`.
    """
    rows: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, metrics in parts.items():
        corruption, _, severity = name.rpartition("/")
        rows.setdefault(corruption, {})[severity] = metrics
    means = {
        corruption: {
            key: fmean(metrics[key] for metrics in row.values()) for key in ("acc1", "acc5", "loss")
        }
        for corruption, row in rows.items()
    }
    counted = [name for name in ALEXNET_ERRORS if name in means] or list(means)
    result: dict[str, Any] = {
        key: round(fmean(means[name][key] for name in counted), 6)
        for key in ("acc1", "acc5", "loss")
    }
    result["images"] = sum(int(metrics["images"]) for metrics in parts.values())
    result["mean_error"] = round(100 - result["acc1"], 6)
    if all(len(rows.get(name, {})) == SEVERITIES for name in ALEXNET_ERRORS):
        ratios = [(100 - means[name]["acc1"]) / error for name, error in ALEXNET_ERRORS.items()]
        result["mce"] = round(100 * fmean(ratios), 6)
    result["errors"] = {
        corruption: dict(
            mean=round(100 - means[corruption]["acc1"], 6),
            **{severity: round(100 - metrics["acc1"], 6) for severity, metrics in row.items()},
        )
        for corruption, row in rows.items()
    }
    return result


def _losses(logits: Tensor, accepted: Tensor) -> Tensor:
    """Minus the logarithm of the probability of the right classes together, (B,).

    With one right class it is the cross entropy.
    """
    if accepted.shape[1] == 1:
        return F.cross_entropy(logits, accepted[:, 0], reduction="none")
    right = logits.gather(1, accepted.clamp(min=0)).masked_fill(accepted < 0, -torch.inf)
    return logits.logsumexp(1) - right.logsumexp(1)


def _gathered(records: Sequence[tuple[Tensor, ...]]) -> Predictions:
    """The batches of all processes, in the order of the set."""
    own = [torch.cat(column).cpu().numpy() for column in zip(*records, strict=True)]
    shares = [share for share in all_gather_object(own) if share]  # a process may have no batch
    columns = [np.concatenate(column) for column in zip(*shares, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return Predictions(*(column[order] for column in columns))
