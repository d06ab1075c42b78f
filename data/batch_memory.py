"""Memory that workers write their batches into, and that the training process reads them from.

Left to itself, PyTorch's loader allocates shared memory for each batch, copies the batch there, and maps it
anew in the training process: for large batches of small images a fifth of a worker's time. Here a worker
allocates a few slots once, fills them in turn, and sends the number of a slot.
"""

import uuid
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# By key: those of this process. A message from a worker finds the one that it belongs to.
_MEMORIES: WeakValueDictionary[str, "BatchMemory"] = WeakValueDictionary()


class BatchMemory:
    """Slots of the workers of one loader.

    A batch is valid until its worker has filled `slots - 1` others. So `slots` must be one more than the
    batches that a worker has on the way at a time, and a batch be used before the next one is asked for.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.key = uuid.uuid4().hex
        self._own: dict[int, Tensor] = {}  # a worker's, by number
        self._turn = 0
        self._mapped: dict[
            tuple[int, int], Tensor
        ] = {}  # the training process's, by worker and number
        _MEMORIES[self.key] = self

    def take(self, worker: int, shape: tuple[int, ...]) -> "Slot":
        """In a worker: its next slot, as uint8 of `shape` with whatever was there."""
        number, self._turn = self._turn, (self._turn + 1) % self.slots
        memory, size = self._own.get(number), torch.Size(shape).numel()
        is_new = memory is None or len(memory) < size
        if is_new:
            memory = self._own[number] = torch.empty(size, dtype=torch.uint8).share_memory_()
        return Slot(
            self.key, (worker, number), memory[:size].view(shape), memory if is_new else None
        )

    def find(self, place: tuple[int, int], memory: Tensor | None) -> Tensor:
        """In the training process: the slot at a worker's place, which comes along when it is new."""
        if memory is not None:
            self._mapped[place] = memory
        return self._mapped[place]

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh has no slots yet, and reads none.
        return dict(slots=self.slots, key=self.key, _own={}, _turn=0, _mapped={})


class Slot:
    """A batch in shared memory; in the training process it arrives as a tensor."""

    def __init__(
        self, key: str, place: tuple[int, int], images: Tensor, memory: Tensor | None
    ) -> None:
        self.images = images
        self._key, self._place, self._memory = key, place, memory

    def __getitem__(self, rows: slice) -> "Slot":
        return Slot(self._key, self._place, self.images[rows], self._memory)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self._key, self._place, tuple(self.images.shape), self._memory)


def _received(
    key: str, place: tuple[int, int], shape: tuple[int, ...], memory: Tensor | None
) -> Tensor:
    slot = _MEMORIES[key].find(place, memory)
    return slot[: torch.Size(shape).numel()].view(shape)
