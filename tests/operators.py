"""Which operators run, below autograd and autocast: what a GPU would launch, and what would wait for it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# They tell a number or a length to the CPU, or bring numbers from there.
_WAITING = ("nonzero", "_local_scalar_dense", "lift_fresh")


class Operators(TorchDispatchMode):
    """Records operators while it is entered.

    Attributes:
        names: of them, in order, without overloads.
        results: operator, shape and type of each tensor that came out.
        waits: how many of them a GPU and the CPU would wait for each other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: list[tuple[str, torch.Size, torch.dtype]] = []
        self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.names.append(name)
        self.waits += name in _WAITING
        if name in ("index", "index_put", "index_put_"):
            self.waits += sum(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        out = func(*args, **(kwargs or {}))
        parts = out if isinstance(out, tuple | list) else (out,)
        self.results += [(name, x.shape, x.dtype) for x in parts if isinstance(x, Tensor)]
        return out
