"""Jobs through submitit: on this machine, and as the script that Slurm would get."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import CONFIG_DIR
from tools import submit as tool
from utils.distributed import read_launch

pytest.importorskip("submitit")

ROOT = CONFIG_DIR.parent
SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A machine with Slurm's commands -> the folder; sbatch accepts every script as job 4711."""
    folder = tmp_path / "slurm_bin"
    folder.mkdir()
    for name, text in (("srun", "exit 1"), ("sbatch", "echo Submitted batch job 4711")):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def refused(capsys, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        tool.main(list(args))
    assert stop.value.code == 2
    return capsys.readouterr().err


def task_of(job, rank: int) -> int:
    """Process number of one of a local job's tasks, which are children of its controller."""
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children")
    return int(children.read_text().split()[rank])


@pytest.mark.skipif(sys.platform != "linux", reason="finds the job's processes in /proc")
def test_a_preempted_job_is_queued_again_and_finishes(tmp_path, capsys):
    """Trap 16: resume does not restore."""
    command = ["--cfg", SMOKE, "--output", "out", "--opts", "TRAIN.EPOCHS", "15"]
    job = tool.main(["--local", "--gpus", "0", "--time", "20", "--", *command])
    printed = capsys.readouterr().out
    folder = tmp_path / "out" / "smoke_cls" / "default"
    assert f"job {job.job_id}: main.py --cfg" in printed
    assert str(folder / "jobs") in printed
    last = folder / "checkpoints" / "last.pth"
    try:
        deadline = time.time() + 120
        while not last.exists() and time.time() < deadline:
            time.sleep(0.02)
        os.kill(task_of(job, 0), signal.SIGUSR2)  # what Slurm sends before it takes a machine away
        job.results()
    finally:
        job.cancel()
    state = torch.load(last, weights_only=True)
    assert state["progress"]["epoch"] == 15
    log = (folder / "log_rank0.txt").read_text()
    assert "continuing" in log
    first, second = log.split("(auto-resume)")
    assert "Train: [0/15][0/4]" in first
    assert "Train: [0/15]" not in second, "it went on, and did not start again"
    assert "Train: [14/15][3/4]" in second
    assert json.loads((folder / "eval.json").read_text())["images"] == 20


def test_slurm_gets_all_that_was_asked_for(slurm, tmp_path, capsys):
    job = tool.main(
        [
            "--nodes", "2", "--gpus", "8", "--time", "1-12:30:00", "--partition", "gpu", "--mem", "200",
            "--cpus-per-task", "12", "--constraint", "a100", "--comment", "ICLR deadline", "--qos", "high",
            "--account", "lab", "--exclude", "n[1-2]", "--nodelist", "n[3-4]", "--requeues", "5",
            "--signal-delay", "300", "--extra", "reservation=night", "exclusive",
            "--setup", "module load cuda", "export NCCL_DEBUG=INFO", "--folder", "jobs",
            "--", "--cfg", SMOKE, "--batch-size", "4",
        ]
    )  # fmt: skip
    assert job.job_id == "4711"
    assert f"logs: {tmp_path / 'jobs' / '4711_0_log.out'}" in capsys.readouterr().out
    script = (tmp_path / "jobs" / "4711_submission.sh").read_text()
    lines = script.splitlines()
    for option in (
        "nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "time=2190", "partition=gpu", "mem=200GB",
        "cpus-per-task=12", "constraint=a100", "comment='ICLR deadline'", "qos=high", "account=lab",
        "exclude='n[1-2]'", "nodelist='n[3-4]'", "signal=USR2@300", "reservation=night", "exclusive",
        "requeue", "job-name=smoke_cls", "open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, option
    assert lines.index("module load cuda") < lines.index("export SUBMITIT_EXECUTOR=slurm")
    assert "export NCCL_DEBUG=INFO" in lines
    assert lines[-1].startswith("srun ")
    submission = job.submission()
    assert submission.function.arguments == ["--cfg", SMOKE, "--batch-size", "4"]
    assert submission._timeout_countdown == 5


def test_the_line_of_the_documentation_is_accepted(slurm, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "multi_node.md").read_text()
    line = re.search(r"python tools/submit\.py (.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(ROOT)  # where its --cfg is
    job = tool.main(["--folder", str(tmp_path / "jobs"), *shlex.split(line.replace("\\\n", " "))])
    assert "#SBATCH --nodes=2" in job.paths.submission_file.read_text()


def test_a_job_without_gpus_asks_for_none(slurm, tmp_path):
    tool.main(["--gpus", "0", "--processes", "4", "--folder", "jobs", "--", "--cfg", SMOKE])
    script = (tmp_path / "jobs" / "4711_submission.sh").read_text()
    assert "--gpus" not in script
    assert "#SBATCH --ntasks-per-node=4" in script


def test_the_job_is_pickled_by_value_and_submits_the_same_command_again(slurm, tmp_path):
    """The machine of the job has no `tools` module on its path."""
    tool.main(["--folder", "jobs", "--", "--cfg", SMOKE, "--info"])
    script = (
        "import pickle, sys\n"
        "delayed = pickle.load(open('jobs/4711_submitted.pkl', 'rb'))\n"
        "assert 'tools' not in sys.modules and 'main' not in sys.modules\n"
        "again = delayed.function.checkpoint()\n"
        "assert again.function.arguments == ['--cfg', sys.argv[1], '--info'], again.function.arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, SMOKE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("nodes", "address"), [(1, "127.0.0.1"), (2, "gpu003")]
)  # a machine need not know its own name
def test_the_environment_of_a_process_is_torchruns(nodes, address, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    job = SimpleNamespace(
        job_id="1234567_3",
        hostnames=["gpu003", "gpu004"][:nodes],
        num_nodes=nodes,
        num_tasks=8 * nodes,
        global_rank=5,
        local_rank=5,
    )
    env = tool.launch_environment(job)
    assert env["MASTER_ADDR"] == address
    assert 10000 <= int(env["MASTER_PORT"]) < 30000
    launch = read_launch(env)
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 8 * nodes, 5)
    assert launch.local_world_size == 8
    other = tool.launch_environment(SimpleNamespace(**vars(job) | {"job_id": "1234568"}))
    assert other["MASTER_PORT"] != env["MASTER_PORT"]
    monkeypatch.setenv("MASTER_PORT", "29400")
    assert tool.launch_environment(job)["MASTER_PORT"] == "29400"


def test_main_runs_in_the_folder_and_the_environment_of_its_job(tmp_path, monkeypatch):
    seen = {}
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
    job = SimpleNamespace(
        job_id="7", hostnames=["a", "b"], num_nodes=2, num_tasks=4, global_rank=3, local_rank=1
    )
    monkeypatch.setattr("submitit.JobEnvironment", lambda: job)

    def look(arguments):
        seen.update(arguments=arguments, folder=Path.cwd(), env={n: os.environ[n] for n in names})

    monkeypatch.setattr("main.main", look)
    (tmp_path / "place").mkdir()
    tool.MainJob(["--cfg", SMOKE], ROOT, tmp_path / "place")()
    assert seen["arguments"] == ["--cfg", SMOKE]
    assert seen["folder"] == tmp_path / "place"
    expected = dict(MASTER_ADDR="a", MASTER_PORT="10007", RANK="3", LOCAL_RANK="1", WORLD_SIZE="4")
    assert seen["env"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:30", 91),
        ("2:00:00", 120),
        ("1-2", 1560),
        ("1-02:30", 1590),
        ("2-00:00:01", 2881),
    ],
)
def test_times_are_read_as_slurm_writes_them(text, expected):
    assert tool.minutes(text) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--local", "--cfg", SMOKE], "unrecognized arguments: --cfg"),
        (["--local"], "comes after --"),
        (["--local", "--", "--cfg", SMOKE, "--opts", "TRAIN.EPOCH", "3"], "TRAIN.EPOCHS"),
        (["--local", "--", "--cfg", SMOKE, "--batchsize", "3"], "--batch-size"),
        (["--local", "--", "--cfg", "none.yaml"], "none.yaml does not exist"),
        (
            ["--local", "--", "--cfg", SMOKE, "--opts", "TRAIN.AUTO_RESUME", "False"],
            "TRAIN.AUTO_RESUME=False",
        ),
        (["--local", "--nodes", "2", "--", "--cfg", SMOKE], "--local is this machine only"),
        (["--local", "--gpus", "-1", "--", "--cfg", SMOKE], "--gpus -1 must be at least 0"),
        (["--local", "--processes", "0", "--", "--cfg", SMOKE], "--processes 0 must be"),
        (["--local", "--time", "soon", "--", "--cfg", SMOKE], "'soon' is no time"),
        (["--local", "--time", "0", "--", "--cfg", SMOKE], "no time to run in"),
    ],
)
def test_mistakes_stop_before_anything_is_submitted(args, message, capsys, tmp_path):
    assert message in refused(capsys, *args)
    assert not any(tmp_path.iterdir())


def test_without_slurm_the_error_names_the_way_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no Slurm here" in refused(capsys, "--", "--cfg", SMOKE)


def test_without_submitit_the_error_names_the_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install submitit" in refused(capsys, "--local", "--", "--cfg", SMOKE)
    assert not any(tmp_path.iterdir())
