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
        self.own: dict[int, Tensor] = {}  # a worker's that it has sent, by number
        self._turn = 0
        self._mapped: dict[
            tuple[int, int], Tensor
        ] = {}  # the training process's, by worker and number
        _MEMORIES[self.key] = self

    def take(self, worker: int, shape: tuple[int, ...]) -> "Slot":
        """In a worker: its next slot, as uint8 of `shape` with whatever was there."""
        number, self._turn = self._turn, (self._turn + 1) % self.slots
        memory, size = self.own.get(number), torch.Size(shape).numel()
        if memory is None or len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8).share_memory_()
        return Slot(self, (worker, number), memory, memory[:size].view(shape))

    def find(self, place: tuple[int, int], memory: Tensor | None) -> Tensor:
        """In the training process: the slot at a worker's place, which comes along when it is new."""
        if memory is not None:
            self._mapped[place] = memory
        return self._mapped[place]

    def __len__(self) -> int:
        """In the training process: how many slots its workers have."""
        return len(self._mapped)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh has no slots yet, and reads none.
        return dict(slots=self.slots, key=self.key, own={}, _turn=0, _mapped={})


class Slot:
    """A batch in shared memory; in the training process it arrives as a tensor."""

    def __init__(
        self, owner: BatchMemory, place: tuple[int, int], memory: Tensor, images: Tensor
    ) -> None:
        self.images = images
        self._owner, self._place, self._memory = owner, place, memory

    def __getitem__(self, rows: slice) -> "Slot":
        """The first rows."""
        return Slot(self._owner, self._place, self._memory, self.images[rows])

    def __reduce__(self) -> tuple[Any, ...]:
        # Sent, and only now the worker's: of a batch that fails on the way nothing arrives.
        number, memory = self._place[1], self._memory
        is_new = self._owner.own.get(number) is not memory
        self._owner.own[number] = memory
        shape = tuple(self.images.shape)
        return _received, (self._owner.key, self._place, shape, memory if is_new else None)


def _received(
    key: str, place: tuple[int, int], shape: tuple[int, ...], memory: Tensor | None
) -> Tensor:
    slot = _MEMORIES[key].find(place, memory)
    return slot[: torch.Size(shape).numel()].view(shape)
