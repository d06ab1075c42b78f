"""DeiT: sizes, special tokens, distillation. Its numbers are compared in test_golden.py."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from models import create_model
from models.layers import token_maps
from models.layers.resize import resize_position_grid
from models.layers.token_maps import attention_probabilities, attention_received
from models.vit import VisionTransformer
from tests.golden_tools import SkipInit, without_useful_gradient
from tests.reference.attention import inputs_of, packed_probabilities


def small(**keywords) -> VisionTransformer:
    """Two blocks of width 32 for 4 x 4 patches, with weights that are far from their start."""
    defaults = dict(img_size=64, num_classes=5, embed_dim=32, depth=2, num_heads=2)
    model = VisionTransformer(**(defaults | keywords))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "entries"),
    [("deit_base_patch16_384", 152), ("deit_base_distilled_patch16_384", 155)],
)
def test_state_dict_is_as_long_as_published(name, entries):
    with torch.device("meta"), SkipInit():
        assert len(create_model(name).state_dict()) == entries


@pytest.mark.parametrize("keywords", [{}, {"distilled": True}, {"class_token": False}])
def test_positions_follow_the_input_size(keywords):
    at_64 = small(**keywords)
    at_80x112 = small(img_size=[80, 112], **keywords)
    weights = at_64.state_dict()
    weights["pos_embed"] = resize_position_grid(
        weights["pos_embed"], at_64.num_special, (4, 4), (5, 7)
    )
    at_80x112.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 80, 112)
    close(at_64(images), at_80x112(images))


def test_resized_positions_are_never_older_than_the_weights():
    model, images = small(), torch.randn(1, 3, 80, 96)
    with torch.no_grad():
        before = model(images)
        model.pos_embed.data.mul_(3.0)  # `.data` leaves the version counter alone
        after = model(images)
    assert not torch.allclose(before, after)
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    close(after, fresh(images))


def test_a_side_that_is_no_multiple_of_the_patch_is_padded_at_its_end():
    model, images = small(), torch.randn(2, 3, 70, 90)
    close(model(images), model(F.pad(images, (0, 6, 0, 10))))
    assert [tuple(m.shape) for m in model.forward_pyramid(images)] == [(2, 32, 5, 6)]


def test_distilled_model_gives_both_logits_in_training_and_their_mean_in_evaluation():
    model, images = small(distilled=True), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(images)
    expected = model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])
    close(model(images), (expected[0] + expected[1]) / 2)
    model.train()
    outputs = model(images)
    assert isinstance(outputs, tuple)
    close(torch.stack(outputs), torch.stack(expected))


def test_distilled_model_replaces_both_classifiers():
    model = small(distilled=True)
    model.reset_classifier(7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    model.reset_classifier(0)
    assert not list(model.get_classifier().parameters())
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 32)


def test_without_class_token_the_mean_of_the_patches_is_classified():
    model = small(class_token=False)
    assert "cls_token" not in model.state_dict()
    assert model.pos_embed.shape == (1, 16, 32)
    images = torch.randn(2, 3, 64, 64)
    close(model(images), model.head(model.forward_features(images).mean(1)))


def test_a_distillation_token_needs_a_class_token():
    with pytest.raises(ValueError, match=r"CLASS_TOKEN=True"):
        small(class_token=False, distilled=True)


def test_qk_scale_replaces_the_factor_on_the_logits():
    weights, images = small().state_dict(), torch.randn(2, 3, 64, 64)
    scaled = small(qk_scale=0.5)
    scaled.load_state_dict(weights)
    plain = small()
    for i in range(2):  # the same, done to the queries: head_dim is 16, so the usual factor is 1/4
        weights[f"blocks.{i}.attn.qkv.weight"][:32] *= 2.0
        weights[f"blocks.{i}.attn.qkv.bias"][:32] *= 2.0
    plain.load_state_dict(weights)
    close(scaled(images), plain(images))


@pytest.mark.parametrize("keywords", [{}, {"distilled": True}, {"class_token": False}])
def test_dense_tasks_leave_no_parameter_without_gradient(keywords):
    model = small(num_classes=0, **keywords).train()
    model.forward_pyramid(torch.randn(2, 3, 64, 80))[0].square().mean().backward()
    assert not without_useful_gradient(model)


def test_pyramid_holds_the_patch_tokens_in_raster_order():
    model, images = small(distilled=True), torch.randn(1, 3, 64, 96)
    (feature,) = model.forward_pyramid(images)
    tokens = model.forward_features(images)[:, 2:]
    close(feature[0, :, 2, 5], tokens[0, 2 * 6 + 5])


def test_fresh_weights_have_the_published_spread():
    model = VisionTransformer(embed_dim=192, depth=1, num_heads=3, distilled=True)
    for name in ("pos_embed", "cls_token", "dist_token", "head.weight", "head_dist.weight"):
        tensor = model.get_parameter(name)
        assert tensor.std().item() == pytest.approx(0.02, rel=0.2), name
    # PyTorch's default for a convolution: uniform within 1 / sqrt(3 * 16 * 16).
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5 / 3**0.5, rel=0.02)
    assert not model.head.bias.any()


def test_optimizer_is_told_depths_and_exemptions():
    model = small(distilled=True)
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    depths = {name: model.layer_id(name) for name, _ in model.named_parameters()}
    assert {depths[n] for n in ("cls_token", "dist_token", "patch_embed.proj.weight")} == {0}
    assert [depths[f"blocks.{i}.norm1.weight"] for i in range(2)] == [1, 2]
    assert depths["norm.weight"] == depths["head_dist.bias"] == 3 == model.num_layers() - 1


@torch.no_grad()
@pytest.mark.parametrize("keywords", [{}, {"distilled": True}, {"class_token": False}])
def test_token_map_is_the_attention_of_the_class_token_to_the_patches(keywords):
    model, images = small(**keywords), torch.randn(2, 3, 64, 90)
    (tokens,) = inputs_of(model.blocks[-1].attn, lambda: model(images))
    rows = packed_probabilities(model.blocks[-1].attn, tokens)
    row = rows[:, :, 0] if model.num_special else rows.mean(2)
    maps = model.token_maps()
    assert maps.keys() == {"attention::blocks.1.attn"}
    attention = maps["attention::blocks.1.attn"]
    assert attention.shape == (2, 2, 4, 6)
    close(attention.flatten(2), row[..., model.num_special :])
    close(attention.sum((2, 3)) + row[..., : model.num_special].sum(-1), torch.ones(2, 2))


@torch.no_grad()
def test_token_maps_are_exact_whatever_the_forward_was_computed_in():
    model, images = small(), torch.randn(2, 3, 64, 64)
    model(images)
    expected = model.token_maps()["attention::blocks.1.attn"]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        model(images)
    under_autocast = model.token_maps()["attention::blocks.1.attn"]
    assert under_autocast.dtype is torch.float32
    assert 0 < (under_autocast - expected).norm() < 0.05 * expected.norm()
    model.bfloat16()(images.bfloat16())
    half = model.token_maps()["attention::blocks.1.attn"]
    assert half.dtype is torch.float32
    assert (half - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_large_attention_matrices_are_averaged_in_pieces(monkeypatch):
    q, k = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 7, 4)
    expected = attention_probabilities(q, k, 0.5).mean(2)
    monkeypatch.setattr(token_maps, "PIECE", 4 * 2 * 3 * 7)  # 4, 4 and 2 queries
    close(attention_received(q, k, 0.5), expected)
    monkeypatch.setattr(token_maps, "PIECE", 1)
    close(attention_received(q, k, 0.5), expected)


@torch.no_grad()
def test_compiled_and_traced_forwards_leave_token_maps_alone():
    model, images = small(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(images), model(images))
    before = model.token_maps()
    other = torch.randn(2, 3, 64, 64)
    compiled(other)
    close(model.token_maps(), before)
    model.eval()
    compiled(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about itself
        torch.jit.trace(model, other, check_trace=False)
    assert model.token_maps() == {}
