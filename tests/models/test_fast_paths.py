"""Published numbers with every fast path on, with none, and compiled."""

import pytest
import torch

from models.layers import eager, kernels, linear
from models.layers.fourier import set_fourier_way
from models.layers.grained import set_dense_evaluation
from tests.golden_tools import Golden, relative_error

# The smallest file of each kind of computation.
NAMES = (
    "fbdeit_deit_tiny_patch16_224",
    "deit_dge_s124_tiny_patch16_256",
    "dfformer_s18",
    "dfformer_s18_afno",
    "dfvt_tiny",
    "dhvt_tiny_cifar_patch4",
    "dilateformer_tiny",
    "dpvt_tiny_256",
    "evit_deit_tiny_patch16_224_r0.7_fuse",
    "gfformer_s18",
    "pvt_tiny_256",
    "swin_tiny_patch4_window7_224",
)


@pytest.fixture(params=["on", "off", "compiled"])
def paths(request, monkeypatch):
    """Every choice that depends on machine, size or mode, forced one way."""
    on = request.param != "off"
    monkeypatch.setattr(linear, "_convolves", lambda: on)
    monkeypatch.setattr(eager, "PIECE", 2**14 if on else 2**40)
    monkeypatch.setattr(kernels, "enabled", on)
    torch.compiler.reset()
    yield request.param
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_published_logits_whatever_path_is_taken(name, paths):
    golden = Golden(name)
    model = golden.model
    model.load_state_dict(golden.state_dict, strict=True)
    set_fourier_way(model, "fft" if paths == "off" else "matmul")
    # Packed rows are as many as the images ask for: compiled graphs compute all queries.
    set_dense_evaluation(model, paths != "on")
    run = torch.compile(model.eval(), backend="eager") if paths == "compiled" else model.eval()
    with torch.no_grad():
        logits = run(golden.images)
    assert relative_error(logits, golden.arrays["logits"]) < 1e-4
