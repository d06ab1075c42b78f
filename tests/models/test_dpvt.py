"""DPVT: sampling between the pixels equals its definition. Logits are compared in test_golden.py."""

import math

import pytest
import torch

from models.dpvt import DPVT
from models.layers import point_sampling
from models.layers.point_sampling import PointSampledAttention
from tests.reference.attention import inputs_of
from tests.reference.point_sampling import point_sampled_attention, sample


def scattered_attention() -> PointSampledAttention:
    """Offsets of some pixels, so that many points are between pixels, and many outside the map."""
    attn = PointSampledAttention(8, 2, num_points=3)
    with torch.no_grad():
        attn.offsets.weight.copy_(torch.randn_like(attn.offsets.weight))
        attn.offsets.bias.copy_(2 * torch.randn_like(attn.offsets.bias))
    return attn


def gradients(attn, x, output):
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    wanted = [x, *attn.parameters()]
    return torch.autograd.grad((output.float() * weight).sum(), wanted)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("size", [(4, 5), (1, 6), (5, 1), (1, 1)])
def test_values_and_gradients_equal_the_definition(size, by_rows, monkeypatch):
    monkeypatch.setattr(point_sampling, "gathers_rows", lambda device: by_rows)
    attn = scattered_attention()
    x = torch.randn(2, size[0] * size[1], 8, requires_grad=True)
    output, expected = attn(x, size), point_sampled_attention(attn, x, size)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(gradients(attn, x, output), gradients(attn, x, expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_deterministic_training_on_a_gpu_gathers_rows(monkeypatch):
    """The gradient of `F.grid_sample` refuses to run there."""
    chosen, gpu = point_sampling.gathers_rows, torch.device("cuda")
    monkeypatch.setattr(point_sampling, "gathers_rows", lambda device: chosen(gpu))
    attn, x, results = scattered_attention(), torch.randn(2, 20, 8, requires_grad=True), []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        assert chosen(gpu) is deterministic
        output = attn(x, (4, 5))
        results.append([output, *gradients(attn, x, output)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert not chosen(gpu), "forward is deterministic either way"


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_keeps_the_positions(autocast, by_rows, monkeypatch):
    monkeypatch.setattr(point_sampling, "gathers_rows", lambda device: by_rows)
    # At column 300 a bfloat16 coordinate would be off by up to one pixel.
    attn = scattered_attention()
    x = torch.randn(1, 300, 8)
    expected = attn(x, (1, 300))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            output = attn(x, (1, 300))
    else:
        output = attn.bfloat16()(x.bfloat16(), (1, 300))
    assert output.dtype is torch.bfloat16
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


def test_offsets_start_near_zero_unless_the_ring_is_asked_for():
    sizes = dict(embed_dims=(16,) * 4, num_heads=(4,) * 4, depths=(1,) * 4, num_classes=3)
    attn = DPVT(img_size=32, **sizes).block1[0].attn
    assert attn.offsets.bias.abs().max() == 0
    assert 0.01 < attn.offsets.weight.std() < 0.03
    attn = DPVT(img_size=32, ring_offsets=True, **sizes).block1[0].attn
    assert attn.offsets.weight.abs().max() == 0
    ring = attn.offsets.bias.view(4, 4, 2)  # heads, points, (x, y)
    for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for point in range(4):
            expected = [(point + 1) * component for component in direction]
            assert ring[head, point].tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (37, 90)])
def test_any_size_is_classified_by_the_mean_token(size):
    model = DPVT(
        img_size=64, embed_dims=(8,) * 4, num_heads=(2,) * 4, depths=(1,) * 4, num_classes=3
    ).eval()
    images = torch.randn(2, 3, *size)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, math.ceil(size[0] / 32) * math.ceil(size[1] / 32), 8)
    torch.testing.assert_close(model(images), model.head(tokens.mean(1)))
    assert not model.no_weight_decay()


@torch.no_grad()
def test_token_maps_are_the_samples_of_each_position():
    sizes = dict(embed_dims=(8,) * 4, num_heads=(2,) * 4, depths=(1,) * 4, num_classes=3)
    model = DPVT(img_size=64, **sizes).eval()
    attn = model.block2[0].attn
    attn.offsets.bias.copy_(torch.randn(16))
    images = torch.randn(2, 3, 37, 90)
    x, size = inputs_of(attn, lambda: model(images))
    maps = model.token_maps()
    names = [f"{kind}::block{i}.0.attn" for i in (1, 2, 3, 4) for kind in ("points", "attention")]
    assert list(maps) == names
    points, weights = maps["points::block2.0.attn"], maps["attention::block2.0.attn"]
    assert points.shape == (2, 2, 4, 5, 12, 2)
    assert weights.shape == points.shape[:-1]
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 2, 5, 12))
    offsets = attn.offsets(x).view(2, 5, 12, 2, 4, 2)
    row, column = 3, 10
    centre = torch.tensor([10.0, 3.0])  # x, then y
    torch.testing.assert_close(points[:, :, :, row, column], offsets[:, row, column] + centre)
    # The samples, weighted, are what the layer computes.
    values = attn.v(x).view(2, *size, 2, 4)
    samples = [
        sum(
            weights[1, head, p, row, column]
            * sample(values[1, :, :, head], *points[1, head, p, row, column])
            for p in range(4)
        )
        for head in range(2)
    ]
    expected = attn(x, size).view(2, 5, 12, 8)[1, row, column]
    torch.testing.assert_close(attn.proj(torch.cat(samples)), expected, rtol=1e-4, atol=1e-5)
