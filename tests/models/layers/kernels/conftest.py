"""Kernels are tested on a GPU where there is one, and in Triton's interpreter on the CPU.

The interpreter must be on before Triton is imported, and off for all else: `test_interpreter.py` starts
these tests again in a process of their own, and here those for the CPU are skipped.
"""

import pytest
import torch

from models.layers import kernels
from tests.models.layers.kernels.tools import INTERPRETED


@pytest.fixture(
    params=[
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not INTERPRETED, reason="test_interpreter.py runs it"),
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    INTERPRETED or not torch.cuda.is_available() or not kernels.HAS_TRITON,
                    reason="needs a CUDA device and Triton",
                ),
            ],
        ),
    ]
)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fused_multiply_adds(monkeypatch):
    """Triton 3.9 warns where nobody says whether it may fuse them."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
