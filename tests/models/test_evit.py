"""EViT: what is kept, what is fused, and when. Its numbers are compared in test_golden.py."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from models import create_model, list_models
from models.evit import EViT, ReorganisingBlock, kept_patches, reorganise
from models.layers.resize import resize_position_grid
from models.vit import VisionTransformer
from tests.golden_tools import SkipInit, without_useful_gradient
from tests.reference import token_reorganisation as literal

SIZE = dict(img_size=64, num_classes=5, embed_dim=32, depth=4, num_heads=2)


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def small(**keywords) -> EViT:
    """Four blocks of width 32 on 4 x 4 patches; blocks 1 and 2 drop."""
    return randomised(EViT(**(SIZE | dict(drop_loc=(1, 2), keep_rate=0.5) | keywords)))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def sequence_lengths(model: EViT, images: torch.Tensor) -> list[int]:
    """Tokens without the class token after each block."""
    lengths = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: lengths.append(out[0].shape[1] - 1))
        for block in model.blocks
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return lengths


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("evit_")])
def test_variants_have_the_published_reorganisation(name):
    with torch.device("meta"), SkipInit():
        model = create_model(name)
    assert len(model.state_dict()) == 152
    digit = name.split("_r0")[1][0]
    rates = [1.0] * 12
    rates[3] = rates[6] = rates[9] = int(digit) / 10
    assert model.final_rates == rates
    assert model.fuse_token == name.endswith("fuse")


@pytest.mark.parametrize(
    ("keep_rate", "fuse_token", "lengths"),
    [
        (0.7, True, [196] * 3 + [139] * 3 + [99] * 3 + [71] * 3),
        (0.7, False, [196] * 3 + [138] * 3 + [97] * 3 + [68] * 3),
        (0.5, True, [196] * 3 + [99] * 3 + [51] * 3 + [27] * 3),
        (0.5, False, [196] * 3 + [98] * 3 + [49] * 3 + [25] * 3),
    ],
)
def test_token_counts_are_the_published_ones(keep_rate, fuse_token, lengths):
    model = EViT(embed_dim=16, num_heads=2, keep_rate=keep_rate, fuse_token=fuse_token).eval()
    assert sequence_lengths(model, torch.randn(1, 3, 224, 224)) == lengths


@pytest.mark.parametrize("fuse", [True, False])
def test_block_equals_the_literal_one_forward_and_backward(fuse):
    block = randomised(ReorganisingBlock(32, 4)).train()
    inputs = torch.randn(2, 21, 32)
    results = []
    for function in (block, lambda *args: literal.block(block, *args)):
        block.zero_grad()
        x = inputs.clone().requires_grad_()
        out, kept = function(x, 8, fuse)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, kept, x.grad, *[p.grad.clone() for p in block.parameters()]))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("fuse", [True, False])
def test_block_equals_the_literal_one_in_bfloat16(fuse):
    x = torch.randn(2, 21, 32, dtype=torch.bfloat16, requires_grad=True)
    scores = torch.rand(2, 20).softmax(1)
    kept = scores.topk(8, dim=1).indices
    ours = reorganise(x, scores, kept, fuse)
    theirs, _ = literal.reorganise(x.float(), scores, 8, fuse)
    torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.01)
    direction = torch.randn_like(theirs)
    (grad,) = torch.autograd.grad(ours, x, direction.bfloat16())
    (expected,) = torch.autograd.grad(theirs, x, direction)
    torch.testing.assert_close(grad, expected, rtol=0.02, atol=0.01)


def test_fused_token_is_the_weighted_sum_of_the_dropped_ones():
    x = torch.tensor([[[9.0], [1.0], [2.0], [3.0], [4.0]]])
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    kept = torch.tensor([[1, 3]])
    expected = [9.0, 2.0, 4.0, 0.1 * 1 + 0.2 * 3]  # not divided by 0.1 + 0.2
    assert reorganise(x, scores, kept, fuse=True)[0, :, 0].tolist() == pytest.approx(expected)
    assert reorganise(x, scores, kept, fuse=False)[0, :, 0].tolist() == expected[:3]


def test_fused_token_keeps_its_precision_under_autocast():
    x, scores = torch.randn(2, 101, 16), torch.rand(2, 100).softmax(1)
    kept = scores.topk(90, dim=1).indices
    expected = reorganise(x, scores, kept, fuse=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reorganise(x, scores, kept, fuse=True), expected)


def test_without_dropping_it_is_deit():
    model, images = small(keep_rate=1.0), torch.randn(2, 3, 64, 64)
    deit = VisionTransformer(**SIZE).eval()
    deit.load_state_dict(model.state_dict(), strict=True)
    close(model(images), deit(images))
    close(model.token_maps(), deit.token_maps())
    assert model.token_maps().keys() == {"attention::blocks.3.attn"}
    close(model.forward_pyramid(images)[0], deit.forward_pyramid(images)[0])


@pytest.mark.parametrize("fuse_token", [True, False])
def test_positions_follow_the_input_size(fuse_token):
    at_64 = small(fuse_token=fuse_token)
    at_80x112 = small(fuse_token=fuse_token, img_size=[80, 112])
    weights = at_64.state_dict()
    weights["pos_embed"] = resize_position_grid(weights["pos_embed"], 1, (4, 4), (5, 7))
    at_80x112.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 80, 112)
    close(at_64(images), at_80x112(images))
    padded = F.pad(images[..., :100], (0, 12))
    close(at_64(images[..., :100]), at_64(padded))


def test_a_dense_task_is_told_to_keep_all_patches():
    model, images = small(num_classes=0), torch.randn(1, 3, 64, 80)
    assert model.drops_tokens
    with pytest.raises(ValueError, match=r"KEEP_RATE=0\.5 drops tokens.*KEEP_RATE 1\.0"):
        model.forward_pyramid(images)
    model.set_keep_rate(1.0)
    assert not model.drops_tokens
    model.train()
    (feature,) = model.forward_pyramid(images)
    assert feature.shape == (1, 32, 4, 5)
    feature.square().mean().backward()
    assert not without_useful_gradient(model)


def test_keep_rate_changes_only_the_blocks_that_were_built_to_drop():
    model, images = small(fuse_token=False), torch.randn(1, 3, 64, 64)
    assert sequence_lengths(model, images) == [16, 8, 4, 4]
    model.set_keep_rate(0.75)
    assert sequence_lengths(model, images) == [16, 12, 9, 9]
    model.set_keep_rate(tokens=5)
    assert model.drops_tokens
    assert sequence_lengths(model, images) == [5, 5, 5, 5]
    model.set_keep_rate()
    assert sequence_lengths(model, images) == [16, 8, 4, 4]


def test_each_block_can_have_its_own_rate():
    model = small(keep_rate=[0.75, 0.25], fuse_token=False)
    assert sequence_lengths(model, torch.randn(1, 3, 64, 64)) == [16, 12, 3, 3]
    model.set_progress(10**6, 10**6, 0, steps_per_epoch=1)
    assert model.keep_rates == [1.0, 0.75, 0.25, 1.0]


def test_keep_rate_falls_along_a_half_cosine_per_iteration():
    model = small(keep_rate=0.6, shrink_start_epoch=2, shrink_epochs=4)
    steps_per_epoch = 10

    def rate(step: int) -> float:
        model.set_progress(step, 100, 0, steps_per_epoch)
        assert model.keep_rates[0] == 1.0
        return model.keep_rates[1]

    assert [rate(0), rate(19)] == [1.0, 1.0]
    for step in (20, 21, 30, 40, 59):
        expected = 0.6 + 0.4 * 0.5 * (1 + math.cos(math.pi * (step - 20) / 40))
        assert rate(step) == pytest.approx(expected)
    assert [rate(60), rate(99)] == [0.6, 0.6]
    assert rate(40) == pytest.approx(0.8)


def test_unknown_epochs_are_taken_to_be_300_and_no_shrinking_time_is_a_switch():
    model = small(shrink_start_epoch=10, shrink_epochs=0)
    model.set_progress(99, 3000, 0)
    assert not model.drops_tokens
    model.set_progress(100, 3000, 0)
    assert model.keep_rates == model.final_rates


def test_evaluation_uses_the_rate_that_training_has_reached():
    model, images = small(fuse_token=False), torch.randn(1, 3, 64, 64)
    model.train()
    model.set_progress(60, 1000, 0, steps_per_epoch=1)
    model.eval()
    half_way = math.ceil(0.75 * 16), math.ceil(0.75 * 12)
    assert sequence_lengths(model, images) == [16, half_way[0], half_way[1], half_way[1]]
    assert model.conditions() == {"keep_rate": pytest.approx(0.75)}
    model.set_keep_rate(tokens=5)
    assert model.conditions() == {"keep_rate": 0.5, "tokens": 5}


def test_the_smallest_keep_rate_is_logged():
    model = small(keep_rate=[0.75, 0.25])
    assert model.log_values() == {"keep_rate": 0.25}
    model.set_progress(0, 100, 0, steps_per_epoch=10)
    assert model.log_values() == {"keep_rate": 1.0}


def test_kept_indices_lead_back_to_patches_of_the_image():
    kept = [torch.tensor([[5, 0, 3]]), torch.tensor([[3, 1]]), torch.tensor([[2, 0]])]
    # After block 0 the sequence is patches 5, 0, 3 and a fused token; then the fused token, 0, fused.
    assert [p.tolist() for p in kept_patches(kept, 6, True)] == [[[5, 0, 3]], [[-1, 0]], [[-1, -1]]]
    kept = [torch.tensor([[5, 0, 3]]), torch.tensor([[2, 0]])]
    assert [p.tolist() for p in kept_patches(kept, 6, False)] == [[[5, 0, 3]], [[3, 5]]]


@pytest.mark.parametrize("fuse_token", [True, False])
def test_token_maps_mark_the_kept_patches(fuse_token):
    model, images = small(fuse_token=fuse_token), torch.randn(2, 3, 64, 96)
    model(images)
    maps = model.token_maps()
    assert maps["kept_idx_0"].shape == (2, 12)
    first, second = maps["kept_mask_0"], maps["kept_mask_1"]
    assert first.shape == second.shape == (2, 4, 6)
    assert first.sum((1, 2)).tolist() == [12, 12]
    for image in range(2):
        assert set(maps["kept_idx_0"][image].tolist()) == set(
            first[image].flatten().nonzero()[:, 0].tolist()
        )
    assert not (second & ~first).any()
    if not fuse_token:
        assert second.sum((1, 2)).tolist() == [6, 6]
    assert model.train().token_maps() == {}


def test_model_can_be_copied_after_a_forward():
    model, images = small(), torch.randn(1, 3, 64, 64)
    logits = model(images)
    close(copy.deepcopy(model)(images), logits)


def test_whole_model_is_one_graph_of_static_shapes():
    model, images = small(depth=2, drop_loc=(1,)), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        close(compiled(images), model(images))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(keep_rate=0.0), r"KEEP_RATE=0\.0 must be in \(0, 1\]"),
        (dict(keep_rate=[0.5, 1.2]), r"KEEP_RATE=\[0\.5, 1\.2\] must be in"),
        (dict(keep_rate=[0.5]), r"one per block of MODEL\.EVIT\.DROP_LOC=\[1, 2\]"),
        (dict(drop_loc=(1, 4)), r"DROP_LOC=\[1, 4\] must be different blocks of 0\.\.3"),
        (dict(drop_loc=(1, 1)), r"DROP_LOC=\[1, 1\]"),
    ],
)
def test_impossible_settings_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        small(**keywords)


@pytest.mark.parametrize("keywords", [dict(keep_rate=0.0), dict(keep_rate=1.5), dict(tokens=0)])
def test_impossible_rates_are_refused_at_run_time(keywords):
    with pytest.raises(ValueError, match=r"must be"):
        small().set_keep_rate(**keywords)


def test_a_model_built_to_keep_all_patches_can_drop_them_later():
    model = create_model("evit_tiny_r07_fuse", depth=2, embed_dim=48, drop_loc=[1], keep_rate=1.0)
    assert not model.drops_tokens
    model.set_keep_rate(0.5)
    assert model.keep_rates == [1.0, 0.5]
    assert model.drops_tokens
    model.set_keep_rate()
    assert not model.drops_tokens
