"""Every mixer keeps the interface; each equals its formula written out."""

import copy
import math
import pickle
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from config import load_config
from models import CONFIG_DIR, build_model
from models.layers.activations import ACTIVATIONS, StarReLU
from models.layers.head_interaction import HIAttention
from models.layers.mlp import Mlp
from models.layers.spatial_reduction import SpatialReductionAttention
from models.metaformer import MetaFormer, MetaFormerBlock
from models.mixers import MixerContext, build_mixer, list_mixers, register_mixer, registry
from models.mixers.options import parse_spec
from tests.reference.afno import afno
from tests.reference.fourier_filter import dynamic_filter, global_filter, star_relu
from utils.complexity import count

GRID = (6, 5)
CONTEXT = MixerContext(num_heads=2, grid=GRID, act=StarReLU)


def sepconv(state, x):
    y = star_relu(x @ state["pwconv1.weight"].t(), state, "act1.")
    kernel = state["dwconv.weight"]
    reach = kernel.shape[-1] // 2
    out = torch.zeros_like(y)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            weight = kernel[:, 0, dy + reach, dx + reach]
            for row in range(max(0, -dy), min(y.shape[1], y.shape[1] - dy)):
                for col in range(max(0, -dx), min(y.shape[2], y.shape[2] - dx)):
                    out[:, row, col] += y[:, row + dy, col + dx] * weight
    return out @ state["pwconv2.weight"].t()


def pooling(state, x):
    rows = []
    for row in range(x.shape[1]):
        for col in range(x.shape[2]):
            window = x[:, max(0, row - 1) : row + 2, max(0, col - 1) : col + 2]
            rows.append(window.mean((1, 2)) - x[:, row, col])
    return torch.stack(rows, 1).reshape(x.shape)


def attention(state, x):
    tokens = x.flatten(1, 2)
    q, k, v = (tokens @ state["qkv.weight"].t()).chunk(3, dim=-1)
    heads = []
    for head in range(2):
        part = slice(head * q.shape[-1] // 2, (head + 1) * q.shape[-1] // 2)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / (q.shape[-1] // 2) ** 0.5
        heads.append(logits.softmax(-1) @ v[..., part])
    out = torch.cat(heads, -1) @ state["proj.weight"].t() + state["proj.bias"]
    return out.reshape(x.shape)


ROOT = Path(__file__).resolve().parents[2]

# Attentions with global keys, and the same with the options that run the block for other rows.
KEPT, GRAINED = "attention(keep_rate=0.6)", "attention(grained=True)"
KEPT_OF = {
    "attention": KEPT,
    "head_token": "head_token(keep_rate=0.6)",
    "spatial_reduction(reduction=2)": "spatial_reduction(reduction=2, keep_rate=0.6)",
}
GRAINED_OF = {
    "attention": GRAINED,
    "head_token": "head_token(grained=True)",
    "spatial_reduction(reduction=2)": "spatial_reduction(reduction=2, grained=True)",
}
QUERY_MIXERS = [*KEPT_OF.values(), *GRAINED_OF.values()]

FORMULAS = {
    "afno": afno,
    "afno(shrink=0.4)": partial(afno, shrink=0.4),
    "afno(expansion=1, num_blocks=4)": afno,
    "attention": attention,
    "dynamic_filter": dynamic_filter,
    "dynamic_filter(expansion=1.5)": dynamic_filter,
    "global_filter": global_filter,
    "global_filter(expansion=0.5)": global_filter,
    "identity": lambda state, x: x,
    "pooling": pooling,
    "random": lambda state, x: (state["random_matrix"] @ x.flatten(1, 2)).reshape(x.shape),
    "sepconv": sepconv,
    "sepconv(expansion=1.5, kernel_size=3)": sepconv,
}

# By name in ACT, written out.
ACTIVATION_FORMULAS = dict(
    gelu=lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    relu=lambda x: x * (x > 0),
    silu=lambda x: x / (1 + (-x).exp()),
    squared_relu=lambda x: x * x * (x > 0),
    star_relu=lambda x: 0.8944 * x * x * (x > 0) - 0.4472,
)


def build(name, context=CONTEXT):
    """A mixer of width 8 whose parameters are large enough that none of them is lost in rounding."""
    mixer = build_mixer(name, 8, context)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return mixer


@pytest.mark.parametrize("name", FORMULAS)
def test_mixer_equals_its_formula_forward_and_backward(name):
    mixer = build(name).double().eval()
    x = torch.randn(2, *GRID, 8, dtype=torch.float64, requires_grad=True)
    state = dict(mixer.named_parameters()) | dict(mixer.named_buffers())
    out, expected = mixer(x), FORMULAS[name](state, x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    inputs = [x, *mixer.parameters()]
    direction = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_options_of_the_formulas_change_the_result():
    x = torch.randn(2, *GRID, 8, dtype=torch.float64)
    mixer = build("afno(shrink=0.4)").double().eval()
    assert (mixer(x) - afno(mixer.state_dict(), x)).norm() > 0.1 * mixer(x).norm()
    for spec, width in {
        "afno(expansion=1)": 8,
        "dynamic_filter(expansion=1.5)": 12,
        "global_filter(expansion=0.5)": 4,
        "sepconv(expansion=1.5)": 12,
    }.items():
        assert build(spec).pwconv1.weight.shape == (width, 8)


@pytest.mark.parametrize("mixer", ["attention", "head_token", KEPT])
def test_attention_is_dropped_in_training_only(mixer):
    name, _, options = mixer.rstrip(")").partition("(")
    dropping = block(f"{name}({options + ', ' if options else ''}attn_drop=0.5)")
    plain = block(mixer)
    plain.load_state_dict(dropping.state_dict(), strict=True)
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(dropping.eval()(x), plain.eval()(x))
    torch.testing.assert_close(plain.train()(x), plain.eval()(x))
    assert not torch.allclose(dropping.train()(x), dropping(x))


@pytest.mark.parametrize("name", list_mixers())
def test_mixer_in_bfloat16_autocast_follows_float32(name):
    mixer = build(name).eval()
    x = torch.randn(2, *GRID, 8, requires_grad=True)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer(x)
    out.float().square().mean().backward()
    assert ((out.float() - expected).norm() / expected.norm()) < 0.05
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [GRID, (1, 1), (7, 3), (10, 12)])
@pytest.mark.parametrize("name", list_mixers())
def test_mixer_keeps_any_shape_and_trains(name, size):
    mixer = build(name)
    x = torch.randn(2, *size, 8, requires_grad=True)
    out = mixer(x)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert x.grad.isfinite().all()
    lost = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lost


@pytest.mark.parametrize("name", list_mixers())
def test_mixer_output_does_not_depend_on_batch_mates(name):
    mixer = build(name).double().eval()
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[1:2], mixer(x[1:2]), rtol=1e-10, atol=1e-12)


