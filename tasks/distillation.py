"""Distillation by attention: a token with a classifier of its own that learns from another network.

Paper:     arXiv:2012.12877, Sec. 3 (hard and soft targets), Sec. 4 (the two heads, which are averaged)
Reference: the DeiT release, losses.py: soft targets are divided by the number of all scores, not of images
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import list_models

from .objective import LabelLoss, training_outputs
from .teacher import Teacher, build_teacher

KINDS = ("soft", "hard")
SECTION = "TRAIN.DISTILLATION"


class Distillation:
    """(1 - alpha) * loss of the class head on the labels + alpha * distance of the other to the teacher.

    Args:
        kind: "hard" is the cross entropy with the teacher's decision; "soft" the divergence of both
            distributions at temperature tau, times tau^2.
        alpha: weight of the teacher, in [0, 1].
        tau: temperature of soft targets, above 0.
    """

    def __init__(
        self, teacher: Teacher, kind: str = "hard", alpha: float = 0.5, tau: float = 1.0
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"{SECTION}.TYPE='{kind}' must be one of {list(KINDS)}")
        self.teacher, self.kind, self.alpha, self.tau = teacher, kind, alpha, tau

    def check(self, model: nn.Module) -> None:
        """ValueError unless `model` has a class head and a distillation head."""
        if training_outputs(model) != ("logits", "distilled"):
            choices = [name for name in list_models() if "distilled" in name]
            raise ValueError(
                f"{SECTION}.TYPE='{self.kind}': {type(model).__name__} has no distillation head that could "
                f"learn from a teacher; choose a student with one (MODEL.TYPE deit with "
                f"MODEL.DEIT.DISTILLED True, as {choices} are), or set {SECTION}.TYPE none"
            )

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, label_loss: LabelLoss
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, C, H, W) and targets of `label_loss` -> what to minimise; both parts, without weights.

        The teacher sees the images that the student sees, mixed ones included.
        """
        taught = self.teacher.logits(images)
        logits, distilled = model(images)
        parts = {
            "cls": label_loss(logits, targets),
            "distillation": self.distance(distilled, taught),
        }
        return (1 - self.alpha) * parts["cls"] + self.alpha * parts["distillation"], parts

    def distance(self, distilled: Tensor, taught: Tensor) -> Tensor:
        """Scores (B, K) of the distillation head and of the teacher -> the loss, a scalar."""
        if distilled.shape != taught.shape:
            raise ValueError(
                f"{SECTION}.TEACHER scores {taught.shape[1]} classes, the student {distilled.shape[1]}: "
                "they must be the same"
            )
        distilled = distilled.float()
        if self.kind == "hard":
            return F.cross_entropy(distilled, taught.argmax(1))
        ours, theirs = (F.log_softmax(scores / self.tau, 1) for scores in (distilled, taught))
        divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True)
        return divergence * self.tau**2 / distilled.numel()


def build_distillation(
    config: Any, num_classes: int, device: torch.device | None = None
) -> Distillation:
    """What TRAIN.DISTILLATION describes; without a device it can be checked, not run."""
    options = config.TRAIN.DISTILLATION
    teacher = build_teacher(config, "DISTILLATION", num_classes, device)
    return Distillation(teacher, options.TYPE, options.ALPHA, options.TAU)
