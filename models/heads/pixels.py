"""What the heads for segmentation share: their layers, their loss, and how maps change their size."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Label of pixels that count neither in training nor in evaluation.
IGNORED = 255
# Labels are 0 ... 253: masks are bytes, and 254 is where data finds a value that no class has.
MAX_CLASSES = 254


class PixelHead(nn.Module):
    """Base of all heads that give a class to each pixel: a classifier on features that subclasses make.

    Args:
        channels: of what `features` gives.
        num_classes: K.
        dropout: share of the channels that training sets to zero before the classifier.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, maps: list[Tensor], images: Tensor, targets: list[dict[str, Any]] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Maps (B, C_i, h_i, w_i), fine to coarse -> losses in training, else logits (B, K, h, w).

        Logits have the size of the finest map that the head uses. Training needs the targets' `mask`
        (H, W), all of one size, with labels 0 ... K-1 and 255 where a pixel does not count.
        """
        if not self.training:
            return self.logits(maps)
        return self.losses(maps, torch.stack([target["mask"] for target in targets]))

    def losses(self, maps: list[Tensor], masks: Tensor) -> dict[str, Tensor]:
        """Losses by name, against masks (B, H, W)."""
        return {"seg": pixel_loss(self.logits(maps), masks)}

    def logits(self, maps: list[Tensor]) -> Tensor:
        """Maps -> logits (B, K, h, w)."""
        return self.classifier(self.dropout(self.features(maps)))

    def features(self, maps: list[Tensor]) -> Tensor:
        """Maps -> (B, channels, h, w)."""
        raise NotImplementedError


def conv_norm_act(in_channels: int, channels: int, kernel_size: int = 3) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) -> (B, C, *size), bilinearly between the centres of pixels."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross entropy of the pixels that count, in float32; 0 if there are none.

    mmsegmentation divides by the number of all pixels instead, so that ignored ones make the steps smaller.

    Args:
        logits: (B, K, h, w), resized to the masks.
        masks: (B, H, W) labels, 255 where a pixel does not count.
    """
    logits = resized(logits.float(), masks.shape[-2:])
    # Not reduction="sum", which has no deterministic form on a GPU.
    losses = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="none")
    return losses.sum() / (masks != IGNORED).sum().clamp(min=1)