def test_random_mixing_stays_a_mean_at_other_sizes():
    mixer = build_mixer("random", 8, CONTEXT)
    ones = torch.ones(1, 9, 4, 8)
    torch.testing.assert_close(mixer(ones), ones)


@pytest.mark.parametrize("change", ["in place", "loaded", "behind autograd", "cast"])
def test_resampled_filters_follow_new_weights(change):
    mixer = build("dynamic_filter").eval()
    x = torch.randn(1, 8, 8, 8)
    state = mixer.state_dict() | {"complex_weights": 2 * mixer.complex_weights.detach()}
    with torch.no_grad():
        expected = 2 * mixer(x)
        if change == "in place":
            mixer.complex_weights.mul_(2.0)
        elif change == "loaded":
            mixer.load_state_dict(state)
        elif change == "behind autograd":
            mixer.complex_weights.data.mul_(2.0)
            mixer.eval()
        else:
            mixer.double().load_state_dict(state)
            x, expected = x.double(), expected.double()
        torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_filters_resampled_in_inference_mode_can_be_trained_later():
    mixer = build("dynamic_filter").eval()
    x = torch.randn(1, 8, 8, 8)
    with torch.inference_mode():
        mixer(x)
    mixer(x).sum().backward()
    assert mixer.complex_weights.grad.isfinite().all()


def test_mixers_follow_their_place_in_the_frame():
    dilations = {
        heads: build_mixer("dilated", 24, MixerContext(num_heads=heads)).dilation
        for heads in (1, 2, 3, 4, 6)
    }
    assert dilations == {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2), 6: (1, 2, 3)}
    reductions = [
        build_mixer("spatial_reduction", 8, MixerContext(stage=stage)).reduction
        for stage in range(5)
    ]
    assert reductions == [8, 4, 2, 1, 1]
    shifts = [
        build_mixer("shifted_window(window_size=4)", 8, MixerContext(index=index)).shift
        for index in range(4)
    ]
    assert shifts == [0, 2, 0, 2]


