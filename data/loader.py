"""Samples and batches: the same ones for any number of workers and any start within an epoch."""

import hashlib
import logging
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .batch_memory import BatchMemory, Slot
from .finish import Erasure, Finish, RandomErasing
from .label_maps import LabelMaps, MapLabel, MappedLabels
from .registry import DAMAGED, ImageDataset
from .samplers import EvalBatchSampler, Key, TrainBatchSampler
from .transforms import Picture, Transform, draw_window, to_image, to_pixels

_LOG = logging.getLogger(__name__)

# What PIL and the archive readers raise for a damaged or missing file.
_READ_ERRORS = (*DAMAGED, struct.error, zlib.error, zipfile.BadZipFile)
# Unreadable images in a row after which skipping gives up: the disk is gone, not an image.
_MAX_SKIPS = 100
# Batches that a worker has on the way at a time.
_PREFETCH = 2


class UnreadableImageError(OSError):
    """A stored image is damaged or missing; the message names it."""


class Sample(NamedTuple):
    """An augmented image, uint8 (H, W, C), its label, and what is to be erased of it."""

    pixels: np.ndarray
    label: int | MapLabel
    erasures: list[Erasure]


class RawBatch(NamedTuple):
    """What a worker delivers.

    Attributes:
        images: (B, C, H, W) uint8; in a worker with `BatchMemory` a slot, which arrives as a tensor.
        labels: (B,) int64, with maps if the samples have some.
        erasures: (K, 6) int64, rows of an `Erasure` behind the number of its image.
    """

    images: Tensor | Slot
    labels: Tensor | MappedLabels
    erasures: Tensor


class Samples(Dataset):
    """Augmented samples of a dataset, by `Key`.

    The transform of a sample draws from generators that are seeded by (seed, epoch, index, copy) and put
    back afterwards. So a sample depends on its key alone, not on what its worker did before.

    Args:
        transform: image with `in_chans` channels -> uint8 array (H, W, in_chans).
        arrays: give decoded images to `transform` as arrays (H, W, in_chans), not as PIL images.
        erasing: draws what is erased of a sample.
        maps: labels of the positions of images; labels become `MapLabel`s.
        training: whether an unreadable image is replaced by a readable one, or left out (None).
        on_error: "raise", or "skip" unreadable images, logged and counted.
    """

    advice = "replace the file, or set DATA.ON_ERROR skip"  # where an image is unreadable

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        *,
        in_chans: int = 3,
        seed: int = 0,
        training: bool = False,
        on_error: str = "raise",
        arrays: bool = False,
        erasing: RandomErasing | None = None,
        maps: LabelMaps | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"DATA.ON_ERROR='{on_error}' must be one of ['raise', 'skip']")
        self.dataset, self.transform, self.in_chans = dataset, transform, in_chans
        self.seed, self.training, self.on_error = seed, training, on_error
        self.convert = to_pixels if arrays else to_image
        self.erasing, self.maps = erasing, maps
        if maps:
            with preserved_rng():  # what cannot be followed is refused before an image is read
                draw_window(transform, 256, 256)
        self._skipped = multiprocessing.get_context().Value("q", 0)

    @property
    def skipped(self) -> int:
        """How often an unreadable image was met, by all workers of this process, in all epochs."""
        return self._skipped.value

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample | None:
        with preserved_rng():
            return self._sample(key)

    def __getitems__(self, keys: list[Key]) -> RawBatch | None:
        """A batch; DataLoader calls it, so that generators are put back once."""
        with preserved_rng():
            return collate(map(self._sample, keys), len(keys))

    def _sample(self, key: Key) -> Sample | None:
        found = self._find(key.index)
        return None if found is None else self.augment(*found, key)

    def augment(self, image: Picture, label: int | MapLabel, key: Key) -> Sample:
        """An image as `read` gives it -> the sample of `key`; leaves the global generators seeded."""
        if isinstance(label, MapLabel):
            seed_rng(self.seed, *key)
            label = label._replace(window=draw_window(self.transform, *image.shape[:2]))
        seed_rng(self.seed, *key)
        pixels = self.transform(image)
        height, width = pixels.shape[:2]
        erasures = self.erasing.draw(random, height, width) if self.erasing else []
        return Sample(pixels, label, erasures)

    def _find(self, index: int) -> tuple[Picture, int | MapLabel] | None:
        for attempt in range(_MAX_SKIPS):
            # The next one in the dataset's order: the same choice in every run.
            candidate = (index + attempt) % len(self)
            try:
                return self.read(candidate)
            except UnreadableImageError as error:
                if self.on_error == "raise":
                    raise
                with self._skipped.get_lock():
                    self._skipped.value += 1
                _LOG.warning("skipped: %s", error)
                if not self.training:
                    return None
        raise UnreadableImageError(
            f"{_MAX_SKIPS} unreadable images in a row, from {self.dataset.describe(index)} on: "
            "is the disk still there?"
        )

    def read(self, index: int) -> tuple[Picture, int | MapLabel]:
        """Stored image with `in_chans` channels, and its label; UnreadableImageError."""
        try:
            image, label = self.dataset[index]
            self.check(index, image, label)
            if self.maps:
                label = MapLabel(label, self.maps.read(self.dataset.describe(index)))
            return self.convert(image, self.in_chans), label
        except _READ_ERRORS as error:
            advice = f" ({self.advice})" if self.on_error == "raise" else ""
            raise UnreadableImageError(
                f"cannot read {self.dataset.describe(index)}: {error}{advice}"
            ) from error

    def check(self, index: int, image: Any, label: Any) -> None:
        """TypeError or IndexError if a format gives something else than `ImageDataset` says."""
        self.check_image(index, image)
        classes = len(self.dataset.classes)
        if isinstance(label, tuple):  # with the number of the image, see `NumberedImages`
            label = label[0]
        if not hasattr(label, "__index__"):
            raise TypeError(f"{self.dataset.describe(index)}: label {label!r} is no whole number")
        if not 0 <= label < classes:
            raise IndexError(
                f"{self.dataset.describe(index)}: label {label} must be in 0 ... {classes - 1}, the "
                f"{classes} names in `classes`"
            )

    def check_image(self, index: int, image: Any) -> None:
        """TypeError if a format gives no image."""
        if isinstance(image, Image.Image) or getattr(image, "dtype", None) == np.uint8:
            return
        kind = f"an array of {image.dtype}" if hasattr(image, "dtype") else type(image).__name__
        raise TypeError(
            f"{self.dataset.describe(index)}: {kind}, where a PIL image or an array of uint8 is expected"
        )


