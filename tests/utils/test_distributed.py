from pathlib import Path

import pytest
import torch

from tests.processes import run_on_two_processes
from utils import distributed
from utils.distributed import Launch, choose_device, first_host, init_distributed, read_launch

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}
SRUN = {
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[003-004,007]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
    "SLURM_JOB_ID": "1234567",
}


def test_plain_python_is_one_process_without_a_group(monkeypatch):
    """Trap 2: no single-GPU, CPU or Windows run; DHVT's get_rank() without a process group."""
    for name in (*TORCHRUN, *SRUN, *OPEN_MPI, *HYDRA):
        monkeypatch.delenv(name, raising=False)
    runtime = init_distributed("cpu")
    assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
    assert runtime.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()


def test_helpers_work_without_a_group():
    total = distributed.all_reduce_sum(torch.tensor([2.0]))
    assert total.item() == 2
    assert distributed.all_gather_object("a") == ["a"]
    assert distributed.gather_object("a") == ["a"]
    assert distributed.broadcast_object({"b": 1}) == {"b": 1}
    assert distributed.is_main()
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    distributed.barrier()
    distributed.cleanup()


@pytest.mark.parametrize("flag", [None, 0, 3])
def test_local_rank_by_hand_runs_one_process_and_waits_for_nobody(flag, caplog):
    """Trap 1: launching; Swin hangs when --local_rank 0 is passed by hand."""
    assert read_launch({}, flag) == Launch("none")
    assert ("--local_rank" in caplog.text) == bool(flag)


def test_torchrun_variables_are_read():
    assert read_launch(TORCHRUN) == Launch("torchrun", 1, 2, 1)
    assert read_launch(TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}).local_world_size == 2
    assert read_launch(TORCHRUN | SRUN).launcher == "torchrun"


def test_a_launcher_that_passes_the_rank_as_a_flag_works_too():
    """Trap 1: KeyError 'LOCAL_RANK'."""
    env = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}
    assert read_launch(env, 1).local_rank == 1
    with pytest.raises(ValueError, match=r"LOCAL_RANK is not set.*torchrun"):
        read_launch(env)


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_names_what_is_missing(name):
    env = {k: v for k, v in TORCHRUN.items() if k != name}
    with pytest.raises(ValueError, match=f"WORLD_SIZE=2, but {name} is not set"):
        read_launch(env)


def test_variables_that_are_no_numbers_or_out_of_range_are_named():
    with pytest.raises(ValueError, match="WORLD_SIZE='two'"):
        read_launch(TORCHRUN | {"WORLD_SIZE": "two"})
    with pytest.raises(ValueError, match="RANK=2 must be in range"):
        read_launch(TORCHRUN | {"RANK": "2"})


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize("env", [OPEN_MPI, HYDRA], ids=["open-mpi", "hydra"])
def test_processes_of_mpirun_meet_where_they_are_told(env):
    launch = read_launch(env | {"MASTER_ADDR": "head", "MASTER_PORT": "4000"})
    assert launch == Launch("mpirun", 5, 8, 1, "tcp://head:4000", local_world_size=4)
    assert read_launch(env | {"MASTER_ADDR": "head"}).init_method == "tcp://head:29500"
    with pytest.raises(ValueError, match=r"4 run here, but MASTER_ADDR is not set: .*mpirun -x"):
        read_launch(env)
    size, local = list(env)[1], list(env)[3]
    assert read_launch(env | {local: "8"}).init_method == "tcp://127.0.0.1:29500", "one machine"
    assert read_launch(env | {size: "1"}) == Launch("none")
    with pytest.raises(ValueError, match=f"{local}='many' must be an integer"):
        read_launch(env | {local: "many"})


def test_mpirun_within_a_slurm_job_is_no_slurm_step():
    """Its processes see the variables of the daemon that Slurm started, one per machine."""
    daemon = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    for env in (OPEN_MPI, HYDRA):
        launch = read_launch(daemon | env | {"MASTER_ADDR": "head"})
        assert (launch.launcher, launch.rank, launch.world_size) == ("mpirun", 5, 8)
    assert read_launch(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}).launcher == "slurm", "srun's PMI"
    assert read_launch(OPEN_MPI | TORCHRUN).launcher == "torchrun"