def test_options_of_a_spec_reach_the_mixer():
    assert parse_spec("dynamic_filter(num_filters=2, act='gelu')") == (
        "dynamic_filter",
        dict(num_filters=2, act="gelu"),
    )
    mixer = build_mixer("dynamic_filter(num_filters=2, reweight_ratio=0.5)", 8, CONTEXT)
    assert mixer.complex_weights.shape == (6, 3, 2, 2)
    assert mixer.reweight.fc1.weight.shape == (4, 8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dynamic_filtre", r"did you mean one of \['dynamic_filter'"),
        ("dynamic_filter(2)", "write 'name' or 'name\\(option=value"),
        ("dynamic_filter(num_filters=max(1, 2))", "with literal values"),
        ("3 + 4", "cannot read"),
        ("pooling(", "cannot read"),
        ("pooling(pool_size=3, pool_size=5)", "each option once"),
        ("pooling(**{'pool_size': 3})", "cannot read"),
    ],
)
def test_a_spec_that_names_no_mixer_is_explained(spec, message):
    with pytest.raises(ValueError, match="^MODEL.METAFORMER.MIXERS: .*" + message):
        build_mixer(spec, 8, CONTEXT)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        # Options that the mixer does not have, or that the frame sets.
        ("dynamic_filter(filters=2)", r"no option \['filters'\]; it takes .*'num_filters'"),
        (
            "pooling(foo=1, keep_rate=0.5)",
            r"no option \['foo', 'keep_rate'\]; it takes \['pool_size'\]",
        ),
        ("sepconv(act='gelu')", r"\['act'\] follow from the frame.*MODEL.METAFORMER.ACT"),
        # Values of another type.
        ("dynamic_filter(num_filters='x')", "num_filters='x' must be a whole number$"),
        ("dynamic_filter(num_filters=True)", "num_filters=True must be a whole number$"),
        ("dynamic_filter(num_filters=2.0)", "num_filters=2.0 must be a whole number$"),
        ("sepconv(expansion=[2])", r"expansion=\[2\] must be a number$"),
        ("attention(qkv_bias=1)", "qkv_bias=1 must be True or False$"),
        ("attention(grained=None)", "grained=None must be True or False$"),
        ("attention(splits=2)", "splits=2 must be a list of whole numbers$"),
        ("dilated(dilation=[1.5])", r"dilation=\[1.5\] must be a list of whole numbers, or None$"),
        ("dilated(dilation='12')", "dilation='12' must be a list of whole numbers, or None$"),
        ("spatial_reduction(reduction=2.5)", "reduction=2.5 must be a whole number, or None$"),
        # Values out of range.
        ("afno(num_blocks=7)", "num_blocks=7 must be a positive divisor of the width 16"),
        ("afno(num_blocks=0)", "num_blocks=0 must be a positive divisor"),
        ("afno(shrink=-0.1)", "shrink=-0.1 must be 0 or more"),
        ("afno(expansion=0.1)", "expansion=0.1 of 8 channels leaves none"),
        ("sepconv(expansion=0)", "expansion=0 of 8 channels leaves none"),
        ("sepconv(kernel_size=4)", "kernel_size=4 must be positive and odd"),
        ("sepconv(kernel_size=-1)", "kernel_size=-1 must be positive and odd"),
        ("pooling(pool_size=4)", "pool_size=4 must be positive and odd"),
        ("dynamic_filter(num_filters=0)", "num_filters=0 must be at least 1"),
        ("dynamic_filter(reweight_ratio=0.1)", "reweight_ratio=0.1 of 8 channels leaves none"),
        ("point_sampled(num_points=0)", "num_points=0 must be at least 1"),
        ("window(shift=9)", "shift=9 must be at least 0 and less than window_size=7"),
        ("window(shift=-1)", "shift=-1 must be at least 0 and less than window_size=7"),
        ("window(window_size=0)", "window_size=0 must be at least 1"),
        ("dilated(kernel_size=2)", "kernel_size=2 must be odd"),
        ("dilated(dilation=[0])", r"dilation=\[0\] must be positive"),
        ("dilated(num_heads=4, dilation=[1, 2, 3])", r"num_heads=4 heads .* a multiple of 3:"),
        ("spatial_reduction(reduction=0)", "reduction=0 must be at least 1"),
        ("attention(attn_drop=1)", r"attn_drop=1 must be in \[0, 1\)"),
        *(
            (
                f"{name}(num_heads={heads})",
                f"num_heads={heads} must be a positive divisor of the 8 ch",
            )
            for name in (
                "attention",
                "head_token",
                "spatial_reduction",
                "point_sampled",
                "dilated",
                "window",
            )
            for heads in (0, 3)
        ),
        # Queries other than all tokens.
        *(
            (spec, message)
            for name in ("attention", "head_token", "spatial_reduction")
            for spec, message in (
                (f"{name}(keep_rate=0)", r"keep_rate=0 must be in \(0, 1\]"),
                (f"{name}(keep_rate=1.5)", r"keep_rate=1.5 must be in \(0, 1\]"),
                (f"{name}(keep_rate=0.5, grained=True)", "grained=True excludes keep_rate=0.5"),
                (f"{name}(splits=[2, 1])", r"splits=\[2, 1\].* add grained=True"),
                (f"{name}(budget=0.3)", "budget=0.3.* add grained=True"),
                (f"{name}(grained=True, budget=2)", r"budget=2 must be in \[0, 1\]"),
                (f"{name}(grained=True, budget_weight=-1)", "budget_weight=-1 must be 0 or more"),
                (f"{name}(grained=True, splits=[4, 3])", r"SPLITS=\[4, 3\] .* divide the largest"),
                (f"{name}(grained=True, splits=[])", r"SPLITS=\[\] must be positive"),
            )
        ),
        ("attention(grained=True, attn_drop=0.1)", "grained=True excludes attn_drop=0.1"),
    ],
)
def test_a_wrong_option_is_explained(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        build_mixer(spec, 8, CONTEXT)
    assert str(error.value).startswith(f"MODEL.METAFORMER.MIXERS: '{spec}': ")


@pytest.mark.parametrize("option", ["keep_rate=0.5", "grained=True", "splits=[2, 1]"])
@pytest.mark.parametrize(
    "name", ["dilated", "window", "shifted_window", "point_sampled", "pooling", "dynamic_filter"]
)
def test_local_mixers_refuse_other_queries_and_say_which_take_them(name, option):
    takers = r"\['attention', 'global', 'head_token', 'spatial_reduction'\]"
    with pytest.raises(
        ValueError, match=f"needs global keys for each query.*'{name}' has none.*{takers}"
    ):
        build_mixer(f"{name}({option})", 8, CONTEXT)


def test_heads_that_follow_from_the_frame_are_explained_by_its_key():
    with pytest.raises(ValueError, match=r"num_heads=2 must be .* 9 channels.*HEAD_DIM"):
        frame(["attention"] * 4, embed_dims=(8, 9, 8, 8))
    with pytest.raises(
        ValueError, match=r"num_heads=3 must be a positive divisor of the 8 channels$"
    ):
        build_mixer("attention(num_heads=3)", 8, CONTEXT)


def test_options_without_plain_types_are_left_to_the_mixer(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))

    @register_mixer("loose")
    def loose(dim, *, what, table: dict | None = None, name: str = "a"):
        module = nn.Identity()
        module.given = (what, table, name)
        return module

    assert build_mixer("loose(what=1.5, table={1: 2})", 8, CONTEXT).given == (1.5, {1: 2}, "a")
    with pytest.raises(ValueError, match="name=3 must be a word in quotes"):
        build_mixer("loose(what=1, name=3)", 8, CONTEXT)


