"""How a segmenter looks at an image: as a whole or through windows, at several sizes, mirrored too.

Shapes: K classes; (h, w) an image as the model sees it, without padding; (H, W) the image as it is stored
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.dense.sizes import scaled_size
from models.heads.pixels import IGNORED, resized
from models.layers.tokens import Size, pad_to_multiple

# Values of logits that are resized at a time: 128 MiB in float32, 32 classes of 512 x 2048 pixels.
CHUNK = 2**25


@dataclass(frozen=True)
class View:
    """Logits of one look at an image, and how they lie on it.

    Attributes:
        logits: (K, a, b) of the image with its padding.
        padded: its size then.
        size: (h, w) of the part that is no padding, at the left and at the top.
        mirrored: the model saw left and right exchanged.
    """

    logits: Tensor
    padded: Size
    size: Size
    mirrored: bool = False

    def on_pixels(self, size: Size, classes: slice = slice(None)) -> Tensor:
        """Float32 logits (k, H, W) of some classes, on the pixels of the whole image at the size (H, W)."""
        height, width = self.size
        x = self.logits[None, classes].float().contiguous()
        x = resized(x, self.padded)[..., :height, :width]
        return resized(x.flip(-1) if self.mirrored else x, size)[0]


class Looks:
    """Labels of an image from all that a model is shown of it.

    Args:
        mode: whole, or slide: windows that overlap, the mean of whose logits is taken.
        crop: slide: height and width of a window; an image that is smaller is one window.
        stride: slide: from window to window, at most `crop`; the last one ends where the image does.
        scales: factors on the size of the image; probabilities are averaged over all of them.
        flip: look at the mirrored image, too, each time.
        divisor: sides that the model sees are multiples of it, by zeros at the right and at the bottom.

    Raises:
        ValueError: unknown mode, a stride that leaves gaps, or no scale.
    """

    def __init__(
        self,
        *,
        mode: str = "whole",
        crop: Sequence[int] = (512, 512),
        stride: Sequence[int] = (341, 341),
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        divisor: int = 32,
    ) -> None:
        if mode not in ("whole", "slide"):
            raise ValueError(f"TEST.SEGMENTATION.MODE='{mode}' must be one of ['whole', 'slide']")
        if mode == "slide" and any(s > c for s, c in zip(stride, crop, strict=True)):
            raise ValueError(
                f"TEST.SEGMENTATION.STRIDE={list(stride)} leaves gaps between windows of "
                f"TEST.SEGMENTATION.CROP={list(crop)}: make it at most as large"
            )
        if not scales:
            raise ValueError("TEST.SEGMENTATION.SCALES=[] must have at least one factor")
        self.slides = mode == "slide"
        self.crop, self.stride = tuple(crop), tuple(stride)
        self.scales, self.flip, self.divisor = tuple(scales), flip, divisor

    @property
    def single(self) -> bool:
        """The model runs once for an image."""
        return not self.slides and len(self.scales) == 1 and not self.flip

    def labels(self, model: nn.Module, image: Tensor, size: Size) -> Tensor:
        """The most probable class of each pixel, (H, W) uint8; 255 where logits are nan.

        Args:
            model: images (1, C, h, w) -> logits (1, K, a, b), K at most 255.
            image: (C, h, w), without padding.
            size: (H, W) of the result.
        """
        views = []
        for scale in self.scales:
            scaled = _scaled(image, scale)
            views.append(self._view(model, scaled, False))
            if self.flip:
                views.append(self._view(model, scaled.flip(-1), True))
        return most_probable(views, size)

    def _view(self, model: nn.Module, image: Tensor, mirrored: bool) -> View:
        size = tuple(image.shape[-2:])
        if not self.slides:
            padded = pad_to_multiple(image[None], self.divisor)
            logits = model(padded)[0]
            # A compiled model's may lie in a CUDA graph's memory, which the next look overwrites.
            logits = logits if self.single else logits.clone()
            return View(logits, tuple(padded.shape[-2:]), size, mirrored)
        return View(self._slide(model, image), size, size, mirrored)

    def _slide(self, model: nn.Module, image: Tensor) -> Tensor:
        """(C, h, w) -> mean logits (K, h, w) of all windows that show a pixel."""
        total = None
        windows = image.new_zeros(image.shape[-2:], dtype=torch.float32)
        for rows in _windows(image.shape[-2], self.crop[0], self.stride[0]):
            for columns in _windows(image.shape[-1], self.crop[1], self.stride[1]):
                window = image[:, rows, columns]
                padded = pad_to_multiple(window[None], self.divisor)
                view = View(model(padded)[0], tuple(padded.shape[-2:]), tuple(window.shape[-2:]))
                if total is None:
                    total = windows.new_zeros(len(view.logits), *windows.shape)
                total[:, rows, columns] += view.on_pixels(view.size)
                windows[rows, columns] += 1
        return total.div_(windows)


def most_probable(views: Sequence[View], size: Size) -> Tensor:
    """Labels (H, W), uint8, of the largest probability, the mean over the views; 255 where it is nan.

    Logits are resized for some classes at a time: all 150 of ADE20K at full size can take gigabytes.
    """
    num_classes = len(views[0].logits)
    pixels = max(math.prod(shape) for shape in [size, *(view.padded for view in views)])
    step = max(1, CHUNK // pixels)
    chunks = [slice(i, min(i + step, num_classes)) for i in range(0, num_classes, step)]
    # One view needs no probabilities: its largest logit is that of the largest.
    normalisers = [_normaliser(view, size, chunks) for view in views] if len(views) > 1 else []
    best = torch.full(size, -torch.inf, device=views[0].logits.device)
    labels = torch.full(size, IGNORED, dtype=torch.uint8, device=best.device)
    for chunk in chunks:
        if normalisers:
            scores = torch.zeros((), device=best.device)
            for view, normaliser in zip(views, normalisers, strict=True):
                scores = scores + view.on_pixels(size, chunk).sub_(normaliser).exp_()
        else:
            scores = views[0].on_pixels(size, chunk)
        values, indices = scores.max(dim=0)
        better = values > best
        labels = torch.where(better, indices.add_(chunk.start).to(torch.uint8), labels)
        best = torch.where(better, values, best)
    return labels


def _normaliser(view: View, size: Size, chunks: Sequence[slice]) -> Tensor:
    """Logarithm of the sum of all exponentials of each pixel, (H, W)."""
    parts = [view.on_pixels(size, chunk).logsumexp(dim=0) for chunk in chunks]
    return torch.stack(parts).logsumexp(dim=0)


def _scaled(image: Tensor, scale: float) -> Tensor:
    """(C, h, w) at another size: bilinear without antialiasing, as the transforms of
    `data/dense/segmentation.py` resize. Papers' code starts from the stored image each time.
    """
    return resized(image[None], scaled_size(image.shape[-2:], scale))[0]


def _windows(length: int, crop: int, stride: int) -> list[slice]:
    """Windows over one side; the last one is moved back so that it ends with the side."""
    last = max(length - crop, 0)
    starts = [min(start, last) for start in range(0, last + stride, stride)]
    return [slice(start, start + min(crop, length)) for start in starts]
