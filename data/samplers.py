"""Which images make up which batch, in every epoch and on any number of processes."""

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

_LOG = logging.getLogger(__name__)


class Key(NamedTuple):
    """One sample of one epoch. Workers that outlive an epoch learn it from here."""

    epoch: int
    index: int
    copy: int = 0  # which of the repetitions of repeated augmentation


class TrainBatchSampler(Sampler[list[Key]]):
    """Shuffled batches; all processes have the same number of them, all batches are full.

    An epoch is one permutation of all images, drawn from `seed + epoch` alone and cut into global
    batches of `batch_size * world_size`; process r takes every world_size-th image of each, from the
    r-th on. So the global batches depend on their size only, not on how many processes share them. What
    does not fill the last one is left out, other images in every epoch.

    Args:
        num_samples: images of the split.
        batch_size: images per process.
        repeats: each drawn image so many times in a row, as in repeated augmentation (arXiv:1901.09335),
            on different processes unless shards are fixed; an epoch has the usual length, so fewer images.
        fixed_shards: process r shuffles only images r, r + world_size, ..., so that it can keep its own
            share in memory; global batches then depend on the number of processes.

    Raises:
        ValueError: there are fewer images than one global batch has.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        repeats: int = 1,
        fixed_shards: bool = False,
    ) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.repeats, self.fixed_shards = repeats, fixed_shards
        self.epoch = self.start_batch = 0
        self.num_batches = num_samples // self.global_batch
        if not self.num_batches:
            raise ValueError(
                f"the training split has {num_samples} images, and one batch needs {self.global_batch} "
                f"(DATA.BATCH_SIZE={batch_size} on {world_size} processes): lower DATA.BATCH_SIZE to "
                f"at most {num_samples // world_size}"
            )

    @property
    def global_batch(self) -> int:
        """Images per batch of all processes together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever it starts."""
        return self.num_batches

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """What the next iteration yields: batches `start_batch` ... of `epoch`."""
        if not 0 <= start_batch <= self.num_batches:
            raise ValueError(
                f"start_batch={start_batch} must be from 0 to {self.num_batches}, the batches per epoch"
            )
        self.epoch, self.start_batch = epoch, start_batch

    def state(self, next_batch: int) -> dict[str, Any]:
        """Plain data from which `load_state` continues with `next_batch` of the current epoch."""
        images = next_batch * self.global_batch
        return {"epoch": self.epoch, "images": images, **self._order()}

    def load_state(self, state: dict[str, Any]) -> tuple[int, int]:
        """Continue where `state` was taken, also on another number of processes -> epoch, next batch.

        Warns if that is not exact: the global batch has another size, or an epoch another order.
        """
        for name, value in self._order().items():
            if state.get(name, value) != value:
                _LOG.warning(
                    "%s was %s and is %s: the rest of epoch %d is drawn in another order",
                    *(name, state[name], value, state["epoch"]),
                )
        start = min(state["images"] // self.global_batch, self.num_batches)
        again = state["images"] % self.global_batch
        if again and start < self.num_batches:
            _LOG.warning(
                "the checkpoint is %d images into epoch %d, not a multiple of the batch of %d: "
                "%d images are seen again",
                *(state["images"], state["epoch"], self.global_batch, again),
            )
        self.set_position(state["epoch"], start)
        return self.epoch, self.start_batch

    def _order(self) -> dict[str, int]:
        """What the order of an epoch depends on."""
        shards = self.world_size if self.fixed_shards else 1
        return dict(
            num_samples=self.num_samples, seed=self.seed, repeats=self.repeats, shards=shards
        )

    def indices(self) -> range:
        """All images that this process can draw, in any epoch."""
        if self.fixed_shards:
            return range(self.rank, self.num_samples, self.world_size)
        return range(self.num_samples)

    def __iter__(self) -> Iterator[list[Key]]:
        pool = self.indices()
        drawn, stride = (
            (self.batch_size, 1) if self.fixed_shards else (self.global_batch, self.world_size)
        )
        first = 0 if self.fixed_shards else self.rank
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(pool), generator=generator)
        # Place p of the epoch's sequence holds copy p % repeats of the (p // repeats)-th image drawn.
        for batch in range(self.start_batch, self.num_batches):
            places = torch.arange(batch * drawn + first, (batch + 1) * drawn, stride)
            positions = order[places // self.repeats].tolist()
            copies = (places % self.repeats).tolist()
            yield [
                Key(self.epoch, pool[position], copy)
                for position, copy in zip(positions, copies, strict=True)
            ]


class EvalBatchSampler(Sampler[list[Key]]):
    """Every image exactly once, in order, on any number of processes: nothing padded or dropped.

    The images are cut into batches once, and batch k belongs to process k % world_size: the batches are
    the same ones on any number of processes, and a process may have one more than another, or none.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self._batches = range(rank, math.ceil(num_samples / batch_size), world_size)

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self._batches)

    def indices(self) -> list[int]:
        """All images that this process reads."""
        return [key.index for batch in self for key in batch]

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self._batches:
            start = batch * self.batch_size
            stop = min(start + self.batch_size, self.num_samples)
            yield [Key(0, index) for index in range(start, stop)]
