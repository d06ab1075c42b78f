"""Every mixer keeps the interface; each equals its formula written out."""

import copy
import pickle
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from config import load_config
from models import CONFIG_DIR, build_model
from models.layers.activations import StarReLU
from models.layers.mlp import Mlp
from models.metaformer import MetaFormer, MetaFormerBlock
from models.mixers import MixerContext, build_mixer, list_mixers, register_mixer
from models.mixers.registry import parse_spec
from tests.reference.afno import afno
from tests.reference.fourier_filter import dynamic_filter, global_filter, star_relu
from utils.complexity import count

GRID = (6, 5)
CONTEXT = MixerContext(num_heads=2, grid=GRID, act=StarReLU)


def sepconv(state, x):
    y = star_relu(x @ state["pwconv1.weight"].t(), state, "act1.")
    kernel = state["dwconv.weight"]
    out = torch.zeros_like(y)
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            for row in range(max(0, -dy), min(y.shape[1], y.shape[1] - dy)):
                for col in range(max(0, -dx), min(y.shape[2], y.shape[2] - dx)):
                    out[:, row, col] += y[:, row + dy, col + dx] * kernel[:, 0, dy + 3, dx + 3]
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

# The options that run the whole block for a part of the tokens.
KEPT, GRAINED = "attention(keep_rate=0.6)", "attention(grained=True)"
REDUCED = "spatial_reduction(grained=True, reduction=2)"
QUERY_MIXERS = [KEPT, GRAINED, REDUCED]

FORMULAS = dict(
    afno=afno,
    attention=attention,
    dynamic_filter=dynamic_filter,
    global_filter=global_filter,
    identity=lambda state, x: x,
    pooling=pooling,
    random=lambda state, x: (state["random_matrix"] @ x.flatten(1, 2)).reshape(x.shape),
    sepconv=sepconv,
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
        ("attention(keep_rate=0)", r"keep_rate=0 must be in \(0, 1\]"),
        ("attention(keep_rate=0.5, grained=True)", "grained=True excludes keep_rate"),
        ("attention(splits=[2, 1])", "add grained=True"),
        ("spatial_reduction(budget=0.3)", "add grained=True"),
        ("spatial_reduction(keep_rate=0.3)", "no option"),
        ("attention(grained=True, budget=2)", "budget=2 must be in"),
        ("attention(grained=True, splits=[4, 3])", "must divide the largest"),
        ("dynamic_filtre", r"did you mean one of \['dynamic_filter'"),
        ("dynamic_filter(filters=2)", r"no option \['filters'\]; it takes .*'num_filters'"),
        ("dynamic_filter(2)", "write 'name' or 'name\\(option=value"),
        ("dynamic_filter(num_filters=max(1, 2))", "with literal values"),
        ("3 + 4", "cannot read"),
        ("pooling(", "cannot read"),
        ("afno(num_blocks=7)", "not a multiple of num_blocks 7"),
        ("sepconv(kernel_size=4)", "kernel_size must be odd"),
        ("pooling(pool_size=4)", "pool_size must be odd"),
        ("attention(num_heads=3)", "not a multiple of num_heads 3"),
    ],
)
def test_a_wrong_spec_is_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(spec, 8, CONTEXT)


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


@pytest.mark.parametrize("training", [False, True])
def test_kept_tokens_run_the_block_and_the_others_keep_their_value(training):
    plain, kept = block("attention").train(training), block(KEPT).train(training)
    kept.load_state_dict(plain.state_dict(), strict=True)  # no parameter of its own
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    tokens = plain.norm1(x).flatten(1, 2)
    weight = plain.token_mixer.qkv.weight
    query, keys = tokens.mean(1) @ weight[:8].t(), tokens @ weight[8:16].t()
    scores = torch.zeros(2, 30, dtype=torch.float64)
    for head in (slice(0, 4), slice(4, 8)):
        logits = torch.stack([keys[i, :, head] @ query[i, head] for i in range(2)]) / 2
        scores += logits.softmax(-1) / 2
    mask = torch.stack([row >= row.sort(descending=True).values[17] for row in scores])
    mask = mask.unflatten(1, (6, 5))[..., None]
    torch.testing.assert_close(kept(x), torch.where(mask, plain(x), x))
    if not training:
        assert torch.equal(kept.token_mixer.token_map(), mask[..., 0])


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
@pytest.mark.parametrize(
    ("plain", "grained"),
    [("attention", GRAINED), ("spatial_reduction(reduction=2)", REDUCED)],
)
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


@pytest.mark.parametrize("spec", [GRAINED, REDUCED])
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


def test_query_mixers_refuse_a_convolution_behind_them():
    with pytest.raises(ValueError, match=r"FEED_FORWARD='daff' has a convolution.*keep_rate=0.6"):
        frame([KEPT] * 4, feed_forward="daff")


def test_global_is_another_name_for_attention():
    state = build_mixer("global(qkv_bias=True)", 8, CONTEXT).state_dict()
    build_mixer("attention(qkv_bias=True)", 8, CONTEXT).load_state_dict(state, strict=True)


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "lab").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_experiment_of_the_lab_runs(path):
    model = build_model(load_config(path), num_classes=10)
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
