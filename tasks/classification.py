"""Image classification: one label per image, optionally mixed by mixup and cutmix."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from utils.distributed import all_reduce_sum
from utils.wrappers import unwrap


class ClassificationTask:
    """Cross entropy on logits (B, num_classes); targets are class indices (B,).

    Args:
        num_classes: at least 2.
        label_smoothing: in [0, 1); with mixup or cutmix it smooths the mixed targets.
        mixup: keywords of `timm.data.Mixup` (mixup_alpha, cutmix_alpha, cutmix_minmax, prob,
            switch_prob, mode). Mixing is on when any of the first three is, CutMix alone included.
    """

    metric = "acc1"

    def __init__(
        self,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        mixup: Mapping[str, Any] | None = None,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"MODEL.NUM_CLASSES={num_classes}: classification needs at least 2")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.mixup = None
        if mixup and is_mixing(mixup):
            self.mixup = Mixup(**mixup, label_smoothing=label_smoothing, num_classes=num_classes)

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Images (B, C, H, W), labels (B,) -> loss, its cross entropy, and the model's own losses."""
        inputs, targets = batch
        smoothing = self.label_smoothing
        if self.mixup:
            if len(inputs) % 2:
                raise ValueError(
                    f"mixup and cutmix pair the images of a batch, which has {len(inputs)}: make "
                    "DATA.BATCH_SIZE even and drop the last, incomplete batch of training"
                )
            # A copy, because timm mixes in place and the batch is the caller's.
            inputs, targets = self.mixup(inputs.clone(), targets)  # targets -> (B, num_classes)
            smoothing = 0.0
        outputs = model(inputs)
        # A model with several heads (distilled DeiT) trains all of them on the labels.
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        # float: the logarithm of half-precision probabilities is too coarse.
        classification = sum(
            F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) for logits in heads
        ) / len(heads)
        auxiliary = _auxiliary_losses(model)
        return {
            "loss": sum(auxiliary.values(), start=classification),
            "loss_cls": classification,
            **{f"loss_{name}": value for name, value in auxiliary.items()},
        }

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        return model(batch[0])

    def evaluator(self) -> "ClassificationEvaluator":
        """A fresh evaluator for one pass over a loader."""
        return ClassificationEvaluator(self.num_classes)

    def describe(self, metrics: Mapping[str, float]) -> str:
        """In the words of Swin's logs."""
        return (
            f" * Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} loss {metrics['loss']:.4f} "
            f"({metrics['images']:.0f} images)"
        )


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
        targets = batch[1]
        logits = output.float()
        top = logits.topk(self.k, dim=1).indices  # (B, k)
        hits = top.eq(targets[:, None])
        losses = F.cross_entropy(logits, targets, reduction="none")
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


def is_mixing(mixup: Mapping[str, Any]) -> bool:
    """Whether these keywords of `timm.data.Mixup` mix images at all, so that targets become soft."""
    return (
        mixup.get("mixup_alpha", 1.0) > 0
        or mixup.get("cutmix_alpha", 0.0) > 0
        or mixup.get("cutmix_minmax") is not None
    )


def build_task(config: Any, num_classes: int) -> ClassificationTask:
    """The task of a config, for the number of classes that the data has.

    Raises:
        ValueError: fewer than 2 classes, or training would mix batches of an odd size.
    """
    aug = config.AUG
    mixup = dict(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
    )
    if is_mixing(mixup) and not config.EVAL_MODE and config.DATA.BATCH_SIZE % 2:
        raise ValueError(
            f"DATA.BATCH_SIZE={config.DATA.BATCH_SIZE} must be even with mixup or cutmix; make it even, "
            "or set AUG.MIXUP 0, AUG.CUTMIX 0 and AUG.CUTMIX_MINMAX None"
        )
    return ClassificationTask(
        num_classes, label_smoothing=config.MODEL.LABEL_SMOOTHING, mixup=mixup
    )


def _auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """Losses that the bare model computed itself in its last forward; plain modules have none."""
    aux_losses = getattr(unwrap(model), "aux_losses", None)
    return aux_losses() if aux_losses else {}
