"""When eager mode on a CPU may take shortcuts that compilers, exporters and tracers must not see."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import ceil

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

# Values of the widest map of a piece, for what makes a few of them: 8 MiB of float32 per two threads.
PIECE = 2**21

# Positions that linear layers have in a piece at least: their weights are laid out anew for each piece.
POSITIONS = 1600


_PLAIN = ContextVar("plain", default=False)


@contextmanager
def plain_operators() -> Iterator[None]:
    """Within it models are made of PyTorch's own operators alone, fused attention not among them.

    They can be differentiated any number of times: gradients of gradients (Hessians, gradient penalties)
    have their forward pass in it. `torch.func` and forward-mode differentiation need it for attention only,
    of which PyTorch's fused kernels have no such derivatives. Slower, and more memory.
    """
    token = _PLAIN.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _PLAIN.reset(token)


def are_plain() -> bool:
    """Whether `plain_operators` is on."""
    return not torch.compiler.is_compiling() and _PLAIN.get()


def is_eager(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing but autograd records what is done with `x` and others, and shortcuts are allowed."""
    recorded = type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if recorded or _PLAIN.get() or _is_transformed(x):
        return False
    return not any(tensor is not None and _is_transformed(tensor) for tensor in others)


def eager_on_cpu(x: Tensor, *others: Tensor | None) -> bool:
    """`is_eager`, with numbers on a CPU."""
    return x.device.type == "cpu" and is_eager(x, *others)


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, also in code that PyTorch 2.11 compiles, where it is always True.

    A compiler runs this for a constant, unless it comes upon it between two graphs: then it compiles it too.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def compiled_for_cpu(x: Tensor) -> bool:
    """Whether a compiler, and no exporter, makes code of what is done with `x` on a CPU."""
    compiled = torch.compiler.is_compiling() and not is_exporting()
    return compiled and x.device.type == "cpu"


def may_keep(compiled: bool = False) -> bool:
    """Whether a forward pass may keep on the model what it computes, for those who ask for it later.

    Exported and traced passes have no numbers: what they would leave behind are stand-ins of an exporter.

    Args:
        compiled: keep it in compiled passes too, where it is one more output of the graph.
    """
    if is_exporting() or torch.jit.is_tracing():
        return False
    return compiled or not torch.compiler.is_compiling()


def is_captured(x: Tensor) -> bool:
    """Whether `x` was made for a CUDA graph: it has no numbers before a replay, and new ones after each."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_transformed(x: Tensor) -> bool:
    """Whether `x` belongs to a transform such as `torch.vmap`, or carries derivatives forward."""
    return not torch.compiler.is_compiling() and _is_transformed(x)


def _is_transformed(x: Tensor) -> bool:
    if type(x) not in (Tensor, nn.Parameter):
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # it has no memory of its own
        return True
    return forward_ad.unpack_dual(x).tangent is not None


def channels_last(x: Tensor) -> Tensor:
    """The map (B, C, H, W) in that memory format, of which `torch.vmap` knows nothing."""
    return x if is_transformed(x) else x.contiguous(memory_format=torch.channels_last)


def may_overwrite(x: Tensor) -> bool:
    """Whether the only reader of `x` may write over it: eager on a CPU, without gradients.

    Fresh memory for a wide map comes from the system page by page, which may take longer than the arithmetic.
    """
    return eager_on_cpu(x) and not torch.is_grad_enabled()


def add_owned(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the memory of `x` if that `may_overwrite`."""
    return x.add_(y) if may_overwrite(x) else x + y


def in_pieces_if_idle(
    module: nn.Module,
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    values: int,
    positions: int = 0,
) -> Tensor:
    """`function(x)`, a part of `module`; in evaluation without gradients, eager on a CPU, `in_pieces`.

    Args:
        values: of the widest map that `function` makes of one row (or image), see `piece`.
        positions: of one row (or image) in wide linear layers; 0: there are none.
    """
    if module.training or torch.is_grad_enabled() or not eager_on_cpu(x):
        return function(x)
    length = max(ceil(POSITIONS / positions) if positions else 1, piece(values))
    if len(x) <= length or _mixes_images(module):
        return function(x)
    return in_pieces(function, x, length)


def _mixes_images(module: nn.Module) -> bool:
    """Whether a part of it may take statistics of the batch, though the whole is in evaluation."""
    parts = module.modules()
    return any(part.training or getattr(part, "running_var", part) is None for part in parts)


def piece(values: int) -> int:
    """How many rows (or images) a piece has, if the widest map of one holds so many values; at least 1."""
    threads = max(1, torch.get_num_threads() // 2)
    return max(1, PIECE * threads // max(1, values))


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, length: int) -> Tensor:
    """`function` over even pieces of at most `length` along the first axis, the results side by side.

    What `function` makes on the way then stays in the caches: whole maps of an early stage do not fit, and
    the memory for each of them comes from the system page by page. Hooks inside see the pieces.

    Args:
        function: computes the rows (or images) of its argument independently.
        length: see `piece`.
    """
    if len(x) <= length:
        return function(x)
    length = ceil(len(x) / ceil(len(x) / length))
    out = None
    for start in range(0, len(x), length):
        part = function(x[start : start + length])
        if out is None and is_transformed(part):  # by transforms of the weights
            return function(x)
        if out is None:
            out = _empty_for(len(x), part)
        out[start : start + length] = part
    return out


def _empty_for(length: int, part: Tensor) -> Tensor:
    """(length, ...) for parts like this one, in its memory layout."""
    last = part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (length, *part.shape[1:])
    return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