def seeded(*key: int) -> random.Random:
    """A generator of Python's, seeded by `key`; neighbouring keys are unrelated."""
    return random.Random(_text(key))


def seed_rng(*key: int) -> None:
    """Seed Python's generator as `seeded` does, and with it NumPy's and PyTorch's CPU generator."""
    text = _text(key)
    random.seed(text)
    # One hash: another generator of Python's would take as long to seed as all three of these.
    further = hashlib.blake2b(text.encode(), digest_size=12).digest()
    np.random.seed(int.from_bytes(further[:4], "big"))
    # Not torch.manual_seed: it leaves a note for CUDA each time, and in a worker they pile up.
    torch.default_generator.manual_seed(int.from_bytes(further[4:], "big"))


def _text(key: tuple[int, ...]) -> str:
    return " ".join(map(str, key))  # text is hashed (SHA-512), in the same way everywhere


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the generators of Python, NumPy and PyTorch's CPU back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# In a worker: where it writes its batches.
_memory: BatchMemory | None = None


def _start_worker(memory: BatchMemory, worker: int) -> None:
    global _memory
    _memory = memory
    _single_threaded()


def _new_batch(shape: tuple[int, ...]) -> Tensor | Slot:
    """uint8 of `shape`, for images."""
    worker = get_worker_info()
    if worker is None or _memory is None:
        return torch.empty(shape, dtype=torch.uint8)
    return _memory.take(worker.id, shape)


def collate(samples: Iterable[Sample | None], size: int) -> RawBatch | None:
    """At most `size` samples -> a batch of those that were not left out (None), or None.

    Each sample is written into the batch before the next one is made, so that its memory is used again.
    """
    images, planes, labels, erasures = None, None, [], []
    for pixels, label, erased in filter(None, samples):
        height, width, channels = pixels.shape
        if images is None:
            images = _new_batch((size, channels, height, width))
            planes = (images.images if isinstance(images, Slot) else images).numpy()
        # OpenCV writes into planes that fit, and would silently make others.
        assert planes.shape[1:] == (channels, height, width), (planes.shape, pixels.shape)
        cv2.split(pixels, list(planes[len(labels)]))  # several times as fast as a transposed copy
        erasures += [(len(labels), *erasure) for erasure in erased]
        labels.append(label)
    if images is None:
        return None
    return RawBatch(
        images[: len(labels)],
        _as_tensors(labels),
        torch.tensor(erasures, dtype=torch.int64).reshape(-1, 1 + len(Erasure._fields)),
    )


