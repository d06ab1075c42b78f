"""Triton's compiler takes every kernel, for GPUs that need not be there: the interpreter is lax."""

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.layers import kernels
from models.layers.kernels import dilated, quads, ragged
from models.layers.kernels.tuning import Tuned
from tests.models.layers.kernels.tools import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")

MODULES = dict(dilated=dilated, quads=quads, ragged=ragged)
ATTENTION = dict(HEADS=3, HEAD_DIM=24, D=32)
DILATED = ATTENTION | dict(KERNEL=3, DILATION=(1, 2, 3))
QUADS = dict(C=128, K=4, TILE_F=16, TILE_C=128)
RAGGED = ATTENTION | dict(BATCH=4, PRECISION="tf32x3")
KERNELS = [
    ("dilated._forward_kernel", "bf16", DILATED | dict(KEEP=True)),
    ("dilated._grad_query_kernel", "bf16", DILATED),
    ("dilated._grad_key_value_kernel", "bf16", DILATED),
    ("quads._forward_kernel", "fp32", QUADS | dict(ROUTED=True)),
    ("quads._forward_kernel", "fp32", QUADS | dict(ROUTED=False)),
    ("quads._backward_kernel", "fp32", QUADS),
    ("quads._routed_backward_kernel", "fp32", QUADS),
    ("ragged._forward_kernel", "bf16", RAGGED),
    ("ragged._forward_kernel", "fp32", RAGGED),
    ("ragged._grad_query_kernel", "bf16", RAGGED),
    ("ragged._grad_key_value_kernel", "bf16", RAGGED),
]
# Tensors that are not of the type of the input, and numbers that are not whole.
TYPES = dict.fromkeys(
    ["log_sum", "delta", "table", "routing", "table_parts", "routing_parts"], "*fp32"
) | dict(offsets="*i32", scale="fp32")
WHOLE = {"batch", "height", "width", "rows", "columns", "num_rows", "num_keys", "work"}


def argument_type(name, dtype):
    whole = name in WHOLE or name.endswith(("_image", "_head", "_row"))
    return TYPES.get(name, "i32" if whole else f"*{dtype}")


HOPPER, SMALL_AMPERE = 90, 86
# Of a program, on GPUs with the least: Ampere and Ada without HBM, and consumer Blackwell.
LEAST_SHARED_MEMORY = 99 * 1024


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(name, dtype, constants, capability):
    """A kernel as a launch compiles it: what is contiguous is aligned; of tuned ones the first choice."""
    module, attribute = name.split(".")
    kernel = getattr(MODULES[module], attribute)
    options = dict(num_warps=8)
    if isinstance(kernel, Tuned):
        choice, kernel = kernel.configs[0], kernel.kernel
        constants = constants | choice.kwargs
        options = dict(num_warps=choice.num_warps, num_stages=choice.num_stages)
    signature = {
        name: "constexpr" if name in constants else argument_type(name, dtype)
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith(("_image", "_head", "_row"))
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(("name", "dtype", "constants"), KERNELS)
def test_kernels_compile_for_hopper(name, dtype, constants):
    assert compiled(name, dtype, constants, HOPPER).asm["cubin"]


@pytest.mark.parametrize(
    "name", ["_forward_kernel", "_grad_query_kernel", "_grad_key_value_kernel"]
)
@pytest.mark.parametrize(("dtype", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_widest_heads_fit_the_smallest_gpus(name, dtype, itemsize):
    """`kernels.available` lets rows of MAX_ROW bytes through, and the first choice must then run."""
    head_dim = kernels.MAX_ROW // itemsize
    constants = RAGGED | dict(HEAD_DIM=head_dim, D=head_dim)
    kernel = compiled(f"ragged.{name}", dtype, constants, SMALL_AMPERE)
    assert 0 < kernel.metadata.shared <= LEAST_SHARED_MEMORY


def test_deterministic_runs_take_the_first_configuration(monkeypatch):
    """Blocks decide in which order a GPU adds."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    kernel = dilated._forward_kernel
    monkeypatch.setattr(kernel, "_first", {(1,): "first"})
    monkeypatch.setattr(kernel, "_fastest", {(1,): "fastest"})
    assert kernel[(1,)] == "fastest"
    torch.use_deterministic_algorithms(True)
    try:
        assert kernel[(1,)] == "first"
    finally:
        torch.use_deterministic_algorithms(False)