def test_annotations_of_every_kind_are_checked_or_left(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))

    @register_mixer("many")
    class Many(nn.Identity):
        def __init__(
            self,
            dim,
            *,
            pair: tuple[int, str] = (1, "a"),
            grids: Sequence[Sequence[int]] = (),
            bare: typing.List = (),  # noqa: UP006, as users write it
            mode: typing.Literal["max", "mean"] = "max",
            numbers: tuple[float, ...] | None = None,
        ):
            super().__init__()

    build_mixer("many(pair=[2, 'b'], grids=[[1], [2]], bare=[1, 'x'], numbers=[1])", 8, CONTEXT)
    for option, message in {
        "pair=[2, 3]": "a list of 2: a whole number, a word in quotes$",
        "pair=[2]": "a list of 2:",
        "grids=[1]": "a list of lists of whole numbers$",
        "bare=3": "a list$",
        "mode='min'": r"one of \['max', 'mean'\]$",
        "numbers=['x']": "a list of numbers, or None$",
    }.items():
        with pytest.raises(ValueError, match="must be " + message):
            build_mixer(f"many({option})", 8, CONTEXT)


def test_mixers_may_be_partial_functions_derived_classes_or_annotated_for_checkers(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))

    @register_mixer("base")
    class Base(nn.Identity):
        def __init__(self, dim, *, size: int = 3, num_heads: int = 1):
            super().__init__()
            self.given = (size, num_heads)

    @register_mixer("derived")
    class Derived(Base):
        def __init__(self, dim, *, more: bool = False, **keywords):
            super().__init__(dim, **keywords)
            self.more = more

    def annotated(dim, *, size: "OnlyForCheckers" = 3):  # noqa: F821
        return Base(dim, size=size)

    register_mixer("annotated")(annotated)
    register_mixer("five")(partial(Base, size=5))
    heads = CONTEXT.num_heads
    assert build_mixer("derived(size=4, more=True)", 8, CONTEXT).given == (4, heads)
    with pytest.raises(ValueError, match="size='x' must be a whole number"):
        build_mixer("derived(size='x')", 8, CONTEXT)
    with pytest.raises(ValueError, match=r"no option \['other'\]; it takes \['more', 'num_heads'"):
        build_mixer("derived(other=1)", 8, CONTEXT)
    assert build_mixer("five", 8, CONTEXT).given == (5, heads)
    assert build_mixer("five(num_heads=2)", 8, CONTEXT).given == (5, 2)
    assert build_mixer("annotated(size=7)", 8, CONTEXT).given == (7, 1)


