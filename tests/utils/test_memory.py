"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

# The heap finds its shape in up to five rounds; after that, pages are taken either always or never again.
PROGRAM = """
import resource, torch
from utils.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [torch.ones(2**20) for _ in range(4)]
    del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(sum([faults() for _ in range(16)][8:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_maps_take_the_memory_of_those_before():
    # Where the addresses fall well, a process keeps its heap by itself: half of them did, so six are asked.
    command = [sys.executable, "-c", PROGRAM]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    faults = [int(process.communicate()[0]) for process in processes]
    pages = 8 * 4 * 2**22 // 4096
    assert max(faults) < pages // 64
