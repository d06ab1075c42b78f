"""The tests of the kernels, run once more in a process whose Triton interprets kernels on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]


@pytest.mark.slow
def test_kernels_pass_in_the_interpreter():
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.8") and Version(numpy.__version__) >= Version(
        "2.4"
    ):
        # triton-lang/triton#9171
        pytest.skip("this Triton's interpreter does not work with this NumPy; NumPy 2.3 would do")
    # Older interpreters make numbers of arrays with one element, which NumPy deprecates and then refuses.
    options = ["-p", "no:cacheprovider", "-W", "ignore:Conversion of an array:DeprecationWarning"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", "cpu", str(HERE)],
        cwd=ROOT,
        env=os.environ | dict(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # A process without the interpreter would skip everything, and pass.
    passed, skipped = (
        int(count[1]) if (count := re.search(rf"(\d+) {word}", result.stdout)) else 0
        for word in ("passed", "skipped")
    )
    assert passed > 10 * skipped, result.stdout
