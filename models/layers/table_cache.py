"""Tables that are made once: those of sizes alone, and resized ones while nothing writes to their source."""

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .eager import is_captured, is_transformed

_steps = 0  # of all optimizers of this process


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def state_of(table: Tensor) -> tuple[int, int, int]:
    """Changes with each write to `table`, and with a move; while the old storage lives, none is like before.

    Optimizers with `fused=True` write without a trace: after a step of any, all tables count as written to.
    """
    return table.data_ptr(), table._version, _steps


class Constants:
    """What depends on sizes, type and device alone, made once in a process.

    Nothing is kept while a compiler or a CUDA graph records the operations, nor of a fake or functional mode
    or a transform such as `torch.func.grad`.

    Args:
        limit: where so many are kept, all are forgotten: many sizes come by in detection, and what is
            kept must be cheap to make again.
        max_bytes: larger ones are not kept.
    """

    def __init__(self, limit: int, max_bytes: float = math.inf):
        self._limit = limit
        self._max_bytes = max_bytes
        self._kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor | tuple[Tensor, ...]]) -> Any:
        """`make()`, or what it gave for this `key`."""
        if torch.compiler.is_compiling():
            return make()
        if (kept := self._kept.get(key)) is not None:
            return kept
        # An inference tensor kept here could not be used by a later training step.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        tensors = (made,) if isinstance(made, Tensor) else made
        if all(self._may_keep(tensor) for tensor in tensors):
            if len(self._kept) >= self._limit:
                self._kept.clear()
            self._kept[key] = made
        return made

    def _may_keep(self, tensor: Tensor) -> bool:
        if type(tensor) is not Tensor or is_transformed(tensor) or is_captured(tensor):
            return False
        return tensor.untyped_storage().nbytes() <= self._max_bytes


class TableCache:
    """One resized copy per table, made again for another size or after any change of the table.

    A copy of the cache (of the model that owns it) is empty, and so is a pickled one.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]] = {}

    def get(
        self, name: str, table: Tensor, size: tuple[int, int], resize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`resize(table)`, computed or kept; `name` and `size` must determine what `resize` does.

        Nothing is kept where the table needs a gradient, or where a compiler, a transform or a CUDA graph
        records the operations.
        """
        learns = table.requires_grad and torch.is_grad_enabled()
        recorded = torch.compiler.is_compiling() or is_transformed(table)
        if recorded or learns or table.is_inference():
            return resize(table)
        key = (size, table.dtype, table.device, state_of(table))
        entry = self._entries.get(name)
        if entry is None or entry[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                # The source stays alive, so that no other table can come to lie at its address.
                entry = (key, table.detach(), resize(table))
            if not is_captured(entry[2]):
                self._entries[name] = entry
        return entry[2]

    def clear(self) -> None:
        """Forget all copies; for changes that bypass autograd's bookkeeping (`table.data`)."""
        self._entries.clear()

    def __deepcopy__(self, memo: dict) -> "TableCache":
        return TableCache()

    def __reduce__(self) -> tuple:
        return TableCache, ()
