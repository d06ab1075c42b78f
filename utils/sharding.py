"""FSDP2: parameters, gradients and optimizer states spread over the processes, files as without it.

`shard` cuts a model up in place. What is saved goes through `Gathered`, so that a checkpoint holds ordinary
whole tensors and loads on any number of processes, sharded or not. What is evaluated, timed or counted is a
`WholeCopy`.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import get_world_size, is_main

_LOG = logging.getLogger(__name__)

# Those whose states have the shape of their parameters: how any other state (Adafactor's factors) was cut up
# is not in a file.
OPTIMIZERS = ("adamw", "sgd")


class Stateful(Protocol):
    """A model, an optimizer, an average: what is saved and restored."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread the parameters of `model` over all processes, in place; returns the model.

    Each block is gathered before it runs and let go after it, in both directions; what is in no block (stem,
    last norm, head) stays gathered from the forward to the backward pass. Blocks are the modules that
    `layer_prefixes` names beyond the stem.

    Args:
        model: the same weights on all processes; on the CPU, so that it is never whole on a GPU. No
            deep copy can be made of it afterwards.
        device: of this process; the shards live there.

    Raises:
        ValueError: a parameter without dimensions, which cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(f"TRAIN.FSDP cannot shard {scalars}: they have no dimension; set it False")
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # channels_last weights are refused
    # It warns of in-place operations on the outputs of blocks that are views. No layer of ours has one: the
    # gradients of every architecture are tested.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (get_world_size(),))
    blocks = _blocks(model)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _LOG.info("FSDP: %d blocks over %d processes", len(blocks), get_world_size())
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Modules with parameters that the depths beyond the stem are made of, and that hold no other of them.

    The backbone of a dense model is a depth, for its last norms, and no block: parameters are gathered when a
    module is called, and of it only methods are.
    """
    modules = dict(model.named_modules())
    names = [name for depth in model.layer_prefixes()[1:] for name in depth if name in modules]
    return [
        modules[name]
        for name in names
        if any(True for _ in modules[name].parameters())
        and not any(other.startswith(f"{name}.") for other in names)
    ]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece, on every process; any other as it is. All processes must call it."""
    # By attribute: importing DTensor costs every start of the program.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Gathered:
    """Saves a sharded model, optimizer or average as if it were whole, and restores it from whole states.

    All processes call `state_dict` and `load_state_dict` together. The files are those of a run without
    FSDP: `torch.distributed.checkpoint` would rename an optimizer's states.

    Args:
        part: a module, a `ModelEma`, or an optimizer of `OPTIMIZERS`.
    """

    def __init__(self, part: Stateful) -> None:
        self.part = part

    def state_dict(self) -> Any:
        """The state with whole tensors on the CPU of rank 0; elsewhere None stands for them."""
        return _gathered(self.part.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from a state of whole tensors, the same on all processes."""
        if isinstance(self.part, torch.optim.Optimizer):
            parameters = [p for group in self.part.param_groups for p in group["params"]]
            scattered = {
                index: {name: _scattered(value, parameters[index]) for name, value in entry.items()}
                for index, entry in state["state"].items()
                if index < len(parameters)  # else the optimizer says what does not fit
            }
            self.part.load_state_dict({**state, "state": scattered})
            return
        own = self.part.state_dict()
        self.part.load_state_dict(
            {name: _scattered(value, own.get(name)) for name, value in state.items()}
        )


def _gathered(state: Any) -> Any:
    if hasattr(state, "full_tensor"):
        # One tensor at a time: the whole state may fit on no device.
        tensor = state.full_tensor()
        return tensor.cpu() if is_main() else None
    if isinstance(state, dict):
        return {key: _gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_gathered(value) for value in state)
    return state


def _scattered(value: Any, like: Any) -> Any:
    """This process's part of `value`, if `like` is cut up and has its shape (a step count has not)."""
    if not hasattr(like, "full_tensor") or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # No source rank: every process has read the file.
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


class WholeCopy:
    """A model in one piece on every process, for what needs no gradient.

    So evaluation is exact for any number of batches per process, runs in inference mode, and nobody waits
    for anybody. Between uses it lies in the memory of the host.

    Args:
        model: not sharded yet.

    Attributes:
        module: the copy; it has no weights of interest outside `holding`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).cpu()

    @contextmanager
    def holding(self, sharded: nn.Module, device: torch.device) -> Iterator[nn.Module]:
        """The copy on `device`, with the weights and buffers of `sharded`; all processes enter together."""
        state = sharded.state_dict()
        with torch.no_grad():
            for name, tensor in self.module.state_dict().items():
                tensor.copy_(whole(state[name]))
        try:
            yield self.module.to(device)
        finally:
            self.module.cpu()


def check_sharding(optimizer: str, compile_model: bool, amp_opt_level: str) -> None:
    """ValueError if TRAIN.FSDP cannot go with what other keys ask for.

    Args:
        optimizer: TRAIN.OPTIMIZER.NAME.
        compile_model: COMPILE.
        amp_opt_level: AMP_OPT_LEVEL.
    """
    if not dist.is_available():
        raise ValueError(
            "TRAIN.FSDP: this PyTorch is built without torch.distributed; set it False"
        )
    if optimizer.lower() not in OPTIMIZERS:
        raise ValueError(
            f"TRAIN.FSDP True with TRAIN.OPTIMIZER.NAME='{optimizer}': must be one of "
            f"{list(OPTIMIZERS)}, whose states are cut up as their parameters are"
        )
    if compile_model:
        raise ValueError("TRAIN.FSDP True excludes COMPILE True: set one of them False")
    if amp_opt_level in ("O1", "O2"):
        raise ValueError(
            f"TRAIN.FSDP True excludes AMP_OPT_LEVEL='{amp_opt_level}': Apex keeps whole copies of the "
            "weights; AMP_OPT_LEVEL '' with AMP_DTYPE 'auto' is native"
        )
