"""Test-time augmentation: one prediction from several views of an image."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop, ten_crop


class AveragedViews(nn.Module):
    """Mean of the class probabilities over views of each image, as log-probabilities (B, num_classes).

    They stand where logits would: their softmax is the mean. The model sees one view of the whole batch
    at a time, so that memory and compiled graphs are those of a plain evaluation.

    Args:
        model: images (B, C, h, w) -> logits (B, num_classes); may be wrapped.
        views: images (B, C, H, W) -> their views, each (B, C, h, w).
    """

    # What the model says of its last forward pass, it says of one view only.
    single_look = False

    def __init__(self, model: nn.Module, views: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self._orig_mod = model  # the name by which `utils.wrappers.unwrap` finds what is inside
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        # In float32: the logarithm of half-precision probabilities is too coarse.
        outputs = [self._orig_mod(view).float().log_softmax(1) for view in self.views(x)]
        return torch.stack(outputs).logsumexp(0) - math.log(len(outputs))


def averaged(model: nn.Module, kind: str, size: tuple[int, int]) -> nn.Module:
    """The model as it predicts with the test-time augmentation that TEST.TTA names.

    flip: the image and its mirror image. five: its corners and centre, of `size` (h, w); the images must be
    larger, by the margin of TEST.CROP_RATIO. ten: these and their mirror images (Krizhevsky et al. 2012,
    Sec. 4.1).

    Raises:
        ValueError: unknown kind.
    """
    if kind == "none":
        return model
    views: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
        "flip": lambda x: (x, x.flip(-1)),
        "five": lambda x: five_crop(x, list(size)),
        "ten": lambda x: ten_crop(x, list(size)),
    }
    if kind not in views:
        raise ValueError(f"TEST.TTA='{kind}' must be one of {['none', *views]}")
    return AveragedViews(model, views[kind])
