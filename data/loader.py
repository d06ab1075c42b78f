"""Samples and batches: the same ones for any number of workers and any start within an epoch."""

import logging
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset

from .registry import ImageDataset
from .samplers import EvalBatchSampler, Key, TrainBatchSampler
from .transforms import Transform, to_image

_LOG = logging.getLogger(__name__)

# What PIL and the archive readers raise for a damaged or missing file.
_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
# Unreadable images in a row after which skipping gives up: the disk is gone, not an image.
_MAX_SKIPS = 100


class UnreadableImageError(OSError):
    """A stored image is damaged or missing; the message names it."""


class Samples(Dataset):
    """Augmented samples of a dataset, by `Key`.

    The transform of a sample draws from generators that are seeded by (seed, epoch, index, copy) and put
    back afterwards. So a sample depends on its key alone, not on what its worker did before.

    Args:
        transform: PIL image -> tensor.
        training: whether an unreadable image is replaced by a readable one, or left out (None).
        on_error: "raise", or "skip" unreadable images, logged and counted.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        *,
        in_chans: int = 3,
        seed: int = 0,
        training: bool = False,
        on_error: str = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"DATA.ON_ERROR='{on_error}' must be one of ['raise', 'skip']")
        self.dataset, self.transform, self.in_chans = dataset, transform, in_chans
        self.seed, self.training, self.on_error = seed, training, on_error
        self._skipped = multiprocessing.get_context().Value("q", 0)

    @property
    def skipped(self) -> int:
        """How often an unreadable image was met, by all workers of this process, in all epochs."""
        return self._skipped.value

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | None:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[tuple[Tensor, int] | None]:
        """The samples of a batch; DataLoader calls it, so that generators are put back once."""
        with preserved_rng():
            return [self._sample(key) for key in keys]

    def _sample(self, key: Key) -> tuple[Tensor, int] | None:
        found = self._find(key.index)
        if found is None:
            return None
        image, label = found
        seed_rng(self.seed, *key)
        return self.transform(image), label

    def _find(self, index: int) -> tuple[Image.Image, int] | None:
        for attempt in range(_MAX_SKIPS):
            # The next one in the dataset's order: the same choice in every run.
            candidate = (index + attempt) % len(self)
            try:
                return self._read(candidate)
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

    def _read(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
            return to_image(image, self.in_chans), label
        except _READ_ERRORS as error:
            raise UnreadableImageError(
                f"cannot read {self.dataset.describe(index)}: {error} "
                "(replace the file, or set DATA.ON_ERROR skip)"
            ) from error


def seed_rng(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's CPU generator by `key`; neighbouring keys are unrelated."""
    random.seed(" ".join(map(str, key)))  # text is hashed (SHA-512), in the same way everywhere
    np.random.seed(random.getrandbits(32))
    # Not torch.manual_seed: it leaves a note for CUDA each time, and in a worker they pile up.
    torch.default_generator.manual_seed(random.getrandbits(63))


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


def collate(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor] | None:
    """Samples -> images (B, C, H, W) and labels (B,) int64; those left out are None, or the whole batch."""
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    images, labels = zip(*kept, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


class Loader(DataLoader):
    """Batches of one split for one process: images (B, C, H, W) and labels (B,).

    Training starts an epoch with `set_position(epoch)`; `len(loader)` is always that of a whole epoch.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: TrainBatchSampler | EvalBatchSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            samples,
            batch_sampler=sampler,
            num_workers=num_workers,
            pin_memory=pin_memory and torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            collate_fn=collate,
            # Its own generator: starting an epoch must not draw from the model's.
            generator=torch.Generator().manual_seed(samples.seed),
        )

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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            if batch is not None:
                yield batch

    def check_worker_number_rationality(self) -> None:
        """PyTorch's own warning knows neither the config key nor the other processes."""


def warn_of_too_many_workers(num_workers: int, local_processes: int = 1) -> None:
    """Log a warning if the workers of all processes of this machine are more than it has CPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers * local_processes > cpus:
        _LOG.warning(
            "DATA.NUM_WORKERS=%d is per process: %d workers share %d CPUs and may slow each other down; "
            "try DATA.NUM_WORKERS %d",
            *(num_workers, num_workers * local_processes, cpus, cpus // local_processes),
        )
