"""When the kernels are used, and that nothing needs Triton where it is missing."""

import importlib.util
import sys

import pytest
import torch

from models.layers import kernels


class OnGPU:
    """What `available` asks of a tensor."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(kernels, "enabled", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels._capability.cache_clear()
    yield
    kernels._capability.cache_clear()


def test_kernels_take_single_and_half_precision_on_a_gpu():
    taken = [torch.float16, torch.bfloat16, torch.float32]
    assert all(kernels.available(OnGPU(dtype)) for dtype in taken)
    assert not kernels.available(OnGPU(torch.float64))
    assert not kernels.available(torch.zeros(1))


def test_wide_heads_keep_to_the_plain_code():
    fits = [(torch.float32, 64), (torch.bfloat16, 128)]
    assert all(kernels.available(OnGPU(dtype), width) for dtype, width in fits)
    assert not any(kernels.available(OnGPU(dtype), width + 1) for dtype, width in fits)


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(kernels, "enabled", False)
    assert not kernels.available(OnGPU())


@pytest.mark.parametrize(("capability", "hip"), [((7, 5), None), ((9, 4), "6.4")])
def test_other_gpus_keep_to_the_plain_code(capability, hip, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert not kernels.available(OnGPU())


@pytest.mark.parametrize(
    ("module", "question"), [(torch.compiler, "is_exporting"), (torch.jit, "is_tracing")]
)
def test_exported_graphs_hold_plain_operations(module, question, monkeypatch):
    monkeypatch.setattr(module, question, lambda: True)
    assert not kernels.available(OnGPU())


def test_the_choice_is_part_of_one_graph():
    def choose(x):
        return x + 1 if kernels.available(x) else x - 1

    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [0, 0]


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True), (None, True)])
def test_without_triton_the_package_imports_and_offers_nothing(value, enabled, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delenv("MIXLAB_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("MIXLAB_KERNELS", value)
    name = "models.layers.kernels_without_triton"
    spec = importlib.util.spec_from_file_location(
        name, kernels.__file__, submodule_search_locations=[]
    )
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    assert not package.HAS_TRITON
    assert package.enabled is enabled
    assert not package.available(OnGPU())
