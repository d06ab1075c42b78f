"""PVT: position tables, padding, reduced keys. Its numbers are compared in test_golden.py."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models.layers.resize import resize_position_grid
from models.layers.spatial_reduction import SpatialReductionAttention
from models.pvt import PVT
from tests.reference.attention import inputs_of, probabilities


def small(**keywords) -> PVT:
    """One block per stage, widths 16 to 48, with weights that are far from their start."""
    defaults = dict(
        img_size=64,
        num_classes=5,
        embed_dims=(16, 16, 32, 48),
        num_heads=(1, 2, 2, 3),
        mlp_ratios=(2, 2, 2, 2),
        depths=(1, 1, 1, 1),
        sr_ratios=(8, 4, 2, 1),
    )
    model = PVT(**(defaults | keywords))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (32, 128), (96, 160), (64, 256)])
def test_each_stage_resizes_its_own_table(size):
    # 128 x 128 has as many cells in stage 2 as the native stage 1, and 32 x 128 in stage 1.
    native, resized = small(), small(img_size=size)
    weights = native.state_dict()
    for name, (special, grid, mode) in native.position_tables().items():
        new = resized.position_tables()[name][1]
        weights[name] = resize_position_grid(weights[name], special, grid, new, mode)
    resized.load_state_dict(weights, strict=True)
    images = torch.randn(1, 3, *size)
    close(native(images), resized(images))


@torch.no_grad()
def test_a_patch_that_the_border_cuts_is_filled_with_zeros():
    model = small()
    images = torch.randn(1, 3, 61, 62)
    close(model(images), model(F.pad(images, (0, 2, 0, 3))))


@torch.no_grad()
def test_kept_tables_follow_every_change_of_the_weights():
    model = small()
    images = torch.randn(1, 3, 96, 64)

    def is_current():
        again = small()
        again.load_state_dict(model.state_dict())
        return torch.allclose(model(images), again(images), atol=1e-5)

    before = model(images)
    kept = model._positions(0, (24, 16))
    assert model._positions(0, (24, 16)) is kept
    model.pos_embed1.mul_(-1.0)
    assert not torch.allclose(model(images), before, atol=1e-4)
    assert is_current()
    model.load_state_dict(small().state_dict())
    assert is_current()
    model.load_state_dict(small().state_dict(), assign=True)
    assert is_current()
    duplicate = copy.deepcopy(model)
    for _ in range(model.pos_embed1._version):
        duplicate.pos_embed1.add_(0.5)
    assert not torch.allclose(duplicate(images), model(images), atol=1e-4)
    model.pos_embed1.data = torch.randn_like(model.pos_embed1)
    assert is_current()
    model.pos_embed1.data.mul_(3.0)
    model.train().eval()
    assert is_current()
    assert model.double()(images.double()).dtype is torch.float64


def test_kept_tables_do_not_stop_gradients_nor_come_from_inference_mode():
    model = small()
    images = torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        model(images)
    model(images).sum().backward()
    assert model.pos_embed1.grad.abs().sum() > 0


@torch.no_grad()
def test_keys_come_from_a_zero_padded_reduced_map():
    attn = SpatialReductionAttention(8, 2, reduction=4)
    size = (5, 6)
    x = torch.randn(2, 30, 8)
    source = F.pad(x.transpose(1, 2).unflatten(2, size), (0, 2, 0, 3))
    source = attn.norm(attn.sr(source).flatten(2).transpose(1, 2))
    assert source.shape == (2, 4, 8)
    k, v = attn.kv(source).unflatten(-1, (2, 2, 4)).unbind(2)  # B M h d
    logits = torch.einsum("bnhd,bmhd->bhnm", attn.q(x).unflatten(-1, (2, 4)), k) * 4**-0.5
    expected = attn.proj(torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).flatten(2))
    close(attn(x, size), expected)


@torch.no_grad()
def test_a_dense_backbone_gives_the_maps_of_the_classifier_without_its_norm():
    model = small()
    dense = small(num_classes=0)
    weights = model.state_dict()
    extra = {n for n in weights if n.startswith(("norm.", "head."))}
    assert set(dense.state_dict()) == set(weights) - extra
    dense.load_state_dict({n: t for n, t in weights.items() if n not in extra}, strict=True)
    images = torch.randn(1, 3, 64, 64)
    for feature, expected in zip(
        dense.forward_pyramid(images), model.forward_pyramid(images), strict=True
    ):
        close(feature, expected)


def test_errors_name_the_key():
    with pytest.raises(ValueError, match=r"MODEL.PVT.SR_RATIOS=\[8, 4, 2, 2\]"):
        small(sr_ratios=(8, 4, 2, 2))
    with pytest.raises(ValueError, match=r"MODEL.PVT.DEPTHS=\[1, 1, 1\] needs 4"):
        small(depths=(1, 1, 1))


@torch.no_grad()
def test_token_maps_are_the_mean_attention_to_the_reduced_map():
    model, images = small(), torch.randn(2, 3, 75, 101)
    layers = [getattr(model, f"block{stage}")[-1].attn for stage in (1, 2, 3, 4)]
    inputs = [inputs_of(layer, lambda: model(images)) for layer in layers]
    maps = model.token_maps()
    assert list(maps) == [f"attention::block{stage}.0.attn" for stage in (1, 2, 3, 4)]
    for attention, attn, (x, size), special in zip(
        maps.values(), layers, inputs, model.num_special, strict=True
    ):
        rows, columns = (-(-side // attn.reduction) for side in size)
        keys = x
        if attn.reduction > 1:
            keys = x.transpose(1, 2).unflatten(2, size)
            bottom, right = (-side % attn.reduction for side in size)
            keys = attn.sr(F.pad(keys, (0, right, 0, bottom))).flatten(2).transpose(1, 2)
            keys = attn.norm(keys)
        k, _ = attn.kv(keys).chunk(2, dim=-1)
        q = attn.q(x)
        mean = probabilities(q, k, attn.num_heads, (q.shape[-1] // attn.num_heads) ** -0.5).mean(2)
        assert attention.shape == (2, attn.num_heads, rows, columns)
        close(attention.flatten(2), mean[..., special:])
        close(attention.sum((2, 3)), 1 - mean[..., :special].sum(-1))


def test_the_norm_comes_and_goes_with_the_classifier():
    model = small()
    model.reset_classifier(0)
    assert isinstance(model.norm, torch.nn.Identity)
    model.double().reset_classifier(3)
    assert model.norm.weight.dtype is torch.float64
    assert model.norm.eps == 1e-6
