"""DFvT: fusion gate, any input size, the dense backbone, optimizer facts."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from models.dfvt import Dane, DFvT
from models.layers.resize import resize_bias_table
from tests.golden_tools import SkipInit

SMALL = dict(
    num_classes=5,
    img_size=64,
    embed_dim=16,
    depths=(2, 2, 2, 2),
    num_heads=(1, 2, 4, 4),
    window_size=3,
    drop_path_rate=0.0,
)


def small(**changes):
    model = DFvT(**SMALL | changes)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "bias_table")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "dense"),
    [("dfvt_tiny", 3_680_067), ("dfvt_small", 10_844_901), ("dfvt_base", 36_996_056)],
)
def test_dense_backbone_has_the_published_number_of_parameters_and_no_mask(name, dense):
    with torch.device("meta"), SkipInit():
        classifier, backbone = create_model(name), create_model(name, num_classes=0)
    assert sum(p.numel() for p in backbone.parameters()) == dense
    masks = {key for key in classifier.state_dict() if key.endswith("attn_mask")}
    assert masks == (
        {"layers.0.blocks.1.attn_mask", "layers.1.blocks.1.attn_mask"}
        if name == "dfvt_base"
        else set()
    )
    assert not [key for key in backbone.state_dict() if key.endswith("attn_mask")]


def test_gate_weighs_the_convolution_path_by_token_and_channel():
    gate = Dane(32).eval()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    x, y = torch.randn(2, 2, 3, 5, 32)
    mixed = gate(x, y, F.layer_norm(y, (32,)))
    m = torch.sigmoid(gate.fc_spatial(y) + gate.fc_channel(x.mean((1, 2)))[:, None, None])
    torch.testing.assert_close(mixed, y * m + x * (1 - m))
    torch.testing.assert_close(gate.gate(), m.mean(-1))


@pytest.mark.parametrize("hw", [(64, 64), (96, 40), (57, 90), (32, 32)])
@pytest.mark.parametrize("built", [64, 32])
def test_another_input_size_equals_a_model_built_for_it(hw, built):
    model = small(img_size=built)
    other = small(img_size=hw)
    state = model.state_dict()
    for name in state:
        if name.endswith("relative_position_bias_table"):
            module = name.removesuffix(".relative_position_bias_table")
            old, new = (m.get_submodule(module).window for m in (model, other))
            state[name] = resize_bias_table(state[name], (old, old), (new, new))
    other.load_state_dict(state)
    x = torch.rand(2, 3, *hw)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hw", [(72, 104), (97, 35)])
def test_pyramid_of_a_classifier_has_the_size_of_the_strides_rounded_up(hw):
    model = small()
    maps = model.forward_pyramid(torch.rand(2, 3, *hw))
    for x, info in zip(maps, model.feature_info, strict=True):
        stride = info["stride"]
        assert x.shape == (2, info["channels"], -(-hw[0] // stride), -(-hw[1] // stride))
        assert x.isfinite().all()
    assert [info["stride"] for info in model.feature_info] == [4, 8, 16, 32]


def test_dense_backbone_has_the_published_names_and_no_unused_parameter():
    model = small(num_classes=0).train()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    norms = {f"norm{i}" for i in range(4)}
    shared = {"patch_embed", "layers", "convlayers", "multiresolution_conv"}
    assert names == shared | norms | {"conv1x1layers"}
    sum(x.square().mean() for x in model.forward_pyramid(torch.rand(2, 3, 72, 104))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dense_windows_never_shrink_and_every_level_shifts():
    model = small(num_classes=0)
    for level in model.layers:
        assert [block.attn.windows_on((2, 2)) for block in level.blocks] == [(3, 0), (3, 1)]


def test_odd_maps_are_cropped_after_upsampling():
    model = small()
    x = torch.rand(1, 3, 36, 44)
    with torch.no_grad():
        level, _ = model._level(0, model._stem(x))
        pyramid = model.forward_pyramid(x)[0]
    assert level.shape == (1, 5, 6, 16)
    nearest = level.permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(pyramid, nearest[:, :, :9, :11])


def test_gradient_checkpointing_changes_neither_gradients_nor_batch_statistics():
    plain = small(drop_path_rate=0.5).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.rand(2, 3, 64, 96)
    for model in (plain, saving):
        torch.manual_seed(1)
        model(x).square().mean().backward()
    torch.testing.assert_close(saving.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert saving.patch_embed.norm.num_batches_tracked == 1
    assert saving.convlayers[0].conv1[1].num_batches_tracked == 1
    assert saving.convlayers[0].conv1[1].momentum == 0.1
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_switches_of_the_stem_work():
    model = small(ape=True, patch_norm=False, in_chans=1, qk_scale=0.5, qkv_bias=False).train()
    assert not [n for n in model.state_dict() if n.startswith("patch_embed.norm")]
    model(torch.rand(2, 1, 64, 64)).square().mean().backward()
    assert model.absolute_pos_embed.grad.abs().sum() > 0
    assert model.no_weight_decay() == {"absolute_pos_embed"}
    assert model(torch.rand(2, 1, 50, 71)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(patch_size=8), r"MODEL.DFvT.PATCH_SIZE=8.*set it to 4"),
        (dict(embed_dim=15, num_heads=(1, 1, 1, 1)), "EMBED_DIM=15 must be even"),
    ],
)
def test_impossible_hyper_parameters_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_convolutions_start_with_a_fan_out_not_divided_by_the_groups():
    model = DFvT(**SMALL | dict(embed_dim=96, num_heads=(3, 6, 12, 24)))
    depthwise, pointwise = model.convlayers[2].conv1x1_1[3], model.convlayers[2].conv1x1_1[0]
    assert depthwise.weight.std().item() == pytest.approx((2 / (9 * 384)) ** 0.5, rel=0.05)
    assert pointwise.weight.std().item() == pytest.approx((2 / 384) ** 0.5, rel=0.05)
    assert model.layers[1].downsample.reduction.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.patch_embed.proj2.bias.abs().max() <= (48 * 9) ** -0.5


def test_optimizer_facts_are_the_published_ones():
    model = small()
    assert model.lr_multipliers() == {"convlayers": 2.0, "multiresolution_conv": 2.0}
    assert model.no_weight_decay() == set()
    assert model.layer_id("patch_embed.proj1.weight") == 0
    assert model.layer_id("convlayers.1.conv1.0.weight") == 3
    assert model.layer_id("multiresolution_conv.1.0.weight") == 3
    assert model.layer_id("layers.1.blocks.1.norm1.weight") == 4
    assert model.layer_id("layers.1.downsample.norm.weight") == 4
    assert model.layer_id("head.weight") == model.num_layers() - 1 == 9


def test_token_maps_show_the_gate_of_the_last_evaluation_forward():
    model = small()
    assert model.token_maps() == {}
    with torch.no_grad():
        model(torch.rand(2, 3, 64, 96))
    maps = model.token_maps()
    assert [m.shape for m in maps.values()] == [(2, 8, 12), (2, 4, 6), (2, 2, 3), (2, 2, 3)]
    assert all(m.min() > 0 and m.max() < 1 for m in maps.values())
    copy.deepcopy(model)
    assert model.train().token_maps() == {}


@pytest.mark.slow
def test_model_compiles_as_one_graph():
    model = small(depths=(1, 1), num_heads=(1, 2), img_size=32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.rand(1, 3, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("window_size", [3, 7])  # 7 does not fit the maps of 2 x 2 and 4 x 4
def test_reset_classifier_turns_the_model_into_the_dense_backbone_and_back(window_size):
    model, images = small(window_size=window_size), torch.rand(2, 3, 75, 101)
    before, logits = copy.deepcopy(model), model(images)
    model.reset_classifier(0)
    dense = small(window_size=window_size, num_classes=0)
    dense.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model.forward_pyramid(images), dense.forward_pyramid(images))
    assert model.no_weight_decay() == dense.no_weight_decay()
    assert model.lr_multipliers() == {}
    assert torch.equal(model.norm3.weight, before.norm.weight)

    model.reset_classifier(5)
    again = small(window_size=window_size)
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(model(images), again(images))
    if window_size == 3:  # no table was resized
        model.head.load_state_dict(before.head.state_dict())
        torch.testing.assert_close(model(images), logits)
