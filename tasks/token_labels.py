"""Token labelling: each position of the last map learns a class of its own, which a teacher names.

Paper:      arXiv:2104.10858 (LV-ViT), Sec. 3.2 (token labels), Sec. 3.3 (MixToken); used by Dilate-S* and B*
Reference:  the LV-ViT release: loss, and evaluation with half of the largest score of a position
Deviations: by default the teacher looks at each augmented image while training. The release stores the five
            best classes of each position of the whole image once, and cuts them as the image is cut; such
            maps can be read. Its crop of a map has rows and columns exchanged (roi_align gets top, left);
            ours is that of the image. RandAugment moves its maps, and not ours. Regions are exchanged in the
            image along the borders of positions, not after the patch embedding.
Shapes:     B batch, h/w positions of the last map, K classes
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor, nn
from torchvision.ops import roi_align

from data.label_maps import MappedLabels
from utils.wrappers import unwrap

from .objective import LabelLoss, training_outputs
from .teacher import Teacher, build_teacher

SECTION = "TRAIN.TOKEN_LABELS"


class TokenLabelling:
    """Loss of the class head on the labels + weight * cross entropy of all positions with the teacher's.

    Args:
        teacher: scores the positions; None where batches bring stored maps (`MappedLabels`).
        weight: beta of the paper.
        mix_alpha: of the Beta distribution of the share that MixToken exchanges; 0 exchanges nothing.
    """

    def __init__(
        self, teacher: Teacher | None, weight: float = 0.5, mix_alpha: float = 1.0
    ) -> None:
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
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor | MappedLabels,
        label_loss: LabelLoss,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, C, H, W) and labels (B,) -> what to minimise; both parts, without weights."""
        stride = unwrap(model).feature_info[-1]["stride"]
        grid = (-(-images.shape[2] // stride), -(-images.shape[3] // stride))
        if isinstance(targets, MappedLabels):
            scores = cut_maps(targets, grid, unwrap(model).num_classes)
            targets = targets.labels
        else:
            scores = self.teacher.token_logits(images, grid)
        labels = scores.softmax(-1)  # B h w K
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


def cut_maps(targets: MappedLabels, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Scores (B, *grid, K) of what samples show of their images; a class that is not stored has 0."""
    scores, classes = targets.scores.float().unbind(1)  # B k h w
    height, width = scores.shape[2:]
    dense = scores.new_zeros(len(scores), num_classes, height, width)
    dense.scatter_(1, classes.long(), scores)
    first, last = targets.windows.unflatten(1, (2, 2)).unbind(1)  # each (B, 2) of x, y
    mirrored = (last < first)[..., None, None, None]  # B 2 1 1 1
    sides = first.new_tensor([width, height])
    corners = torch.cat([first.minimum(last) * sides, first.maximum(last) * sides], dim=1)
    number = torch.arange(len(scores), device=corners.device, dtype=corners.dtype)[:, None]
    cut = roi_align(dense, torch.cat([number, corners], dim=1), grid, aligned=True)  # B K h w
    cut = torch.where(mirrored[:, 0], cut.flip(3), cut)
    return torch.where(mirrored[:, 1], cut.flip(2), cut).permute(0, 2, 3, 1)


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
    if options.MAPS and options.TEACHER:
        raise ValueError(
            f"{SECTION}.MAPS and {SECTION}.TEACHER exclude each other: leave one of them empty"
        )
    teacher = None
    if not options.MAPS:
        teacher = build_teacher(config, "TOKEN_LABELS", num_classes, device)
    return TokenLabelling(teacher, options.WEIGHT, options.MIX_ALPHA)
