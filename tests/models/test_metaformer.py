"""The MetaFormer frame: published sizes, any input size, every mixer in every stage, clear errors."""

import re

import pytest
import torch
from torch import nn

from config import load_config
from models import build_model, create_model
from models.layers.fourier import set_fourier_way
from models.layers.resize import resize_complex_filter
from models.metaformer import Downsampling, MetaFormer
from models.mixers import list_mixers, register_mixer, registry
from tests.reference.attention import inputs_of, packed_probabilities


def tiny(mixers=("dynamic_filter",) * 4, **keywords):
    options = dict(
        mixers=mixers,
        depths=(1, 1, 2, 1),
        embed_dims=(16, 16, 32, 32),
        head_dim=8,
        num_classes=5,
        img_size=64,
    )
    return MetaFormer(**(options | keywords))


def with_visible_weights(model):
    """Weights so large that no branch is lost in rounding."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.5 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def test_initial_weights_have_the_published_spread():
    model = tiny(mixers=("afno", "sepconv", "global_filter", "dynamic_filter"))
    state = model.state_dict()
    for name in ("stages.2.0.mlp.fc1.weight", "downsample_layers.3.conv.weight", "head.fc1.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.1), name
    for name in ("stages.0.0.token_mixer.w1", "stages.2.1.token_mixer.complex_weights"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.1), name
    assert state["downsample_layers.0.conv.bias"].eq(0).all()
    assert state["head.norm.weight"].eq(1).all()


@pytest.mark.parametrize("way", ["fft", "matmul"])
def test_other_sizes_equal_a_model_built_for_them_with_resampled_filters(way):
    model = with_visible_weights(tiny(img_size=64)).eval()
    other = tiny(img_size=(96, 80)).eval()
    state = model.state_dict()
    for name, table in other.state_dict().items():
        if name.endswith("complex_weights"):
            assert state[name].shape != table.shape
            state[name] = resize_complex_filter(state[name], tuple(table.shape[:2]))
    other.load_state_dict(state, strict=True)
    set_fourier_way(model, way)
    set_fourier_way(other, way)
    images = torch.randn(2, 3, 96, 80)
    with torch.no_grad():
        torch.testing.assert_close(model(images), other(images))


@pytest.mark.parametrize("stem", ["conv7", "patch4"])
@pytest.mark.parametrize("downsample", ["conv3", "conv2"])
@pytest.mark.parametrize("size", [(33, 50), (61, 95)])
def test_maps_have_the_size_of_the_strides_rounded_up(size, stem, downsample):
    model = tiny(num_classes=0, stem=stem, downsample=downsample)
    maps = model.forward_pyramid(torch.randn(1, 3, *size))
    for y, info in zip(maps, model.feature_info, strict=True):
        expected = tuple(-(-side // info["stride"]) for side in size)
        assert y.shape == (1, info["channels"], *expected)


@pytest.mark.parametrize("side", [32, 35, 36, 39])
def test_padding_leaves_sizes_alone_that_the_published_stem_takes_whole(side):
    stem = Downsampling(3, 8, dict(kernel_size=7, stride=4, padding=2))
    x = torch.randn(1, 3, side, side)
    out = stem(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, stem.conv(x))


def test_matrix_products_give_the_logits_of_the_fft():
    model = with_visible_weights(
        tiny(("dynamic_filter", "global_filter", "afno", "dynamic_filter"))
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        fft = model(images)
        set_fourier_way(model, "matmul")
        assert relative_error(model(images), fft) < 1e-4


def test_double_precision_is_really_double():
    model = with_visible_weights(tiny()).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        single, double = model(images), model.double()(images.double())
    assert double.dtype == torch.float64
    assert 1e-8 < relative_error(single.double(), double) < 1e-3


@pytest.mark.parametrize("way", ["fft", "matmul"])
def test_bfloat16_autocast_trains_and_follows_float32(way):
    model = tiny()
    set_fourier_way(model, way)
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    out.float().square().mean().backward()
    assert relative_error(out.float(), expected) < 0.1
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_model_in_bfloat16_runs():
    model = tiny(("dynamic_filter", "global_filter", "afno", "random")).bfloat16()
    assert model(torch.randn(1, 3, 64, 64).bfloat16()).dtype == torch.bfloat16


def test_a_dense_model_has_norms_and_no_classifier():
    model = tiny(num_classes=0)
    names = model.state_dict().keys()
    assert {f"norm{i}.weight" for i in range(4)} <= names
    assert not [n for n in names if n.startswith(("norm.", "head."))]
    sum(y.square().mean() for y in model.forward_pyramid(torch.randn(1, 3, 64, 64))).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert not [n for n in tiny().state_dict() if n.startswith("norm0")]


def test_a_reset_classifier_is_fresh_and_sized():
    model = tiny(num_classes=0)
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert model.get_classifier().fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, model.num_features)


def test_depths_for_layer_decay_rise_from_stem_to_head():
    model = tiny()
    assert model.layer_id("downsample_layers.0.conv.weight") == 0
    assert model.layer_id("stages.0.0.norm1.weight") == 1
    assert model.layer_id("downsample_layers.2.pre_norm.weight") == 3
    assert model.layer_id("stages.2.1.mlp.fc1.weight") == 4
    assert model.layer_id("head.fc2.bias") == model.num_layers() - 1 == 6


def test_token_maps_hold_the_amplitudes_of_each_stage():
    model = tiny(("sepconv", "global_filter", "dynamic_filter", "dynamic_filter"))
    maps = model.token_maps()
    assert {key: tuple(m.shape) for key, m in maps.items()} == {
        "stages.1": (1, 32, 8, 5),
        "stages.2": (2, 4, 4, 3),
        "stages.3": (1, 4, 2, 2),
    }
    weights = model.stages[2][1].token_mixer.complex_weights
    amplitude = torch.hypot(weights[3, 2, 1, 0], weights[3, 2, 1, 1])
    torch.testing.assert_close(maps["stages.2"][1, 1, 3, 2], amplitude.detach())


ATTENTION = {
    "attention": {"attention": (2, 3)},
    "head_token": {"attention": (2, 3)},
    "window(window_size=2)": {"attention": (2, 3)},
    "shifted_window(window_size=2)": {"attention": (2, 3)},
    "spatial_reduction(reduction=2)": {"attention": (1, 2)},
    "dilated": {"attention": (9, 2, 3)},
    "point_sampled": {"points": (4, 2, 3, 2), "attention": (4, 2, 3)},
}


@torch.no_grad()
@pytest.mark.parametrize("spec", ATTENTION)
def test_token_maps_show_the_attention_of_the_last_block_of_a_stage(spec):
    model, images = tiny(("pooling", "pooling", spec, "sepconv")).eval(), torch.randn(2, 3, 30, 44)
    mixer = model.stages[2][1].token_mixer
    (x,) = inputs_of(mixer, lambda: model(images))
    maps = model.token_maps()
    path = "stages.2.1.token_mixer"
    shapes = {f"{kind}::{path}": (2, 4, *shape) for kind, shape in ATTENTION[spec].items()}
    assert {name: tuple(m.shape) for name, m in maps.items()} == shapes
    torch.testing.assert_close(
        maps, {f"{kind}::{path}": m for kind, m in mixer.attention_maps(x).items()}
    )
    attention = maps[f"attention::{path}"]
    total = attention.sum((2, 3)) if attention.ndim == 4 else attention.sum(2)
    expected = torch.ones_like(total)
    if spec == "attention":
        rows = packed_probabilities(mixer, x.flatten(1, 2))
        torch.testing.assert_close(attention.flatten(2), rows.mean(2))
    if spec == "head_token":
        assert (total < 1).all()
    elif "window" in spec:  # each of the two windows of this map hands out 1
        torch.testing.assert_close(total, 2 * expected)
    else:
        torch.testing.assert_close(total, expected)


def test_mixers_without_attention_or_filters_have_no_token_maps():
    model = tiny(("identity", "pooling", "random", "afno")).eval()
    model(torch.randn(1, 3, 64, 64))
    assert model.token_maps() == {}
    shown = {re.sub(r"\(.*", "", spec) for spec in ATTENTION} | {"global", "dynamic_filter"}
    others = {"identity", "pooling", "random", "afno", "sepconv", "global_filter"}
    assert shown | others == set(list_mixers())


def test_norms_follow_the_classifier_in_both_directions():
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    model.double().reset_classifier(0)
    assert isinstance(model.norm, nn.Identity)
    assert {model.get_submodule(f"norm{i}").weight.dtype for i in range(4)} == {torch.float64}
    with torch.no_grad():
        model.norm2.weight.fill_(3.0)
    model.reset_classifier(0)
    assert model.norm2.weight.mean() == 3  # nothing changes, so nothing is fresh
    maps = model.forward_pyramid(images.double())
    assert maps[2].std().item() == pytest.approx(3, rel=0.01)
    model.reset_classifier(3)
    assert not [name for name, _ in model.named_modules() if re.fullmatch(r"norm\d", name)]
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    model.reset_classifier(4)
    assert model.norm.weight.mean() == 2


def test_gelu_ablation_keeps_the_routing_activation():
    names = tiny(act="gelu").state_dict().keys()
    assert not [n for n in names if ".act1." in n or ".mlp.act." in n]
    assert "stages.0.0.token_mixer.reweight.act.scale" in names


def test_a_frame_may_have_other_stages_norms_and_heads():
    model = tiny(
        ("pooling", "attention"),
        depths=(1, 1),
        embed_dims=(16, 32),
        res_scale=(None, 1.0),
        norm="rms_norm",
        head="linear",
    )
    assert [info["stride"] for info in model.feature_info] == [4, 8]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert isinstance(model.stages[0][0].norm1, nn.RMSNorm)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(depths=(1, 1)), "one entry per stage.*'DEPTHS': \\[1, 1\\]"),
        (
            dict(act="gleu"),
            r"MODEL.METAFORMER.ACT='gleu' must be one of \['gelu', .* did you mean gelu",
        ),
        (dict(norm="ln"), "MODEL.METAFORMER.NORM='ln'.*layer_norm_no_bias"),
        (dict(stem="conv"), "MODEL.METAFORMER.STEM='conv'"),
        (dict(downsample="x"), "MODEL.METAFORMER.DOWNSAMPLE='x'"),
        (dict(feed_forward="moe"), "MODEL.METAFORMER.FEED_FORWARD='moe'"),
        (dict(head="big"), "MODEL.METAFORMER.HEAD='big'"),
        (dict(mixers=["nope"] * 4), "no mixer is named 'nope'"),
    ],
)
def test_a_wrong_key_is_explained(keywords, message):
    with pytest.raises(ValueError, match=message):
        tiny(**keywords)


def test_the_feed_forward_of_dhvt_fits_the_frame():
    model = tiny(feed_forward="daff")
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert model.stages[0][0].mlp.conv2.kernel_size == (3, 3)


def test_a_new_mixer_needs_a_module_and_a_yaml_file(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))

    @register_mixer("rolled")
    class Rolled(nn.Module):
        def __init__(self, dim, *, steps: int = 1):
            super().__init__()
            self.steps = steps

        def forward(self, x):
            return x.roll(self.steps, dims=2)

    path = tmp_path / "rolled.yaml"
    path.write_text(
        "MODEL:\n  TYPE: metaformer\n  NAME: rolled\n  METAFORMER:\n"
        "    MIXERS: [dilated, rolled, attention, rolled(steps=2)]\n    DEPTHS: [1, 1, 1, 1]\n"
    )
    model = build_model(load_config(path))
    assert [stage[0].token_mixer.steps for stage in model.stages[1::2]] == [1, 2]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_mixers_of_a_variant_can_be_replaced_by_name():
    model = create_model(
        "dfformer_s18",
        mixers=["pooling", "sepconv", "attention", "dynamic_filter(num_filters=2)"],
        depths=[1, 1, 1, 1],
        num_classes=3,
    )
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