def _as_tensors(labels: list[int] | list[MapLabel]) -> Tensor | MappedLabels:
    if not isinstance(labels[0], MapLabel):
        return torch.tensor(labels, dtype=torch.int64)
    numbers, scores, windows = zip(*labels, strict=True)
    sizes = {part.shape for part in scores}
    if len(sizes) > 1:
        raise ValueError(f"TRAIN.TOKEN_LABELS.MAPS: maps must have one size, not {sorted(sizes)}")
    return MappedLabels(
        torch.tensor(numbers, dtype=torch.int64),
        torch.from_numpy(np.stack(scores)),
        torch.tensor(windows, dtype=torch.float32),
    )


def _as_it_is(batch: RawBatch | None) -> RawBatch | None:
    return batch


class Split:
    """What a loader of one split says of it and of where it is; `dataset` and `batch_sampler` make it up."""

    dataset: Samples
    batch_sampler: TrainBatchSampler | EvalBatchSampler

    @property
    def classes(self) -> list[str]:
        """Class names, by label."""
        return self.dataset.dataset.classes

    @property
    def skipped(self) -> int:
        """How often an unreadable image was skipped so far (DATA.ON_ERROR skip), on this process."""
        return self.dataset.skipped

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Training: what the next iteration yields."""
        self.batch_sampler.set_position(epoch, start_batch)

    def state(self, next_batch: int) -> dict[str, Any]:
        """Training: plain data from which `load_state` continues with `next_batch` of this epoch."""
        return self.batch_sampler.state(next_batch)

    def load_state(self, state: dict[str, Any]) -> tuple[int, int]:
        """Training: continue where `state` was taken -> epoch, next batch."""
        return self.batch_sampler.load_state(state)


class Loader(Split, DataLoader):
    """Batches of one split for one process: images (B, C, H, W) and labels (B,).

    Workers make uint8 images; `finish` makes floats of them on `device`, when a batch is asked for.
    Training starts an epoch with `set_position(epoch)`; `len(loader)` is always that of a whole epoch.

    Args:
        device: where the batches are wanted; None leaves them on the CPU.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: TrainBatchSampler | EvalBatchSampler,
        finish: Finish,
        *,
        device: torch.device | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        _single_threaded()
        self.memory = BatchMemory(slots=_PREFETCH + 1)
        super().__init__(
            samples,
            batch_sampler=sampler,
            num_workers=num_workers,
            # Only for a GPU: pinning makes a CUDA context, also for a run that must leave the GPU alone.
            pin_memory=pin_memory and device is not None and device.type == "cuda",
            persistent_workers=num_workers > 0,
            prefetch_factor=_PREFETCH if num_workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_start_worker, self.memory),
            # Its own generator: starting an epoch must not draw from the model's.
            generator=torch.Generator().manual_seed(samples.seed),
        )
        self.finish, self.device = finish, device

    def raw_batches(self) -> Iterator[RawBatch]:
        """Batches as the workers make them, each valid until the next one is asked for."""
        return (batch for batch in super().__iter__() if batch is not None)

    def finished(self, batch: RawBatch) -> tuple[Tensor, Tensor | MappedLabels]:
        """Images as floats on the device, and labels there."""
        images, labels = self._moved(batch.images), batch.labels
        if isinstance(labels, MappedLabels):
            labels = MappedLabels(*map(self._moved, labels))
        else:
            labels = self._moved(labels)
        return self.finish(images, batch.erasures), labels

    def _moved(self, part: Tensor) -> Tensor:
        # Unpinned memory may be that of a slot, which a worker fills anew.
        return part if self.device is None else part.to(self.device, non_blocking=part.is_pinned())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.finished, self.raw_batches())

    def check_worker_number_rationality(self) -> None:
        """PyTorch's own warning knows neither the config key nor the other processes."""


def _single_threaded() -> None:
    """One thread for OpenCV: workers are the parallelism, and its pool does not survive their fork."""
    cv2.setNumThreads(0)


def warn_of_too_many_workers(num_workers: int, local_processes: int = 1) -> None:
    """Log a warning if the workers of all processes of this machine are more than it has CPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers * local_processes > cpus:
        _LOG.warning(
            "DATA.NUM_WORKERS=%d is per process: %d workers share %d CPUs and may slow each other down; "
            "try DATA.NUM_WORKERS %d",
            *(num_workers, num_workers * local_processes, cpus, cpus // local_processes),
        )
