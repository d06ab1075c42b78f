"""Processes that find each other, started as a launcher starts them; and a run that is cut off."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from modes import results
from utils.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parent.parent


def time_briefly(replace: Callable = setattr) -> None:
    """Let main.py time its model with a few passes; `test_engine.py` has those of the protocol.

    A script in a process of its own calls this; `main.py` as a command keeps the protocol.
    """
    brief = partial(results.measure_throughput, warmup=1, iterations=2, repeats=2)
    replace(results, "measure_throughput", brief)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_two_processes(
    script: str, *arguments: str, timeout: float, folder: Path | None = None
) -> list[str]:
    """What each process printed; AssertionError with it if one failed."""
    return run_on_processes(2, script, *arguments, timeout=timeout, folder=folder)


def run_on_processes(
    count: int, script: str, *arguments: str, timeout: float, folder: Path | None = None
) -> list[str]:
    """`run_on_two_processes` with another number of them."""
    launchers = ("SLURM", "OMPI", "PMI")  # of the tests themselves
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(count))
    env |= dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            cwd=folder,
            env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-4000:]
    return outputs


@contextmanager
def interrupted_after_saving(step: int) -> Iterator[None]:
    """What runs inside must be stopped, as by Ctrl-C, right after the checkpoint of that step."""
    save = Checkpointer.save

    def die_after_save(self, progress, *args):
        save(self, progress, *args)
        if progress["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpointer, "save", die_after_save)
        with pytest.raises(KeyboardInterrupt):
            yield