def test_a_name_is_registered_once():
    class Other(nn.Module):
        pass

    with pytest.raises(ValueError, match="registered twice"):
        register_mixer("pooling")(Other)
    with pytest.raises(ValueError, match="no identifier"):
        register_mixer("my mixer")(Other)


# -- in the frame ----------------------------------------------------------------------------------


def frame(mixers, **keywords):
    """Four stages on 32x32 pixels: maps of 8x8, 4x4, 2x2 and 1x1 tokens."""
    options = dict(
        mixers=mixers,
        depths=(1, 1, 1, 1),
        embed_dims=(8, 8, 16, 16),
        head_dim=4,
        in_chans=1,
        num_classes=10,
        img_size=32,
    )
    return MetaFormer(**(options | keywords))


@cache
def digits():
    """32 handwritten digits (32, 1, 32, 32) and their labels."""
    data = load_digits()
    images = torch.from_numpy(data.images[:32]).float()[:, None] / 16 - 0.3
    return F.interpolate(images, scale_factor=4), torch.from_numpy(data.target[:32])


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("spec", [*list_mixers(), *QUERY_MIXERS])
def test_two_steps_on_digits_lower_the_loss_with_each_mixer_in_each_stage(spec, position):
    mixers = ["pooling"] * 4
    mixers[position] = spec
    model = frame(mixers).train()
    images, labels = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + sum(model.aux_losses().values())).backward()
        optimizer.step()
        assert not [
            name
            for name, p in model.named_parameters()
            if p.grad is None or not p.grad.isfinite().all()
        ]
    assert losses[2] < losses[0], losses
    assert all(p.isfinite().all() for p in model.parameters())


def block(spec, dim=8, heads=2):
    """One block of the frame with visible weights."""
    mixer = build_mixer(spec, dim, MixerContext(num_heads=heads, grid=GRID))
    result = MetaFormerBlock(dim, mixer, Mlp(dim, bias=False), nn.LayerNorm, res_scale=0.8)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return result.double()


def finest(model):
    """The same, with routers that always choose their first granularity."""
    for module in model.modules():
        if hasattr(module, "router"):
            nn.init.zeros_(module.router.gate.weight)
            module.router.gate.bias.data.copy_(torch.tensor([9.0, 0.0, 0.0]))
    return model


