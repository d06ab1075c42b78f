"""When eager mode on a CPU may take shortcuts that compilers, exporters and tracers must not see."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Values of the widest map of a piece, for what makes a few of them: 2 MiB of float32.
PIECE = 2**19


def eager_on_cpu(x: Tensor) -> bool:
    """Whether `x` has numbers on a CPU, and nothing records what is done with it but autograd."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def can_split(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` may take a batch piece by piece: in evaluation, without gradients, eager on a CPU."""
    return not module.training and not torch.is_grad_enabled() and eager_on_cpu(x)


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, length: int) -> Tensor:
    """`function` over pieces of at most `length` along the first axis, the results side by side.

    What `function` makes on the way then stays in the caches: whole maps of an early stage do not fit, and
    the memory for each of them comes from the system page by page. Hooks inside see the pieces.

    Args:
        function: computes the rows (or images) of its argument independently.
        length: at least one is taken.
    """
    length = max(1, length)
    if len(x) <= length:
        return function(x)
    out = None
    for start in range(0, len(x), length):
        piece = function(x[start : start + length])
        if out is None:
            out = piece.new_empty(len(x), *piece.shape[1:])
        out[start : start + length] = piece
    return out
