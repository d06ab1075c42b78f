"""Token labelling: each position of the last map learns a class of its own, which a teacher names.

Paper:      arXiv:2104.10858 (LV-ViT), Sec. 3.2 (token labels), Sec. 3.3 (MixToken); used by Dilate-S* and B*
Reference:  the LV-ViT release: loss, and evaluation with half of the largest score of a position
Deviations: the teacher looks at each augmented image while training. The release stores the five best
            classes of each position of the whole image once, and cuts them as the image is cut. Regions are
            exchanged in the image along the borders of positions, not after the patch embedding.
Shapes:     B batch, h/w positions of the last map, K classes
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor, nn

from utils.wrappers import unwrap

from .objective import LabelLoss, training_outputs
from .teacher import Teacher, build_teacher

SECTION = "TRAIN.TOKEN_LABELS"


class TokenLabelling:
    """Loss of the class head on the labels + weight * cross entropy of all positions with the teacher's.

    Args:
        weight: beta of the paper.
        mix_alpha: of the Beta distribution of the share that MixToken exchanges; 0 exchanges nothing.
    """

    def __init__(self, teacher: Teacher, weight: float = 0.5, mix_alpha: float = 1.0) -> None:
        self.teacher, self.weight, self.mix_alpha = teacher, weight, mix_alpha

    def check(self, model: nn.Module) -> None:
        """ValueError unless `model` has a class head and an auxiliary head for positions."""
        if training_outputs(model) != ("logits", "tokens"):
            raise ValueError(
                f"{SECTION}.ENABLE=True: {type(model).__name__} has no auxiliary head that scores the "
                "positions of its last map; set MODEL.TYPE dilateformer with "
                f"MODEL.DILATEFORMER.AUX_HEAD True, or {SECTION}.ENABLE False"
            )

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, label_loss: LabelLoss
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, C, H, W) and labels (B,) -> what to minimise; both parts, without weights."""
        stride = unwrap(model).feature_info[-1]["stride"]
        grid = (-(-images.shape[2] // stride), -(-images.shape[3] // stride))
        labels = self.teacher.token_logits(images, grid).softmax(-1)  # B h w K
        top, bottom, left, right = self.draw_region(grid)
        share = (bottom - top) * (right - left) / (grid[0] * grid[1])
        if share:
            rows, columns = slice(top, bottom), slice(left, right)
            pixels = (slice(s.start * stride, s.stop * stride) for s in (rows, columns))
            images = _exchanged(images, (..., *pixels))
            labels = _exchanged(labels, (slice(None), rows, columns))
        logits, tokens = model(images)
        own, other = label_loss(logits, targets), label_loss(logits, targets.flip(0))
        parts = {
            "cls": (1 - share) * own + share * other,
            "tokens": F.cross_entropy(tokens.float().flatten(0, 1), labels.flatten(0, 2)),
        }
        return parts["cls"] + self.weight * parts["tokens"], parts

    def draw_region(self, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        """Positions (top, bottom, left, right) to exchange, drawn as timm draws CutMix's; may be none."""
        if not self.mix_alpha:
            return 0, 0, 0, 0
        kept = np.random.beta(self.mix_alpha, self.mix_alpha)
        region, _ = cutmix_bbox_and_lam(grid, kept)
        return tuple(int(side) for side in region)


def _exchanged(batch: Tensor, region: tuple[Any, ...]) -> Tensor:
    """A copy of `batch` with `region` of each sample taken from its mirror image in the batch."""
    mixed = batch.clone()
    mixed[region] = batch.flip(0)[region]
    return mixed


def build_token_labelling(
    config: Any, num_classes: int, device: torch.device | None = None
) -> TokenLabelling:
    """What TRAIN.TOKEN_LABELS describes; without a device it can be checked, not run."""
    options = config.TRAIN.TOKEN_LABELS
    teacher = build_teacher(config, "TOKEN_LABELS", num_classes, device)
    return TokenLabelling(teacher, options.WEIGHT, options.MIX_ALPHA)
