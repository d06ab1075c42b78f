"""Reference numbers of the published code (tests/golden/*.npz), and the weights they were made with.

Weights and input follow a rule that depends on names and shapes alone, so a file holds results only.
"""

import json
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from config import load_config
from models import Backbone, build_model
from models.backbone import CONSTANT_BUFFERS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "golden"
MANIFEST: dict[str, dict[str, Any]] = json.loads((FOLDER / "manifest.json").read_text())

_NEAR_ONE = ("alpha", "scale")
_TABLES = ("embed", "token", "table", "complex_weights")


def fill_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value that the golden files gave to the state-dict entry `name`."""
    leaf = name.rsplit(".", 1)[-1]
    noise = _normal(name, shape)
    if leaf == "running_var":
        return np.abs(np.float32(0.1) * noise) + np.float32(1)
    if leaf == "running_mean":
        return np.float32(0.1) * noise
    if leaf in _NEAR_ONE or (leaf == "weight" and len(shape) == 1):
        return np.float32(1) + np.float32(0.1) * noise
    if len(shape) < 2 or leaf == "beta" or any(word in leaf for word in _TABLES):
        return np.float32(0.02) * noise
    return noise / np.float32(math.sqrt(math.prod(shape[1:])))


def projection(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The fixed direction that the tensor `name` was projected on."""
    return _normal("proj:" + name, shape)


def oracle_input(size: int, batch: int = 2) -> Tensor:
    """The images (batch, 3, size, size) of the golden files."""
    generator = np.random.Generator(np.random.PCG64(0))
    return torch.from_numpy(generator.standard_normal((batch, 3, size, size), dtype=np.float32))


def fill_module_(module: nn.Module) -> nn.Module:
    """Give every floating-point entry of the state dict its golden value; constants stay."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not is_constant(name):
                tensor.copy_(torch.from_numpy(fill_value(name, tuple(tensor.shape))))
    return module


def is_constant(name: str) -> bool:
    """Whether a state-dict entry is a constant of the architecture that a model may leave out."""
    return name.rsplit(".", 1)[-1] in CONSTANT_BUFFERS


def relative_error(value: Tensor, reference: Any) -> float:
    """Norm of the difference over the norm of the reference."""
    reference = torch.as_tensor(reference, dtype=torch.float64)
    assert value.shape == reference.shape, f"{tuple(value.shape)} != {tuple(reference.shape)}"
    return ((value.double() - reference).norm() / reference.norm()).item()


def without_useful_gradient(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is missing, zero everywhere, or not finite somewhere."""
    return [
        name
        for name, p in module.named_parameters()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]


@dataclass(frozen=True)
class Trained:
    """One training forward and backward pass with the loss of the golden files."""

    outputs: list[Tensor]
    loss: float
    grads: dict[str, Tensor]


class Golden:
    """One golden file, and what our model gives with the same weights and images; each computed once."""

    def __init__(self, name: str):
        self.name = name
        self.entry = MANIFEST[name]
        with np.load(FOLDER / f"{name}.npz") as file:
            self.meta: dict[str, Any] = json.loads(str(file["meta_json"]))
            self.arrays = {key: file[key] for key in file.files if key != "meta_json"}
        # DGE was trained without its Gumbel noise, everything else as it is.
        self.train_meta: dict[str, Any] = self.meta.get("train_nogumbel") or self.meta["train"]

    def keys(self, prefix: str) -> list[str]:
        """Names of the arrays that start with `prefix`."""
        return [key for key in self.arrays if key.startswith(prefix)]

    @cached_property
    def images(self) -> Tensor:
        return oracle_input(self.entry["input_size"])

    @cached_property
    def model(self) -> Backbone:
        """The variant of the manifest's config file, without random regularisation, fresh weights."""
        config = load_config(ROOT / self.entry["config"])
        classes = self.entry["num_classes"]
        return build_model(config, num_classes=classes, drop_rate=0.0, drop_path_rate=0.0)

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """A checkpoint of the published code: its names, its shapes, the weights of the rule."""
        own = self.model.state_dict()
        state = {}
        for name, shape, dtype, _ in self.meta["state_dict"]:
            if dtype == "float32" and not is_constant(name):
                state[name] = torch.from_numpy(fill_value(name, tuple(shape)))
            elif is_constant(name) or name.endswith("num_batches_tracked"):
                state[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
            else:
                state[name] = own[name]
        return state

    @cached_property
    def evaluated(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs and token maps in evaluation mode; the maps of `forward_pyramid` for 0 classes."""
        self.model.load_state_dict(self.state_dict, strict=True)
        self.model.eval()
        with torch.no_grad():
            return self._forward(), self.model.token_maps()

    @cached_property
    def trained(self) -> Trained:
        """Loss (sum over the outputs of the mean square) and gradients in training mode."""
        self.model.load_state_dict(self.state_dict, strict=True)
        self.model.train()
        outputs = self._forward()
        loss = torch.stack([output.square().mean() for output in outputs]).sum()
        self.model.zero_grad()
        loss.backward()
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return Trained([output.detach() for output in outputs], loss.item(), grads)

    def _forward(self) -> list[Tensor]:
        if self.entry["num_classes"] == 0:
            return self.model.forward_pyramid(self.images)
        output = self.model(self.images)
        return [output] if isinstance(output, Tensor) else list(output)


def _normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    return generator.standard_normal(size=shape, dtype=np.float32)


class SkipInit(TorchFunctionMode):
    """Leaves out the in-place arithmetic of initialisation, which takes most of a build on shapes."""

    SKIPPED = frozenset(
        {"uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_", "zero_", "fill_"}
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
