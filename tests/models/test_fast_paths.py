"""Published numbers with every fast path on, with none, and compiled."""

import pytest
import torch

from models import deployment
from models.deployment import deploy
from models.layers import activations, biased_attention, eager, kernels, linear, window
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


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """What the fused kernel computes, term by term."""
    assert not dropout_p
    assert not is_causal
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v


@pytest.fixture(params=["on", "off", "compiled"])
def paths(request, monkeypatch):
    """Every choice that depends on machine, size or mode, forced one way; off, no fused kernel either."""
    on = request.param != "off"
    for module in (linear, deployment):
        monkeypatch.setattr(module, "multiplies_by_onednn", lambda: on)
    monkeypatch.setattr(eager, "PIECE", 2**14 if on else 2**40)
    monkeypatch.setattr(kernels, "enabled", on)
    if not on:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain_attention)
        monkeypatch.setattr(biased_attention, "eager_on_cpu", lambda *tensors: False)
        for module in (eager, activations):
            monkeypatch.setattr(module, "may_overwrite", lambda x: False)
        monkeypatch.setattr(window.Windowed, "_additive", window.Windowed._build_additive)
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
    run = model.eval() if paths == "off" else deploy(model)
    if paths == "compiled":
        run = torch.compile(run, backend="eager")
    images = golden.images if paths == "on" else golden.images[:1]
    with torch.no_grad():
        if paths == "on":
            run(images[:1])  # tables are kept from then on
        logits = run(images)
    assert relative_error(logits, golden.arrays["logits"][: len(images)]) < 1e-4
