"""One process or many: who am I, and the few collective operations that the code base uses.

Every helper works without a process group too, so no caller asks how many processes there are.
"""

import datetime
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LOG = logging.getLogger(__name__)

# Slurm's reserved step numbers: the batch script, an interactive shell, the prolog's container.
_NO_STEP = {"4294967290", "4294967291", "4294967292"}

# Rank, processes, rank on the machine and processes there, as MPI launchers say it: Open MPI, and Hydra
# (MPICH, Intel MPI, MVAPICH). Slurm's own PMI sets PMI_RANK too, but none of the last two.
_MPI = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_MPI_PORT = 29500  # torchrun's default


@dataclass(frozen=True)
class Runtime:
    """This process among all: `rank` of `world_size`, `local_rank` of `local_world_size` on its machine."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0


@dataclass(frozen=True)
class Launch:
    """What a launcher's environment says; `init_method` is where the processes meet.

    `local_world_size` is 1 where the launcher does not say how many processes run on this machine.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    init_method: str = "env://"
    local_world_size: int = 1


def init_distributed(device: str = "auto", local_rank_flag: int | None = None) -> Runtime:
    """Find out how this process was started, choose its device, join the others if there are any.

    A single process gets no process group. Many use NCCL on GPUs, and gloo on CPUs or where PyTorch
    comes without NCCL (Windows).

    Args:
        device: auto (a GPU if there is one), cpu, cuda, or cuda:N for a single process.
        local_rank_flag: the value of `--local_rank`; older launchers pass it in place of LOCAL_RANK.

    Raises:
        ValueError: the launcher's environment is incomplete, or there is no such GPU.
    """
    launch = read_launch(os.environ, local_rank_flag)
    chosen = choose_device(device, launch, torch.cuda.device_count())
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launch.world_size > 1 and not dist.is_initialized():
        use_nccl = chosen.type == "cuda" and dist.is_nccl_available()
        if chosen.type == "cuda" and not use_nccl:
            _LOG.warning("this PyTorch has no NCCL: %d processes use gloo", launch.world_size)
        dist.init_process_group(
            "nccl" if use_nccl else "gloo",
            init_method=launch.init_method,
            rank=launch.rank,
            world_size=launch.world_size,
            device_id=chosen if use_nccl else None,
            timeout=datetime.timedelta(minutes=30),
        )
    return Runtime(
        launch.rank, launch.world_size, launch.local_rank, chosen, launch.local_world_size
    )


