"""What figures and results depend on besides the models: machine, versions, commit."""

import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch


def fingerprint(device: torch.device) -> dict[str, Any]:
    """Processor, GPU, threads, versions and commit, as plain data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = dict(
        cpu=_cpu_name(),
        cores=cores,
        threads=torch.get_num_threads(),
        load_average=load_average(),
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        commit=git_revision(),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        info |= dict(gpu=gpu.name, gpu_memory_gib=gpu.total_memory / 2**30, cuda=torch.version.cuda)
    return info


def load_average() -> list[float] | None:
    """Processes that wanted a core, on average over 1, 5 and 15 minutes; None on Windows."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    """Name and family: virtual machines call processors of several generations the same."""
    path = Path("/proc/cpuinfo")
    info: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    if "model name" not in info:
        return platform.processor() or platform.machine()
    family = f" (family {info['cpu family']})" if "cpu family" in info else ""
    return info["model name"] + family


@cache
def git_revision() -> str | None:
    """Commit of this source tree, with -dirty if it is modified; None if it is no git checkout.

    Asked once: what runs is what was there when the process began.
    """
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
