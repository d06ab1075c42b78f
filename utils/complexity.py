"""What a forward pass costs: parameters, multiply-adds and activations, per module, by counting.

Multiply-adds are those of matrix products and convolutions, attention included: half the figure of
`torch.utils.flop_counter`. Fourier transforms have their own column (see `fft_flops`), since papers
leave them out; element-wise work counts nothing: neither the bilinear samples of DPVT, nor the products of a
query with its k * k neighbours in DilateFormer, about 0.4 % of its smallest variant's count.
"""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.flop_counter import FlopCounterMode

from .names import is_under
from .wrappers import unwrap

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModuleCost:
    """Cost of one module with all that it contains; the model itself has the name ''.

    Attributes:
        params: parameters, shared ones once, frozen ones included.
        macs: multiply-adds.
        fft_flops: floating-point operations of Fourier transforms.
        activations: elements that modules without children put out, as a measure of memory traffic and
            of what training keeps (functions between the modules are not seen).
        activation_mib: the same in MiB.
    """

    name: str
    kind: str
    params: int
    macs: float
    fft_flops: float
    activations: int
    activation_mib: float


@dataclass(frozen=True)
class Complexity:
    """Costs of one forward pass in evaluation mode; `modules` lists the tree in order, root first.

    Attributes:
        layer_outputs: elements that convolutions and linear layers put out, called as functions or not; of
            batched products those with an offset (layers that put out planes), as attention's have none.
    """

    input_shape: tuple[int, ...]
    device: str
    modules: tuple[ModuleCost, ...]
    layer_outputs: int

    @property
    def params_m(self) -> float:
        """Parameters in millions."""
        return self.modules[0].params / 1e6

    @property
    def gmacs(self) -> float:
        """Multiply-adds of matrix products and convolutions / 1e9."""
        return self.modules[0].macs / 1e9

    @property
    def fft_gmacs(self) -> float:
        """Fourier transforms, as multiply-adds (two operations each) / 1e9."""
        return self.modules[0].fft_flops / 2e9

    @property
    def activations_m(self) -> float:
        """Elements of module outputs in millions."""
        return self.modules[0].activations / 1e6

    def per_image(self) -> "Complexity":
        """Means over the images of the batch that was counted."""
        images = self.input_shape[0]
        modules = tuple(
            replace(
                m,
                macs=m.macs / images,
                fft_flops=m.fft_flops / images,
                activations=round(m.activations / images),
                activation_mib=m.activation_mib / images,
            )
            for m in self.modules
        )
        shape = (1, *self.input_shape[1:])
        return Complexity(shape, self.device, modules, round(self.layer_outputs / images))

    def to_dict(self, depth: int = 2) -> dict[str, Any]:
        """Plain data for JSON: totals, and the modules down to `depth`."""
        return {
            "params_m": self.params_m,
            "gmacs": self.gmacs,
            "fft_gmacs": self.fft_gmacs,
            "activations_m": self.activations_m,
            "activation_mib": self.modules[0].activation_mib,
            "input_shape": list(self.input_shape),
            "modules": [asdict(module) for module in self._down_to(depth)],
        }

    def to_text(self, depth: int = 2) -> str:
        """Table of the modules down to `depth`, for a terminal."""
        rows = [("module", "type", "params M", "GMACs", "FFT GMACs", "act. M", "act. MiB")]
        for m in self._down_to(depth):
            indent = "  " * (m.name.count(".") + 1 if m.name else 0)
            figures = (m.params / 1e6, m.macs / 1e9, m.fft_flops / 2e9, m.activations / 1e6)
            rows.append(
                (
                    indent + (m.name.rpartition(".")[2] or "total"),
                    m.kind,
                    *(f"{figure:.3f}" for figure in figures),
                    f"{m.activation_mib:.1f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i < 2 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _down_to(self, depth: int) -> list[ModuleCost]:
        """Modules at most `depth` levels below the model; those that cost nothing are left out."""
        return [
            m
            for m in self.modules
            if (not m.name or m.name.count(".") < depth)
            and (not m.name or m.params or m.macs or m.activations)
        ]


def count(model: nn.Module, example: Sequence[int] | Tensor) -> Complexity:
    """Count one forward pass of `model` in evaluation mode; the model stays as it is.

    It runs on the meta device, where shapes are computed and numbers are not, so that large models take
    seconds. A model whose shapes depend on numbers (DGE's gates) runs for real instead, on its own
    device, and its counts are those of that example.

    Args:
        model: may be wrapped (DDP, torch.compile).
        example: (C, H, W) of one image, or an input batch (B, C, H, W); counts are of the whole batch.
    """
    model = unwrap(model)
    own = next(model.parameters(), torch.empty(0)).device
    if not isinstance(example, Tensor):
        # A fixed draw: counts that depend on numbers must be the same on each run.
        example = torch.randn(1, *example, generator=torch.Generator().manual_seed(0))
    try:
        return _count(_on_meta(model), example.to("meta"), model)
    except (NotImplementedError, RuntimeError) as error:
        _LOG.info("counting on %s, not on the meta device (%s)", own, str(error).split("\n")[0])
    was_training = {module: module.training for module in model.modules()}
    try:
        return _count(model.eval(), example.to(own), model)
    finally:
        for module, training in was_training.items():
            module.training = training


def fft_flops(points: int, batch: int, is_complex: bool) -> float:
    """Floating-point operations of `batch` transforms of `points` points each (all axes together).

    The usual convention (FFTW's benchmarks): 5 N log2 N for a complex transform, half of it for one
    between real and complex numbers.
    """
    return (5.0 if is_complex else 2.5) * batch * points * math.log2(max(points, 1))


def _transform(shape: Sequence[int], dim: Sequence[int], is_complex: bool) -> float:
    """`fft_flops` of a transform over the axes `dim` of an array of `shape`."""
    points = math.prod(shape[d] for d in dim)
    return fft_flops(points, math.prod(shape) // max(points, 1), is_complex)


# Between real and complex numbers, N is the length of the real side.
_FFT = {
    torch.ops.aten._fft_r2c: lambda x, dim, *_, **__: _transform(x, dim, False),
    torch.ops.aten._fft_c2r: lambda x, dim, *_, out_shape, **__: _transform(out_shape, dim, False),
    torch.ops.aten._fft_c2c: lambda x, dim, *_, **__: _transform(x, dim, True),
}


def _elements(*_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return math.prod(out_shape)


# What layers become; the counter sees the shape of each result.
_LAYERS = dict.fromkeys(
    (
        torch.ops.aten.addmm,
        torch.ops.aten.baddbmm,
        torch.ops.aten.convolution,
        torch.ops.aten._convolution,
        torch.ops.aten.mm,
    ),
    _elements,
)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` without its numbers, in evaluation mode; nothing large is ever copied."""
    tensors: dict[int, Any] = {}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
    for buffer in model.buffers():
        tensors[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, tensors).eval()


def _count(model: nn.Module, example: Tensor, named: nn.Module) -> Complexity:
    elements: dict[str, int] = {}
    sizes: dict[str, int] = {}
    given: dict[str, set[tuple[int, int]]] = {}
    leaves = {
        module: name
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    }

    def note(module: nn.Module, inputs: Any) -> None:
        if module in leaves:
            given[leaves[module]] = {(id(tensor), tensor._version) for tensor in _tensors(inputs)}

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if module not in leaves:
            return
        name = leaves[module]
        for tensor in _tensors(output):
            # What passes through unchanged (Identity, Dropout in evaluation) is no new tensor; what is
            # overwritten would be one in training.
            if (id(tensor), tensor._version) in given[name]:
                continue
            elements[name] = elements.get(name, 0) + tensor.numel()
            sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()

    # Not hooks of the layers, for which models would leave their faster ways (`models/layers/plain.py`).
    hooks = [register_module_forward_pre_hook(note), register_module_forward_hook(record)]
    counter = FlopCounterMode(display=False, custom_mapping=_FFT)
    outputs = FlopCounterMode(display=False, custom_mapping=_LAYERS)
    # A model may have a faster way of its own (`Backbone.counting`); its cost must not depend on it.
    counting = getattr(model, "counting", nullcontext)
    try:
        # The plain attention is made of matrix products, which every device and version counts.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting(), counter, outputs:
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    flops = counter.get_flop_counts()
    root = type(model).__name__
    costs = []
    for name, module in named.named_modules():
        macs, fft = _flops(flops, root, name, module)
        costs.append(
            ModuleCost(
                name,
                type(module).__name__,
                sum(p.numel() for p in module.parameters()),
                macs / 2,
                fft,
                sum(n for leaf, n in elements.items() if _inside(leaf, name)),
                sum(n for leaf, n in sizes.items() if _inside(leaf, name)) / 2**20,
            )
        )
    by_kind = outputs.get_flop_counts().get("Global", {})
    layer_outputs = sum(by_kind.get(kind, 0) for kind in _LAYERS)
    return Complexity(tuple(example.shape), example.device.type, tuple(costs), layer_outputs)


def _flops(
    counts: Mapping[str, Mapping[Any, float]], root: str, name: str, module: nn.Module
) -> tuple[float, float]:
    """(operations of products, of Fourier transforms) in module `name`."""
    full = "Global" if not name else f"{root}.{name}"
    if full in counts:
        own = counts[full]
        fft = sum(n for op, n in own.items() if op in _FFT)
        return sum(own.values()) - fft, fft
    # A container such as ModuleList is never called: it costs what its children cost.
    parts = [
        _flops(counts, root, f"{name}.{child}", below) for child, below in module.named_children()
    ]
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def _inside(leaf: str, name: str) -> bool:
    return not name or is_under(leaf, name)  # the whole model has no name


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
