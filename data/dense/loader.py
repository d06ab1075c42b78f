"""Samples and batches of dense tasks: images of different sizes, with boxes or masks.

A batch is (images, targets): images (B, C, H, W), normalised, padded with zeros at the right and the bottom
to a multiple of some number of pixels; targets is a list of dicts, of which tasks know the keys. `size`
(h, w) is the part of an image that is no padding.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import Loader, Samples, preserved_rng, seed_rng
from data.masks import IGNORED
from data.samplers import Key
from data.transforms import Picture

Target = dict[str, Any]


class RawDenseBatch(NamedTuple):
    """What a worker delivers: images (B, C, H, W) uint8, and B targets."""

    images: Tensor
    targets: list[Target]


class DenseSamples(Samples):
    """Augmented images with their targets, by `Key`.

    `transform` is called with the decoded image, uint8 (H, W, C), and the stored target, and gives a uint8
    tensor (C, h, w) with the target in its pixels.

    Args:
        size_divisor: batches are padded to multiples of it, pixels.
    """

    advice = "replace the file, or take the image out of the data"

    def __init__(self, *args: Any, size_divisor: int = 32, **options: Any) -> None:
        super().__init__(*args, arrays=True, **options)
        self.size_divisor = size_divisor

    def check(self, index: int, image: Any, label: Any) -> None:
        """TypeError if a format gives no image; tasks know what is in targets."""
        self.check_image(index, image)

    def augment(self, image: Picture, label: Target, key: Key) -> tuple[Tensor, Target]:
        """An image as `read` gives it -> the sample of `key`; leaves the global generators seeded."""
        seed_rng(self.seed, *key)
        return self.transform(image, label)

    def __getitems__(self, keys: list[Key]) -> RawDenseBatch | None:
        """A batch; DataLoader calls it, so that generators are put back once."""
        with preserved_rng():
            return pad_to_batch(map(self._sample, keys), self.size_divisor, self.training)


def pad_to_batch(
    samples: Iterable[tuple[Tensor, Target] | None], size_divisor: int = 1, training: bool = True
) -> RawDenseBatch | None:
    """Samples that were not left out (None) -> a batch, or None.

    In training a target's `masks` (N, h, w) are padded with False and its `mask` (h, w) with 255, as the
    image is with 0; in evaluation they are those of the stored image.
    """
    samples = [sample for sample in samples if sample is not None]
    if not samples:
        return None
    height, width = (
        -(-max(image.shape[dim] for image, _ in samples) // size_divisor) * size_divisor
        for dim in (1, 2)
    )
    images = torch.zeros(len(samples), samples[0][0].shape[0], height, width, dtype=torch.uint8)
    targets = []
    for place, (image, target) in zip(images, samples, strict=True):
        h, w = image.shape[1:]
        place[:, :h, :w] = image
        grown = dict(target)
        for name, fill in (("masks", False), ("mask", IGNORED)):
            if training and name in target:
                grown[name] = F.pad(target[name], (0, width - w, 0, height - h), value=fill)
        targets.append(grown)
    return RawDenseBatch(images, targets)


class DenseLoader(Loader):
    """Batches of one split for one process: images (B, C, H, W) on the device, targets still on the CPU."""

    def finished(self, batch: RawDenseBatch) -> tuple[Tensor, list[Target]]:
        """Normalised floats, zero in the padding."""
        finished = self.finish(self._moved(batch.images), None)
        for image, target in zip(finished, batch.targets, strict=True):
            height, width = target["size"]
            image[:, height:] = 0
            image[:, :, width:] = 0
        return finished, batch.targets