def most_attended(mixer, tokens, size, number):
    """Mask (N,) of the tokens of one image (N, C) whose keys its mean query of two heads pays most."""
    dim, columns = tokens.shape[1], size[1]
    mean = tokens.mean(0)
    key_of_token = range(len(tokens))
    if isinstance(mixer, SpatialReductionAttention):
        step = mixer.reduction
        query = mixer.q(mean)
        keys = mixer.keys_values(tokens[None], size)[0].transpose(1, 2).flatten(2)[0]
        across = math.ceil(columns / step)
        key_of_token = [t // columns // step * across + t % columns // step for t in key_of_token]
    else:
        if isinstance(mixer, HIAttention):
            tokens = torch.cat([tokens, mixer._head_tokens(mean[None, None])[0]])
        query, keys = mixer.qkv(mean)[:dim], mixer.qkv(tokens)[:, dim : 2 * dim]
    paid = torch.zeros(len(keys), dtype=tokens.dtype)
    for head in (slice(0, dim // 2), slice(dim // 2, dim)):
        paid += (keys[:, head] @ query[head] / (dim // 2) ** 0.5).softmax(0)
    scores = [paid[key].item() for key in key_of_token]
    best = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:number]
    return torch.tensor([token in best for token in range(len(scores))])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("plain", "kept"), KEPT_OF.items())
def test_kept_tokens_run_the_block_and_the_others_keep_their_value(plain, kept, training):
    plain, kept = block(plain).train(training), block(kept).train(training)
    kept.load_state_dict(plain.state_dict(), strict=True)  # no parameter of its own
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    tokens = plain.norm1(x).flatten(1, 2)
    mask = torch.stack([most_attended(plain.token_mixer, t, (6, 5), 18) for t in tokens])
    mask = mask.unflatten(1, (6, 5))[..., None]
    torch.testing.assert_close(kept(x), torch.where(mask, plain(x), x))
    if not training:
        assert torch.equal(kept.token_mixer.token_map(), mask[..., 0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("plain", "kept"), KEPT_OF.items())
def test_a_keep_rate_of_one_is_the_plain_attention_with_its_gradients(plain, kept, training):
    plain, kept = block(plain).train(training), block(kept).train(training)
    kept.load_state_dict(plain.state_dict(), strict=True)
    kept.token_mixer.set_keep_rate(1.0)
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    results = []
    for model in (plain, kept):
        out = model(x)
        inputs = [x, *model.parameters()]
        results.append([out, *torch.autograd.grad(out, inputs, direction)])
    torch.testing.assert_close(results[1], results[0])


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT_OF.values())
def test_of_tokens_with_one_score_the_first_run_the_block(kept):
    model = block(kept).eval()
    model(torch.randn(2, 1, 1, 8, dtype=torch.float64).expand(-1, 6, 4, -1))
    chosen = model.token_mixer.token_map().flatten(1)
    assert chosen.tolist() == [[True] * 15 + [False] * 9] * 2


def test_kept_tokens_save_the_work_of_the_others():
    tokens, dim, kept = 64, 32, 39  # ceil(0.6 * 64)
    model = block(KEPT, dim, heads=4).float()
    root = count(model, torch.zeros(1, 8, 8, dim)).modules[0]
    keys_values = tokens * 2 * dim**2
    scoring = dim**2 + tokens * dim
    attention = kept * (2 * dim**2 + 2 * tokens * dim)
    assert root.macs == keys_values + scoring + attention + kept * 8 * dim**2
    plain = count(block("attention", dim, heads=4).float(), torch.zeros(1, 8, 8, dim)).modules[0]
    assert root.macs < 0.75 * plain.macs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("plain", "grained"), GRAINED_OF.items())
def test_grained_queries_at_the_finest_grain_are_the_plain_attention(plain, grained, training):
    plain, grained = block(plain), block(grained)
    own = {n: t for n, t in grained.state_dict().items() if ".dge." in n}
    grained.load_state_dict(plain.state_dict() | own, strict=True)
    finest(grained).train(training)
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(grained(x), plain(x))


def test_a_coarse_query_changes_all_of_its_tokens_alike():
    model = block(GRAINED).eval()
    nn.init.zeros_(model.token_mixer.dge.router.gate.weight)
    model.token_mixer.dge.router.gate.bias.data.copy_(torch.tensor([0.0, 0.0, 9.0]))
    x = torch.randn(1, 8, 4, 8, dtype=torch.float64)
    change = (model(x) - x).unflatten(1, (2, 4))  # B regions 4 4 C
    torch.testing.assert_close(change, change.mean((2, 3), keepdim=True).expand_as(change))
    assert not torch.allclose(change[:, 0], change[:, 1])
    assert model.token_mixer.token_map().tolist() == [[[2], [2]]]


@pytest.mark.parametrize("spec", GRAINED_OF.values())
def test_training_without_noise_gives_what_evaluation_gives(spec, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, *_, **__: self.fill_(1.0))
    model = block(spec)
    model.token_mixer.dge.router.gate.weight.data.mul_(10)
    x = torch.randn(3, 9, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    chosen = model.token_mixer.token_map()
    assert chosen.shape == (3, 3, 2)
    assert len(chosen.unique()) > 1


def test_the_budget_is_on_queries_per_token():
    model = finest(frame([GRAINED, "attention(grained=True, budget=0.25)", "pooling", "pooling"]))
    images, _ = digits()
    model.train()(images)
    losses = model.aux_losses()
    assert losses.keys() == {"grain_budget"}
    assert losses["grain_budget"].item() == pytest.approx((0.5**2 + 0.75**2) / 2, rel=1e-2)
    losses["grain_budget"].backward()
    router = model.stages[1][0].token_mixer.dge.router.gate
    assert router.weight.grad.isfinite().all()
    assert router.bias.grad.norm() > 0
    model.eval()(images)
    assert model.aux_losses() == {}
    assert frame([KEPT] * 4).aux_losses() == {}


def test_routers_start_with_the_finest_grain_in_spite_of_the_frames_start():
    model = frame([GRAINED, "pooling", "pooling", "pooling"])
    probability = model.stages[0][0].token_mixer.dge.router.gate.bias.softmax(0)
    assert probability[0].item() == pytest.approx(0.95)


@pytest.mark.parametrize("spec", QUERY_MIXERS)
def test_a_frame_with_query_mixers_keeps_the_contract(spec):
    model = frame([spec] * 4, drop_path_rate=0.1, drop_rate=0.1)
    images = torch.randn(3, 1, 44, 61)
    (model.train()(images).square().mean() + sum(model.aux_losses().values())).backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lost
    assert copy.deepcopy(model).aux_losses() == {}, "a copy has had no forward pass"
    assert model.token_maps() == {}, "only evaluation is drawn"
    pickle.loads(pickle.dumps(model))
    model.eval()
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(model(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(images).float() - logits).norm() < 0.05 * logits.norm()
        maps = [tuple(m.shape) for m in model.forward_pyramid(images)]
    assert maps == [(3, 8, 11, 16), (3, 8, 6, 8), (3, 16, 3, 4), (3, 16, 2, 2)]
    assert len(model.token_maps()) == 4
    assert not model.drops_tokens


@pytest.mark.parametrize("spec", QUERY_MIXERS)
def test_under_autocast_every_parameter_gets_the_gradient_of_float32(spec):
    """What chooses the tokens, without gradients, must leave no casts behind for those that need them."""
    model, (images, _) = frame([spec, "pooling", "pooling", "pooling"]).train(), digits()
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images).square().mean() + sum(model.aux_losses().values())
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() < 0.1 * grad.norm() + 1e-4, name


@pytest.mark.parametrize("spec", QUERY_MIXERS)
def test_recomputed_activations_give_the_same_gradients(spec):
    model, (images, _) = frame([spec] * 4), digits()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        (model.train()(images).square().mean() + sum(model.aux_losses().values())).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(results[0], results[1])


@torch.no_grad()
@pytest.mark.parametrize("plain", KEPT_OF)
def test_the_keep_rate_of_a_frame_is_set_without_rebuilding(plain):
    kept = KEPT_OF[plain]
    model, images = frame([kept, kept.replace("0.6", "0.3"), plain, "pooling"]).eval(), digits()[0]
    built = model(images)
    other = frame([kept.replace("0.6", "0.4"), kept.replace("0.6", "0.4"), plain, "pooling"]).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    every = frame([plain, plain, plain, "pooling"]).eval()
    every.load_state_dict(model.state_dict(), strict=True)
    model.set_keep_rate(0.4)
    torch.testing.assert_close(model(images), other(images))
    model.set_progress(1000, 1000, 0)
    torch.testing.assert_close(model(images), other(images))
    model.set_keep_rate(1.0)
    torch.testing.assert_close(model(images), every(images))
    assert not torch.allclose(other(images), every(images), rtol=1e-3)
    model.set_keep_rate()
    torch.testing.assert_close(model(images), built)
    assert [
        m.sum((-2, -1)).unique().tolist()
        for m in model.token_maps().values()
        if m.dtype == torch.bool
    ] == [
        [math.ceil(0.6 * 64)],
        [math.ceil(0.3 * 16)],
    ]


def test_a_keep_rate_that_cannot_be_set_is_explained():
    model = frame([KEPT, "attention", "pooling", "pooling"])
    for rate in (0, 0.0, 1.1, -0.5):
        with pytest.raises(ValueError, match=rf"keep_rate={rate} must be in \(0, 1\]"):
            model.set_keep_rate(rate)
    assert model.stages[0][0].token_mixer.keep_rate == 0.6
    for rate in (0.5, None):
        with pytest.raises(
            ValueError, match=r"no stage of this model keeps a share.*keep_rate=0\.7"
        ):
            frame(["attention"] * 4).set_keep_rate(rate)


@pytest.mark.parametrize("feed_forward", ["mlp", "daff"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_activation_is_that_of_act_in_feed_forward_and_mixer(act, feed_forward):
    model = frame(["sepconv", "afno", "pooling", "pooling"], act=act, feed_forward=feed_forward)
    for module in model.modules():
        if isinstance(module, StarReLU):
            nn.init.constant_(module.scale, 0.8944)
            nn.init.constant_(module.bias, -0.4472)
    formula = ACTIVATION_FORMULAS[act]
    model.double().eval()
    for stage in model.stages[:2]:
        x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
        mixer, mlp = stage[0].token_mixer, stage[0].mlp
        y = torch.randn(2, 4, 3, 16, dtype=torch.float64)
        torch.testing.assert_close(mixer.act1(y), formula(y))
        if feed_forward == "mlp":
            expected = formula(x @ mlp.fc1.weight.t()) @ mlp.fc2.weight.t()
        else:
            z = formula(mlp.bn1(mlp.conv1(x.permute(0, 3, 1, 2))))
            z = z + formula(mlp.bn2(mlp.conv2(z)))
            expected = mlp.bn3(mlp.conv3(z)).permute(0, 2, 3, 1)
        torch.testing.assert_close(mlp(x), expected)


def test_query_mixers_refuse_a_convolution_behind_them():
    with pytest.raises(ValueError, match=r"FEED_FORWARD='daff' has a convolution.*keep_rate=0.6"):
        frame([KEPT] * 4, feed_forward="daff")


def test_global_is_another_name_for_attention():
    state = build_mixer("global(qkv_bias=True)", 8, CONTEXT).state_dict()
    build_mixer("attention(qkv_bias=True)", 8, CONTEXT).load_state_dict(state, strict=True)


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "lab").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_experiment_of_the_lab_runs(path):
    config = load_config(path)
    model = build_model(config, num_classes=10)
    if config.TASK != "classification":
        assert len(model.eval()(torch.rand(1, 3, 64, 96))) == 1
        return
    assert model.train()(digits()[0]).shape == (32, 10)


def test_a_mixer_is_added_by_two_files(tmp_path):
    """The two files are those of docs/adding_a_mixer.md, which this keeps true."""
    skipped = shutil.ignore_patterns(".git", ".venv", "output", "tests", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=skipped)
    text = (ROOT / "docs" / "adding_a_mixer.md").read_text()
    blocks = dict(re.findall(r"## \d\. [^`]*`([^`]+)`\n\n```\w+\n(.*?)```", text, re.DOTALL))
    assert set(blocks) == {"models/mixers/shift.py", "configs/lab/shift.yaml"}
    for name, content in blocks.items():
        (tmp_path / "copy" / name).write_text(content)
    opts = "--opts TRAIN.MAX_STEPS 2 DATA.BATCH_SIZE 8"
    script = f"import main; main.main('--cfg configs/lab/shift.yaml {opts}'.split())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "copy",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "copy" / "output" / "lab_shift" / "default" / "checkpoints" / "last.pth"
    weights = torch.load(file, weights_only=True)["model"]
    assert {"stages.0.0.token_mixer.scale", "stages.1.0.token_mixer.scale"} <= weights.keys()


def test_the_documentation_lists_every_mixer():
    text = (ROOT / "docs" / "adding_a_mixer.md").read_text().split("## What there is")[1]
    for name in list_mixers():
        assert f"`{name}`" in text, name
