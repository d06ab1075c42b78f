"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from utils.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [torch.ones(2**20) for _ in range(4)]
    del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keeps}:
    keep_freed_memory()
print([faults() for _ in range(4)][-1])
"""


def last_faults(keeps):
    command = [sys.executable, "-c", PROGRAM.format(keeps=keeps)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_maps_take_the_memory_of_those_before():
    pages = 4 * 2**22 // 4096
    assert last_faults(keeps=False) > pages // 8
    assert last_faults(keeps=True) < pages // 64
