"""Small datasets as a whole on the device: batches without workers, copies or waiting.

A sample is cut out, mirrored and erased by the numbers that a worker would draw for its key, so the batches
are those of `Loader`, bit for bit where the noise of erasing has the same device.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data import ResizeKeepRatio
from torch import Tensor
from torchvision import transforms

from .finish import Erasure, Finish
from .loader import Samples, Split, seeded
from .samplers import EvalBatchSampler, Key, TrainBatchSampler
from .transforms import PaddedCrop, RandomFlip

_LOG = logging.getLogger(__name__)

# Parts of a training transform that do the same to an image every time.
_FIXED = (partial, transforms.Resize, ResizeKeepRatio)


class DeviceLoader(Split):
    """The batches of `Loader`, from images that lie on `device`: (B, C, H, W) float32, and labels (B,).

    Args:
        samples: of a dataset that holds its images as arrays; what its transform does without chance is
            done once, here.

    Raises:
        ValueError: the dataset's images are files, or have different sizes, or the transform has parts that
            cannot run on a batch.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: TrainBatchSampler | EvalBatchSampler,
        finish: Finish,
        *,
        device: torch.device | None = None,
    ) -> None:
        check_on_device(samples)
        self.dataset, self.batch_sampler, self.finish = samples, sampler, finish
        parts = samples.transform.transforms
        chance = [part for part in parts if isinstance(part, PaddedCrop | RandomFlip)]
        self.crop = next((part for part in chance if isinstance(part, PaddedCrop)), None)
        self.flips = [part for part in chance if isinstance(part, RandomFlip)]
        fixed = transforms.Compose([part for part in parts if part not in chance])
        pixels, labels = [], []
        for index in range(len(samples)):
            image, label = samples.read(index)
            pixels.append(fixed(image))  # (H, W, C)
            labels.append(label)
        if len({image.shape for image in pixels}) != 1:
            raise ValueError(
                "DATA.ON_DEVICE=True: the images have different sizes; set DATA.ON_DEVICE False"
            )
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        self.images = images.to(device)  # (N, C, H, W) uint8
        self.labels = torch.tensor(labels, dtype=torch.int64, device=device)
        _LOG.info(
            "%d images on %s, %.1f MiB", len(images), self.images.device, images.nbytes / 2**20
        )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for keys in self.batch_sampler:
            indices = self._on_device([key.index for key in keys])
            drawn = [self._draw(key) for key in keys]
            images = self._cut(indices, drawn) if drawn[0][0] else self.images[indices]
            rows = [(i, *erasure) for i, (_, erasures) in enumerate(drawn) for erasure in erasures]
            yield self.finish(images, torch.tensor(rows, dtype=torch.int64)), self.labels[indices]

    def _draw(self, key: Key) -> tuple[tuple[int, ...], list[Erasure]]:
        """Top and left of the crop and whether to flip, in the order of the transform, and what to erase."""
        samples = self.dataset
        if not samples.training:
            return (), []
        rng = seeded(samples.seed, *key)
        height, width = self.images.shape[2:]
        place: tuple[int, ...] = ()
        if self.crop:
            place = self.crop.draw(rng, height, width)
            height, width = self.crop.size
        place += tuple(int(flip.draw(rng)) for flip in self.flips)
        return place, samples.erasing.draw(rng, height, width) if samples.erasing else []

    def _cut(self, indices: Tensor, drawn: Sequence[tuple[tuple[int, ...], Any]]) -> Tensor:
        """Crop and mirror whole images: every pixel of the batch is fetched from where it was stored."""
        columns = self._on_device([place for place, _ in drawn]).unbind(1)  # each (B,)
        top, left, *flips = columns if self.crop else (0 * columns[0], 0 * columns[0], *columns)
        flipped = {flip.axis: value for flip, value in zip(self.flips, flips, strict=True)}
        sides = self.images.shape[2:]
        window, padding, reflect = sides, (0, 0), False
        if self.crop:
            window, padding, reflect = self.crop.size, self.crop.padding, self.crop.reflect
        sources, inside = [], []
        for axis, start in enumerate((top, left)):
            place = torch.arange(window[axis], device=start.device)[None]  # (1, window)
            if axis in flipped:
                place = torch.where(flipped[axis][:, None] == 1, window[axis] - 1 - place, place)
            source = place + start[:, None] - padding[axis]  # (B, window), outside in the padding
            last = sides[axis] - 1
            mirrored = last - (last - source.abs()).abs()
            inside.append(torch.ones_like(source) if reflect else (source == mirrored).long())
            sources.append(mirrored)
        rows, columns = sources
        channels = torch.arange(self.images.shape[1], device=self.images.device)
        images = self.images[
            indices[:, None, None, None],
            channels[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        kept = inside[0][:, None, :, None] * inside[1][:, None, None, :]  # (B, 1, H, W)
        return images * kept.to(torch.uint8)

    def _on_device(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.images.device, non_blocking=True)


def check_on_device(samples: Samples) -> None:
    """ValueError if the samples cannot be made on the device; reads the first image."""
    if samples.maps:
        raise ValueError(
            "DATA.ON_DEVICE=True: TRAIN.TOKEN_LABELS.MAPS are read by workers; set DATA.ON_DEVICE False"
        )
    if not isinstance(samples.dataset.read(0)[0], np.ndarray):
        raise ValueError(
            "DATA.ON_DEVICE=True: the dataset reads files, and only formats that hold their images as "
            "arrays (cifar10, digits, ...) fit on the device; set DATA.ON_DEVICE False"
        )
    if not samples.training:
        return
    allowed = (*_FIXED, PaddedCrop, RandomFlip)
    refused = [part for part in samples.transform.transforms if not isinstance(part, allowed)]
    if refused:
        raise ValueError(
            f"DATA.ON_DEVICE=True: {', '.join(type(part).__name__ for part in refused)} cannot run there. "
            "Set AUG.AUTO_AUGMENT none and AUG.COLOR_JITTER 0, and beyond 32 pixels AUG.CROP simple; or "
            "DATA.ON_DEVICE False"
        )
