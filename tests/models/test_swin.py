"""Swin, Swin V2, Swin-MLP: any input size, switches, initial weights, optimizer facts, variants."""

import pytest
import torch

from config import load_config
from models import create_model, registry, variant_file
from models.layers.resize import resize_bias_table
from models.layers.tokens import to_pair
from models.pretrained import load_pretrained
from models.swin import Swin, SwinMlp, SwinV2
from tests.golden_tools import SkipInit
from tests.reference.attention import inputs_of

SMALL = dict(
    num_classes=5, img_size=64, embed_dim=12, depths=(2, 2), num_heads=(2, 4), window_size=4
)
ALL = pytest.mark.parametrize("cls", [Swin, SwinV2, SwinMlp])


def small(cls, **changes):
    kwargs = SMALL | changes
    if cls is SwinV2:
        kwargs = dict(pretrained_window_sizes=[0] * len(kwargs["depths"])) | kwargs
    model = cls(**kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


FINETUNED = "patch4_window7_224_22k", "patch4_window7_224_22kto1k_finetune"
# Variants of one architecture: they differ in classes, image size and recipe.
SHARED = [
    ["swin_tiny_patch4_window7_224", *(f"swin_tiny_{n}" for n in FINETUNED)],
    ["swin_small_patch4_window7_224", *(f"swin_small_{n}" for n in FINETUNED)],
    ["swin_base_patch4_window7_224", *(f"swin_base_{n}" for n in FINETUNED)],
    [
        "swin_base_patch4_window12_384_finetune",
        "swin_base_patch4_window12_384_22kto1k_finetune",
    ],
    [f"swin_large_{n}" for n in FINETUNED],
    [f"swinv2_tiny_patch4_window{w}_256" for w in (8, 16)],
    [f"swinv2_small_patch4_window{w}_256" for w in (8, 16)],
    [
        "swinv2_base_patch4_window8_256",
        "swinv2_base_patch4_window16_256",
        "swinv2_base_patch4_window12_192_22k",
        "swinv2_base_patch4_window12to16_192to256_22kto1k_ft",
        "swinv2_base_patch4_window12to24_192to384_22kto1k_ft",
    ],
    [
        "swinv2_large_patch4_window12_192_22k",
        "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
        "swinv2_large_patch4_window12to24_192to384_22kto1k_ft",
    ],
]


@pytest.mark.parametrize("names", SHARED, ids=[names[0] for names in SHARED])
def test_variants_of_one_architecture_have_the_same_keys(names):
    shapes = []
    for name in names:
        config = load_config(variant_file(name)).MODEL
        keys = dict(config[registry.find(config.TYPE).node])
        if config.TYPE == "swinv2":  # its parameters do not depend on the window
            keys = {k: v for k, v in keys.items() if "WINDOW" not in k}
        shapes.append(keys)
    assert all(keys == shapes[0] for keys in shapes)


@pytest.mark.parametrize(("window", "entries"), [(8, 250), (16, 247)])
def test_a_mask_is_kept_where_the_published_state_dict_has_one(window, entries):
    with torch.device("meta"), SkipInit():
        model = create_model(f"swinv2_tiny_patch4_window{window}_256")
    assert len(model.state_dict()) == entries


def test_22k_variants_have_21841_classes():
    with torch.device("meta"), SkipInit():
        assert create_model("swin_large_patch4_window7_224_22k").head.out_features == 21841


@ALL
def test_pyramid_of_a_classifier_has_the_size_of_the_strides_rounded_up(cls):
    model, hw = small(cls, depths=(2, 2, 1, 1), num_heads=(2, 4, 4, 4)), (97, 35)
    maps = model.forward_pyramid(torch.rand(2, 3, *hw))
    for x, info in zip(maps, model.feature_info, strict=True):
        stride = info["stride"]
        assert x.shape == (2, info["channels"], -(-hw[0] // stride), -(-hw[1] // stride))
        assert x.isfinite().all()
    assert [info["stride"] for info in model.feature_info] == [4, 8, 16, 32]


@ALL
@pytest.mark.parametrize("hw", [(64, 64), (40, 72), (57, 90)])
@pytest.mark.parametrize("built", [64, 24])
def test_another_input_size_equals_a_model_built_for_it(cls, hw, built):
    if cls is SwinMlp and built == 24:
        pytest.skip("Swin-MLP keeps the window of 3 that it was built with")
    model = small(cls, img_size=built)
    other = small(cls, img_size=hw)
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


@pytest.mark.parametrize(
    ("built", "size", "resized"),
    [
        (64, 24, 1),  # windows of 4 and 4 -> 4 and 3
        (64, 8, 2),  # 4 and 4 -> 2 and 1
        (24, 32, 1),  # 4 and 3 -> 4 and 4
        (8, 16, 2),  # 2 and 1 -> 4 and 2
        (24, 24, 0),
        (64, (32, 80), 0),  # the shorter side of each map still has a whole window
    ],
)
def test_swin_mlp_loaded_at_another_size_equals_the_one_it_comes_from_there(built, size, resized):
    source, model = small(SwinMlp, img_size=built), small(SwinMlp, img_size=size)
    report = load_pretrained(model, source.state_dict())
    assert len(report.resized) == resized * 4  # weight and bias of two blocks
    x = torch.rand(2, 3, *to_pair(size))
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("built", "changes", "message"),
    [
        (24, dict(img_size=64), "3x3 in the file and of 4x4 on this model's map of 8x8; "),
        (64, dict(img_size=(24, 40)), "4x4 in the file and of 3x3 on this model's map of 3x5; "),
        (64, dict(window_size=2), "4x4 in the file and of 2x2 on this model's map of 16x16; "),
    ],
)
def test_swin_mlp_weights_without_an_equivalent_are_refused_with_the_reason(
    built, changes, message
):
    model = small(SwinMlp, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{message}.*build .* DATA\.IMG_SIZE and WINDOW_SIZE"):
        load_pretrained(model, small(SwinMlp, img_size=built).state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_swin_mlp_weights_of_other_heads_are_another_table():
    source = small(SwinMlp, num_heads=(3, 4))
    with pytest.raises(ValueError, match=r"spatial_mlp\.weight \(48, 16, 1\) instead") as error:
        load_pretrained(small(SwinMlp), source.state_dict())
    assert "mixes windows" not in str(error.value)


def test_pretrained_windows_keep_the_unit_of_the_bias_at_every_size():
    native = small(SwinV2, pretrained_window_sizes=[0, 0])
    fixed = small(SwinV2, pretrained_window_sizes=[4, 4])
    fixed.load_state_dict(native.state_dict())
    large, tiny = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(native(large), fixed(large))
        assert not torch.allclose(native(tiny), fixed(tiny), atol=1e-4)


def test_training_and_evaluation_agree_without_dropout():
    for cls in (Swin, SwinV2, SwinMlp):
        model, x = small(cls, drop_path_rate=0.0), torch.rand(2, 3, 40, 72)
        with torch.no_grad():
            torch.testing.assert_close(model(x), model.train()(x), rtol=1e-4, atol=1e-5)


@ALL
def test_dense_backbone_has_a_norm_per_stage_and_no_unused_parameter(cls):
    model = small(cls, num_classes=0).train()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"patch_embed", "layers", "norm0", "norm1"}
    sum(x.square().mean() for x in model.forward_pyramid(torch.rand(2, 3, 40, 72))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(torch.rand(2, 3, 40, 72)).shape == (2, model.num_features)


@ALL
def test_a_classifier_adds_no_parameter_to_the_pyramid(cls):
    model = small(cls)
    assert "norm0" not in dict(model.named_children())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features = model.norm(model.forward_pyramid(x)[-1].permute(0, 2, 3, 1))
        torch.testing.assert_close(features, model.forward_features(x))


@ALL
def test_switches_of_the_stem_work(cls):
    model = small(cls, ape=True, patch_norm=False, patch_size=2, in_chans=1, img_size=32).train()
    assert not any(name.startswith("patch_embed.norm") for name in model.state_dict())
    model(torch.rand(2, 1, 32, 32)).square().mean().backward()
    assert model.absolute_pos_embed.shape == (1, 256, 12)
    assert model.absolute_pos_embed.grad.abs().sum() > 0
    assert model(torch.rand(2, 1, 21, 50)).isfinite().all()
    assert "absolute_pos_embed" in model.no_weight_decay()


def test_qk_scale_replaces_the_scale_of_the_logits():
    x = torch.rand(1, 3, 64, 64)
    default, same, other = (small(Swin, qk_scale=s) for s in (None, 6**-0.5, 1.0))
    for model in (same, other):
        model.load_state_dict(default.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(default(x), same(x))
        assert not torch.allclose(default(x), other(x), atol=1e-3)


@pytest.mark.parametrize("cls", [Swin, SwinV2])
def test_qkv_bias_can_be_left_out(cls):
    model = small(cls, qkv_bias=False)
    assert not [n for n in model.state_dict() if n.endswith(("qkv.bias", "q_bias", "v_bias"))]
    assert model(torch.rand(1, 3, 40, 72)).isfinite().all()


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (Swin, dict(num_heads=(5, 10)), r"NUM_HEADS\[0\]=5 does not divide the width 12"),
        (Swin, dict(num_heads=(2,)), r"NUM_HEADS=\[2\] need one positive entry per stage"),
        (Swin, dict(window_size=0), "WINDOW_SIZE=0"),
        (SwinV2, dict(pretrained_window_sizes=[12]), r"PRETRAINED_WINDOW_SIZES=\[12\]"),
    ],
)
def test_impossible_hyper_parameters_are_named(cls, changes, message):
    with pytest.raises(ValueError, match=message):
        small(cls, **changes)


def test_only_blocks_shifted_at_the_built_size_keep_a_mask():
    masks = [n for n in Swin(**SMALL | dict(img_size=32)).state_dict() if n.endswith("attn_mask")]
    assert masks == ["layers.0.blocks.1.attn_mask"]  # stages of 8x8 and 4x4, windows of 4


def test_swin_v2_with_windows_of_one_token_is_finite():
    model = small(SwinV2, img_size=8)
    assert model.layers[1].blocks[0].attn.window == 1
    out = model(torch.rand(2, 3, 8, 8))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert out.isfinite().all()


def test_swin_v2_blocks_start_as_the_identity():
    model = SwinV2(**SMALL, pretrained_window_sizes=(0, 0))
    x = torch.rand(2, 8, 8, 12)
    assert torch.equal(model.layers[0].blocks[1](x), x)
    attn = model.layers[0].blocks[0].attn
    torch.testing.assert_close(attn.logit_scale, torch.full((2, 1, 1), 10.0).log())
    assert model.layers[0].downsample.norm.weight.eq(1).all()


def test_weights_start_as_published():
    model = Swin(**SMALL | dict(embed_dim=96, num_heads=(3, 6)))
    block = model.layers[0].blocks[0]
    for weight in (
        block.attn.qkv.weight,
        block.mlp.fc1.weight,
        model.layers[0].downsample.reduction.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.2)
    assert block.attn.qkv.bias.eq(0).all()
    fan_in = 3 * 4 * 4
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(
        (3 * fan_in) ** -0.5, rel=0.05
    )
    mixer = SwinMlp(**SMALL).layers[0].blocks[0].spatial_mlp
    assert mixer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.bias.eq(0).all()


def test_names_without_weight_decay_exist_and_are_the_published_ones():
    for cls, words in [
        (Swin, {"relative_position_bias_table"}),
        (SwinV2, {"cpb_mlp", "logit_scale"}),
        (SwinMlp, set()),
    ]:
        model = small(cls)
        listed = model.no_weight_decay()
        assert listed == {n for n, _ in model.named_parameters() if any(w in n for w in words)}
        assert bool(listed) == bool(words)


def test_layer_decay_counts_blocks_and_downsampling_goes_with_the_last_one():
    model = small(Swin)
    ids = {name: model.layer_id(name) for name, _ in model.named_parameters()}
    assert ids["patch_embed.proj.weight"] == 0
    assert ids["layers.0.blocks.0.norm1.weight"] == 1
    assert ids["layers.0.blocks.1.mlp.fc1.weight"] == 2
    assert ids["layers.0.downsample.norm.weight"] == 2
    assert ids["layers.1.blocks.0.attn.qkv.weight"] == 3
    assert ids["norm.weight"] == ids["head.bias"] == 5 == model.num_layers() - 1


@pytest.mark.slow
@ALL
def test_model_compiles_as_one_graph(cls):
    model = small(cls, depths=(2,), num_heads=(2,), img_size=32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.rand(1, 3, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("cls", [Swin, SwinV2])
def test_token_maps_are_those_of_the_last_block_of_each_stage(cls):
    model, images = small(cls), torch.rand(2, 3, 70, 90)
    layers = [stage.blocks[-1].attn for stage in model.layers]
    inputs = [inputs_of(layer, lambda: model(images)) for layer in layers]
    maps = model.token_maps()
    assert list(maps) == [f"attention::layers.{i}.blocks.1.attn" for i in range(2)]
    for attention, layer, given in zip(maps.values(), layers, inputs, strict=True):
        assert attention.shape == (2, layer.num_heads, *given[0].shape[1:3])
        torch.testing.assert_close(attention, layer.attention_maps(*given)["attention"])


@torch.no_grad()
def test_token_maps_of_swin_mlp_are_its_matrices():
    model = small(SwinMlp)
    maps = model.token_maps()
    assert list(maps) == [f"filters::layers.{i}.blocks.1.spatial_mlp" for i in range(2)]
    filters, mixer = maps["filters::layers.1.blocks.1.spatial_mlp"], model.layers[1].blocks[1]
    assert filters.shape == (4, 16, 16)
    # A window with nothing but a one at position 6 of head 2, of 6 channels per head.
    x = torch.zeros(1, 4, 4, 24)
    x[0, 1, 2, 12] = 1.0
    change = mixer.spatial_mlp(x) - mixer.spatial_mlp(torch.zeros_like(x))
    torch.testing.assert_close(change[0, :, :, 12].flatten(), filters[2, :, 6])


@ALL
def test_the_norm_of_the_last_stage_survives_without_a_classifier(cls):
    model, images = small(cls), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(images)
        model.reset_classifier(0)
        assert torch.equal(model.forward_features(images), features)
        norms = [f"norm{i}.weight" for i in range(2)]
        assert [name for name in model.state_dict() if name.startswith("norm")][::2] == norms
        model.norm0.weight.fill_(3.0)
        model.reset_classifier(0)
        assert model.norm0.weight.mean() == 3
        model.reset_classifier(5)
        assert torch.equal(model.forward_features(images), features)


@pytest.mark.parametrize("training", [False, True])
def test_padded_windows_are_finite_in_half_precision(training):
    """The least length of a vector that PyTorch divides by, 1e-12, is 0 in float16."""
    model = small(SwinV2).train(training)
    images = torch.randn(2, 3, 72, 72)  # its windows do not fit the maps
    exact = model.eval()(images)
    model.train(training).half()
    assert model(images.half()).isfinite().all()
    torch.testing.assert_close(model.eval()(images.half()).float(), exact, rtol=0.05, atol=0.05)