def test_a_slurm_step_meets_at_the_first_node():
    launch = read_launch(SRUN)
    assert (launch.launcher, launch.rank, launch.world_size, launch.local_rank) == (
        "slurm",
        5,
        8,
        1,
    )
    assert launch.init_method == f"tcp://gpu003:{10000 + 1234567 % 20000}"
    assert launch.local_world_size == 1, "nobody said it"
    shares = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_NODEID": "2"}
    assert read_launch(shares).local_world_size == 2
    assert read_launch(shares | {"SLURM_NODEID": "1"}).local_world_size == 3
    assert read_launch(SRUN | {"SLURM_STEP_ID": "1"}).init_method != launch.init_method
    without_nodes = {k: v for k, v in SRUN.items() if k != "SLURM_NODELIST"}
    assert read_launch(without_nodes).init_method.startswith("tcp://10.0.0.9:")
    by_hand = SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    assert read_launch(by_hand).init_method == "tcp://head:29500"
    del without_nodes["SLURM_LAUNCH_NODE_IPADDR"]
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        read_launch(without_nodes)


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_NTASKS": "4"},  # salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # sbatch without srun
        {
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_STEP_ID": "4294967290",
        },  # interactive step
        {
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
        },
    ],
)
def test_a_slurm_shell_without_srun_runs_one_process(env):
    assert read_launch(env) == Launch("none")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[001-003,007]", "node001"),
        ("node[3,5-9],cpu1", "node3"),
        ("gpu1,gpu2", "gpu1"),
        ("rack[2-3]-node[08-11]-ib,x", "rack2-node08-ib"),
        (" a-b[10] ", "a-b10"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_each_process_gets_its_gpu_or_a_clear_error():
    two = Launch("torchrun", 1, 2, 1)
    assert choose_device("auto", two, 4) == torch.device("cuda:1")
    assert choose_device("auto", two, 0) == torch.device("cpu")
    assert choose_device("cpu", two, 4) == torch.device("cpu")
    assert choose_device("cuda:3", Launch("none"), 4) == torch.device("cuda:3")
    assert choose_device("cuda", Launch("slurm", 1, 2, 1), 1) == torch.device("cuda:0")
    with pytest.raises(ValueError, match="LOCAL_RANK=1, but only 1 GPUs are visible"):
        choose_device("cuda", two, 1)
    with pytest.raises(ValueError, match="only 2 GPUs"):
        choose_device("cuda:2", Launch("none"), 2)
    with pytest.raises(ValueError, match="sees no GPU"):
        choose_device("cuda", Launch("none"), 0)
    for name in ("gpu", "mps", "cuda:", "cuda:-1"):
        with pytest.raises(ValueError, match=f"DEVICE='{name}' must be one of auto, cpu, cuda"):
            choose_device(name, Launch("none"), 1)


WORKER = """
import sys, torch
from pathlib import Path
from tests.processes import run_on_two_processes
from utils import distributed
from utils.checkpoint import Checkpointer

runtime = distributed.init_distributed("cpu")
assert torch.distributed.get_backend() == "gloo"
rank = runtime.rank
one = torch.tensor([rank + 1.0])
assert distributed.all_reduce_sum(one).item() == 3 and one.item() == rank + 1
assert distributed.all_gather_object({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
assert distributed.gather_object(rank) == ([0, 1] if rank == 0 else None)
assert distributed.broadcast_object(f"from {rank}", source=1) == "from 1"
assert distributed.is_main() == (rank == 0)
distributed.barrier()

folder = Path(sys.argv[1])
torch.manual_seed(rank)
run = Checkpointer(folder, {"model": torch.nn.Linear(2, 2)})
run.save({"epoch": 0}, {"acc1": 1.0})
expected = torch.rand(3)
run.resume(run.last)
assert torch.equal(torch.rand(3), expected), "each rank continues its own random numbers"

run.parts["optimizer"] = type("Bad", (), {"state_dict": lambda self: {"x": object()}})()
try:
    run.save({"epoch": 1})
except ValueError as error:
    print(f"rank {rank} raised {error}")
distributed.cleanup()
"""


def test_two_processes_agree_on_every_helper_and_on_a_failed_save(tmp_path):
    outputs = run_on_two_processes(WORKER, str(tmp_path / "checkpoints"), timeout=90)
    for rank, output in enumerate(outputs):
        assert f"rank {rank} raised state['optimizer']['x'] is a builtins.object" in output
    state = torch.load(tmp_path / "checkpoints" / "last.pth", weights_only=True)
    assert len(state["rng"]) == 2
    assert state["progress"] == {"epoch": 0}


@pytest.mark.parametrize(("has_nccl", "backend"), [(True, "nccl"), (False, "gloo")])
def test_gpus_use_nccl_where_there_is_one(has_nccl, backend, monkeypatch, caplog):
    """Trap 2: PyTorch for Windows has no NCCL."""
    for name, value in (TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    calls, device = [], torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: calls.append(chosen))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *a, **k: calls.append((a, k))
    )
    runtime = init_distributed("auto")
    assert (runtime.rank, runtime.device, runtime.local_world_size) == (1, device, 2)
    chosen, ((named,), keywords) = calls
    assert (chosen, named) == (device, backend)
    assert keywords["device_id"] == (device if has_nccl else None)
    assert ("has no NCCL" in caplog.text) == (not has_nccl)