def read_launch(env: Mapping[str, str], local_rank_flag: int | None = None) -> Launch:
    """Environment variables -> how this process was started: torchrun, mpirun, Slurm, or by itself.

    torchrun's variables come first, then those of mpirun, whose processes on a cluster see Slurm's variables
    of the daemon that starts them. Slurm's count only inside a job step: a shell of `salloc`, or a batch
    script, sees SLURM_NTASKS too, and would wait for processes that nobody starts.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return _torchrun(env, local_rank_flag)
    for names in _MPI:
        if all(name in env for name in names) and _integer(env, names[1], 1) > 1:
            return _mpirun(env, *names)
    tasks = _integer(env, "SLURM_STEP_NUM_TASKS", _integer(env, "SLURM_NTASKS", 1))
    if tasks > 1:
        if env.get("SLURM_STEP_ID", "4294967291") not in _NO_STEP and "SLURM_PROCID" in env:
            return _slurm(env, tasks)
        _LOG.warning(
            "SLURM_NTASKS=%d, but this shell is no job step: running one process; start with srun",
            tasks,
        )
    if local_rank_flag:
        _LOG.warning(
            "--local_rank %d has no effect without a launcher: running one process; "
            "start many with torchrun --nproc_per_node N",
            local_rank_flag,
        )
    return Launch("none")


def _torchrun(env: Mapping[str, str], local_rank_flag: int | None) -> Launch:
    world_size = _integer(env, "WORLD_SIZE", 1)
    if world_size == 1:
        return Launch("torchrun")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if "LOCAL_RANK" not in env and local_rank_flag is None:
        missing.append("LOCAL_RANK")
    if missing:
        raise ValueError(
            f"WORLD_SIZE={world_size}, but {', '.join(missing)} is not set: start with "
            "torchrun --nproc_per_node N, or unset WORLD_SIZE and RANK to run one process"
        )
    rank = _integer(env, "RANK", 0)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} must be in range(WORLD_SIZE={world_size})")
    local_rank = _integer(env, "LOCAL_RANK", local_rank_flag or 0)
    return Launch(
        "torchrun",
        rank,
        world_size,
        local_rank,
        local_world_size=_integer(env, "LOCAL_WORLD_SIZE", 1),
    )


def _mpirun(
    env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str
) -> Launch:
    """What the variables of these names say; MPI tells nobody on which machine rank 0 runs."""
    tasks = _integer(env, size, 1)
    address = env.get("MASTER_ADDR")
    if not address and _integer(env, local_size, 1) < tasks:
        raise ValueError(
            f"{size}={tasks}, of which {env[local_size]} run here, but MASTER_ADDR is not set: pass the "
            "first machine's name on, with mpirun -x MASTER_ADDR=NAME (MPICH: -genv MASTER_ADDR NAME)"
        )
    return Launch(
        "mpirun",
        rank=_integer(env, rank, 0),
        world_size=tasks,
        local_rank=_integer(env, local_rank, 0),
        init_method=f"tcp://{address or '127.0.0.1'}:{_integer(env, 'MASTER_PORT', _MPI_PORT)}",
        local_world_size=_integer(env, local_size, 1),
    )


def _slurm(env: Mapping[str, str], tasks: int) -> Launch:
    nodes = next(
        (
            env[n]
            for n in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
            if n in env
        ),
        None,
    )
    # The launch node may be a login node, where rank 0 does not run: the node list is safer.
    address = env.get("MASTER_ADDR") or (
        first_host(nodes) if nodes else env.get("SLURM_LAUNCH_NODE_IPADDR")
    )
    if address is None:
        raise ValueError(
            f"SLURM_NTASKS={tasks}, but neither SLURM_NODELIST nor SLURM_LAUNCH_NODE_IPADDR is set: "
            "set MASTER_ADDR to the first machine's address"
        )
    # Two steps of one job must not meet at one port; below 32768 no client socket takes it.
    job = _integer(env, "SLURM_JOB_ID", _integer(env, "SLURM_JOBID", 0))
    port = _integer(env, "MASTER_PORT", 10000 + (job + _integer(env, "SLURM_STEP_ID", 0)) % 20000)
    return Launch(
        "slurm",
        rank=_integer(env, "SLURM_PROCID", 0),
        world_size=tasks,
        local_rank=_integer(env, "SLURM_LOCALID", 0),
        init_method=f"tcp://{address}:{port}",
        local_world_size=_slurm_tasks_here(env),
    )


def _slurm_tasks_here(env: Mapping[str, str]) -> int:
    """Tasks on this machine, from a list of them by machine: `8(x2),4` on machine 2 -> 4."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _integer(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def first_host(nodes: str) -> str:
    """First machine of a Slurm node list: `gpu[001-003,007],cpu1` -> `gpu001`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes.strip())
    if first is None:
        raise ValueError(f"SLURM_NODELIST={nodes!r} names no machine; set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def own_device(device: str) -> torch.device:
    """`choose_device` for a process that has no others beside it."""
    return choose_device(device, read_launch({}), torch.cuda.device_count())


def choose_device(device: str, launch: Launch, visible_gpus: int) -> torch.device:
    """The device of this process; ValueError if it has no GPU of its own."""
    if device == "auto":
        device = "cuda" if visible_gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"DEVICE='{device}' must be one of auto, cpu, cuda, cuda:N")
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return chosen
    if not visible_gpus:
        raise ValueError(f"device {device!r}: PyTorch sees no GPU; use cpu or auto")
    if launch.world_size == 1:
        index = chosen.index or 0
        if index >= visible_gpus:
            raise ValueError(f"device {device!r}: only {visible_gpus} GPUs are visible")
        return torch.device("cuda", index)
    # Slurm can show each task its own GPU only (--gpus-per-task 1): it is number 0 for all of them.
    index = 0 if launch.launcher == "slurm" and visible_gpus == 1 else launch.local_rank
    if index >= visible_gpus:
        raise ValueError(
            f"LOCAL_RANK={launch.local_rank}, but only {visible_gpus} GPUs are visible on this machine: "
            f"start at most {visible_gpus} processes per machine, or check CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", index)


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name}={text!r} must be an integer") from None


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if _has_group() else 0


def get_world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if _has_group() else 1


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if _has_group():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, on the device of `tensor`, which stays as it is."""
    if not _has_group():
        return tensor
    on_gpu = dist.get_backend() == "nccl" and not tensor.is_cuda
    total = tensor.detach().to("cuda" if on_gpu else tensor.device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def all_gather_object(value: Any) -> list[Any]:
    """Every process's `value`, by rank, in every process; values are pickled."""
    if not _has_group():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_object(value: Any) -> list[Any] | None:
    """Every process's `value`, by rank, in the main process; None in the others. Values are pickled."""
    if not _has_group():
        return [value]
    values = [None] * dist.get_world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The `value` of process `source`, in every process; it is pickled."""
    if not _has_group():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if _has_group():
        dist.destroy_process_group()
