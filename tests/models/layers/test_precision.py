"""Under autocast a map is cast to half precision once, before it is moved about, and not at each product.

CUDA's autocast gives the results of layer norms in float32, so that is what these layers get.
"""

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from models.layers.head_interaction import HIAttention
from models.layers.spatial_reduction import SpatialReductionAttention
from models.layers.window import CosineWindowAttention, WindowAttention
from models.layers.window_mlp import WindowMlp
from tests.operators import Operators
from tests.small_models import SMALL

B, H, W, C = 2, 5, 7, 8

LAYERS = {
    "window": lambda: WindowAttention(C, 2, (6, 6), 3, 1),
    "cosine window": lambda: CosineWindowAttention(C, 2, (6, 6), 3, 1),
    "window mlp": lambda: WindowMlp(2, (6, 6), 3, shifted=True),
    "spatial reduction": lambda: SpatialReductionAttention(C, 2, 1),
    "spatial reduction by 2": lambda: SpatialReductionAttention(C, 2, 2),
    "head tokens": lambda: HIAttention(C, 2),
}


def build(name):
    """The layer, and what it is given: a map or its tokens first."""
    layer, x = LAYERS[name](), torch.randn(B, H, W, C)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if isinstance(layer, SpatialReductionAttention):
        return layer, [x.flatten(1, 2), (H, W)]
    if isinstance(layer, HIAttention):
        return layer, [x.flatten(1, 2), torch.randn(B, 1, C)]
    return layer, [x]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_map_is_cast_once_and_first(name, grad):
    layer, (x, *others) = build(name)
    x = x.requires_grad_() * 1
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16), Operators() as ran:
        layer(x, *others)
    # Of maps and windows with all channels; attention has casts of its own.
    large = [found for found in ran.results if found[1].numel() >= x.numel() and C in found[1]]
    casts = [shape for n, shape, dtype in large if (n, dtype) == ("_to_copy", torch.bfloat16)]
    assert casts == [x.shape]
    moves = [dtype for n, _, dtype in large if n in ("constant_pad_nd", "roll", "cat", "clone")]
    assert torch.float32 not in moves


@pytest.mark.parametrize("name", LAYERS)
def test_casting_first_changes_nothing(name):
    """Against the same layer without autocast, on rounded inputs: the same products in the same order."""
    layer, (x, *others) = build(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer(x, *others)
        if name != "head tokens":  # these are pooled in float32
            assert torch.equal(found, layer(x.bfloat16(), *others))
    expected = layer(x, *others)
    for part, reference in zip(
        *(out if isinstance(out, tuple) else (out,) for out in (found, expected)), strict=True
    ):
        assert part.dtype == torch.bfloat16
        assert (part.float() - reference).norm() < 2e-2 * reference.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_double_precision_is_left_alone(name):
    layer, (x, *others) = build(name)
    layer.double()
    inputs = [x.double() if isinstance(x, torch.Tensor) else x for x in (x, *others)]
    expected = layer(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_gates_of_a_level_share_one_cast(monkeypatch):
    name, overrides = SMALL["dfvt"]
    model = create_model(name, num_classes=10, **overrides).train()
    layer_norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *a: layer_norm(x.float(), *a))  # as on a GPU
    given = []
    for module in model.modules():
        if type(module).__name__ == "Dane":
            module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[2]))
    size = overrides["img_size"]
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, size, size))
    assert len(given) == sum(overrides["depths"])
    assert {y_hat.dtype for y_hat in given} == {torch.bfloat16}
    model.double()
    given.clear()
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, size, size, dtype=torch.float64))
    assert {y_hat.dtype for y_hat in given} == {torch.float64}
