"""What `Backbone.token_maps` is computed from: inputs that are kept, and attention written out."""

from typing import Any

import torch
from torch import Tensor, nn

# Entries of the attention matrices that are held at once; one query per image and head at least.
PIECE = 2**24


class LastInputs:
    """References to what was given to the blocks that are drawn, without their graphs.

    A copy of it (of the model that owns it) is empty, and so is a pickled one.
    """

    def __init__(self) -> None:
        self._inputs: dict[nn.Module, tuple[Any, ...]] = {}

    def keep(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Replace what is kept for `block`."""
        self._inputs[block] = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)

    def get(self, block: nn.Module, like: Tensor) -> tuple[Any, ...] | None:
        """What is kept for `block`, in the type of `like` (autocast may have had another) and where it is."""
        inputs = self._inputs.get(block)
        if inputs is None:
            return None
        return tuple(x.to(like) if isinstance(x, Tensor) else x for x in inputs)

    def clear(self) -> None:
        """Forget everything."""
        self._inputs.clear()

    def __deepcopy__(self, memo: dict) -> "LastInputs":
        return LastInputs()

    def __reduce__(self) -> tuple:
        return LastInputs, ()


def attention_probabilities(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale * q k^T + bias), float32 at least: (..., Q, d), (..., M, d) -> (..., Q, M)."""
    logits = q @ k.transpose(-2, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return (logits if bias is None else logits + bias).softmax(-1)


def attention_received(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Probability of each key, the mean over the queries: (B, h, Q, d), (B, h, M, d) -> (B, h, M)."""
    rows = max(1, PIECE // k[..., 0].numel())
    pieces = [attention_probabilities(part, k, scale).sum(-2) for part in q.split(rows, dim=-2)]
    return torch.stack(pieces).sum(0) / q.shape[-2]
