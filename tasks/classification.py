"""Image classification: one label per image, optionally mixed by mixup and cutmix."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from .classification_metrics import ClassificationEvaluator, SetEvaluator
from .distillation import build_distillation
from .objective import LabelLoss, Objective, training_outputs, with_auxiliary
from .token_labels import build_token_labelling

__all__ = ["ClassificationEvaluator", "ClassificationTask", "build_task", "is_mixing"]

LOSSES = ("cross_entropy", "bce")


class ClassificationTask:
    """A loss on logits (B, num_classes); targets are class indices (B,).

    Args:
        num_classes: at least 2.
        label_smoothing: in [0, 1); with mixup or cutmix it smooths the mixed targets.
        mixup: keywords of `timm.data.Mixup` (mixup_alpha, cutmix_alpha, cutmix_minmax, prob,
            switch_prob, mode). Mixing is on when any of the first three is, CutMix alone included.
        loss: what the labels cost, of `LOSSES`: cross entropy, or the binary one of each class.
        bce_threshold: bce: targets above it become 1 and the others 0; None leaves them soft.
        bce_sum: bce: the sum over the classes instead of their mean.
        objective: what teaches the model beyond the labels.
    """

    metric = "acc1"

    def __init__(
        self,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        mixup: Mapping[str, Any] | None = None,
        loss: str = "cross_entropy",
        bce_threshold: float | None = None,
        bce_sum: bool = False,
        objective: Objective | None = None,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"MODEL.NUM_CLASSES={num_classes}: classification needs at least 2")
        if loss not in LOSSES:
            raise ValueError(f"TRAIN.LOSS='{loss}' must be one of {list(LOSSES)}")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.objective = objective
        self.bce = None
        if loss == "bce":
            least = label_smoothing / num_classes
            if bce_threshold is not None and bce_threshold < least:
                raise ValueError(
                    f"TRAIN.BCE_THRESHOLD={bce_threshold} is below the {least:g} that MODEL.LABEL_SMOOTHING="
                    f"{label_smoothing} gives every class, and all of them would be right: set "
                    "MODEL.LABEL_SMOOTHING 0, or a higher threshold"
                )
            self.bce = BinaryCrossEntropy(
                label_smoothing, target_threshold=bce_threshold, sum_classes=bce_sum
            )
        self.mixup = None
        if mixup and is_mixing(mixup):
            self.mixup = Mixup(**mixup, label_smoothing=label_smoothing, num_classes=num_classes)

    def check(self, model: nn.Module) -> None:
        """ValueError unless `model` gives in training mode what the losses need; runs nothing."""
        if self.objective:
            self.objective.check(model)
        elif "tokens" in training_outputs(model):
            raise ValueError(
                f"{type(model).__name__} has an auxiliary head for token labels, which nothing would teach: "
                "set TRAIN.TOKEN_LABELS.ENABLE True, or MODEL.DILATEFORMER.AUX_HEAD False"
            )

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Images (B, C, H, W), labels (B,) -> loss, its parts, and the model's own losses."""
        loss, parts = (self.objective or _learn_labels)(
            model, *self._mixed(*batch), self.label_loss
        )
        return with_auxiliary(model, loss, parts)

    def label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, K) against indices (B,), or against mixed, smoothed shares (B, K) -> a scalar."""
        logits = logits.float()  # the logarithm of half-precision probabilities is too coarse
        if self.bce:
            return self.bce(logits, targets)
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def _mixed(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and their targets (B, K); without mixing what comes in."""
        if not self.mixup:
            return inputs, targets
        if len(inputs) % 2:
            raise ValueError(
                f"mixup and cutmix pair the images of a batch, which has {len(inputs)}: make "
                "DATA.BATCH_SIZE even and drop the last, incomplete batch of training"
            )
        # A copy, because timm mixes in place and the batch is the caller's.
        return self.mixup(inputs.clone(), targets)

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        return model(batch[0])

    def evaluator(self, **options: Any) -> ClassificationEvaluator:
        """A fresh evaluator for one pass over a loader; with options, which are its own, a `SetEvaluator`."""
        if options:
            return SetEvaluator(self.num_classes, **options)
        return ClassificationEvaluator(self.num_classes)

    def describe(self, metrics: Mapping[str, float]) -> str:
        """In the words of Swin's logs."""
        return (
            f" * Acc@1 {metrics['acc1']:.3f} Acc@5 {metrics['acc5']:.3f} loss {metrics['loss']:.4f} "
            f"({metrics['images']:.0f} images)"
        )


def is_mixing(mixup: Mapping[str, Any]) -> bool:
    """Whether these keywords of `timm.data.Mixup` mix images at all, so that targets become soft."""
    return (
        mixup.get("mixup_alpha", 1.0) > 0
        or mixup.get("cutmix_alpha", 0.0) > 0
        or mixup.get("cutmix_minmax") is not None
    )


def build_task(
    config: Any, num_classes: int, device: torch.device | None = None
) -> ClassificationTask:
    """The task of a config, for the number of classes that the data has.

    Args:
        device: of training, for a teacher; None reads no weights, and is enough to check or to evaluate.

    Raises:
        ValueError: fewer than 2 classes, training would mix batches of an odd size, there is no such
            teacher, or the ways to teach exclude each other.
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
    if is_mixing(mixup) and not config.EVAL_MODE and config.TRAIN.TOKEN_LABELS.ENABLE:
        raise ValueError(
            f"TRAIN.TOKEN_LABELS mixes images by itself (MIX_ALPHA): AUG.MIXUP={aug.MIXUP}, "
            f"AUG.CUTMIX={aug.CUTMIX} and AUG.CUTMIX_MINMAX={aug.CUTMIX_MINMAX} must be 0, 0 and None"
        )
    return ClassificationTask(
        num_classes,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        mixup=mixup,
        loss=config.TRAIN.LOSS,
        bce_threshold=config.TRAIN.BCE_THRESHOLD,
        bce_sum=config.TRAIN.BCE_SUM,
        objective=None if config.EVAL_MODE else build_objective(config, num_classes, device),
    )


def build_objective(
    config: Any, num_classes: int, device: torch.device | None = None
) -> Objective | None:
    """What TRAIN.DISTILLATION or TRAIN.TOKEN_LABELS adds to the labels, if anything."""
    distilled, labelled = config.TRAIN.DISTILLATION.TYPE != "none", config.TRAIN.TOKEN_LABELS.ENABLE
    if distilled and labelled:
        raise ValueError(
            "TRAIN.DISTILLATION.TYPE and TRAIN.TOKEN_LABELS.ENABLE exclude each other: leave TYPE none, or "
            "ENABLE False"
        )
    if distilled:
        return build_distillation(config, num_classes, device)
    return build_token_labelling(config, num_classes, device) if labelled else None


def _learn_labels(
    model: nn.Module, images: Tensor, targets: Tensor, label_loss: LabelLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective without a teacher: all heads of a model (distilled DeiT has two) learn the labels."""
    outputs = model(images)
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(label_loss(logits, targets) for logits in heads) / len(heads)
    return loss, {"cls": loss}
