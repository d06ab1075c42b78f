"""DilateFormer: dilated attention against a loop over pixels; stems, mergings and sizes."""

import pytest
import torch

from models.dilateformer import DilateFormer
from models.layers.dilated import DilatedAttention, dilated_attention
from tests.golden_tools import without_useful_gradient
from tests.reference import dilated_attention as literal
from tests.reference.attention import inputs_of, packed_probabilities


def small(**keywords) -> DilateFormer:
    defaults = dict(num_classes=5, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(3, 3, 6, 6))
    return DilateFormer(**(defaults | keywords)).eval()


def test_projections_have_the_published_shapes():
    weights = small().state_dict()
    assert weights["stages.0.blocks.0.attn.qkv.weight"].shape == (72, 24, 1, 1)
    assert weights["stages.1.blocks.0.attn.qkv.weight"].shape == (144, 48, 1, 1)
    assert weights["stages.2.blocks.0.attn.qkv.weight"].shape == (288, 96)


@pytest.mark.parametrize(
    ("heads", "kernel", "dilation", "size"),
    [
        (3, 3, (1, 2, 3), (5, 5)),
        (6, 3, (1, 2, 3), (4, 7)),
        (2, 5, (2,), (6, 5)),
        (2, 1, (1, 1), (3, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dilated_attention_equals_the_loop_forward_and_backward(
    heads, kernel, dilation, size, dtype
):
    qkv = torch.randn(2, 3 * heads * 4, *size).to(dtype).requires_grad_()
    out = dilated_attention(qkv, heads, kernel, dilation, 0.7)
    expected = literal.dilated_attention(qkv.float(), heads, kernel, dilation, 0.7)
    assert out.dtype == dtype
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
    torch.testing.assert_close(out.float(), expected, **tolerance)
    with torch.no_grad():
        assert torch.equal(dilated_attention(qkv, heads, kernel, dilation, 0.7), out)

    direction = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(out, qkv, direction.to(dtype))
    (expected_grad,) = torch.autograd.grad(expected, qkv, direction)
    torch.testing.assert_close(grad.float(), expected_grad.float(), **tolerance)


def test_dilated_attention_has_the_right_derivative_in_double_precision():
    qkv = torch.randn(1, 12, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dilated_attention(x, 2, 3, (1, 2), 0.5), qkv)


def test_neighbours_outside_the_image_take_their_share_of_the_softmax():
    qkv = torch.zeros(1, 3, 5, 5)  # equal logits: each of 9 neighbours weighs 1/9
    value = torch.arange(25.0).reshape(5, 5)
    qkv[0, 2] = value
    out = dilated_attention(qkv, 1, 3, (3,), 1.0)[0, 0]
    inside = value[0, 0] + value[0, 3] + value[3, 0] + value[3, 3]
    assert out[0, 0].item() == pytest.approx(inside.item() / 9)
    # A key outside is zero, whatever the bias of the projection: its logit is 0, not q * bias.
    qkv[0, 0], qkv[0, 1] = 1.0, 2.0
    weight = torch.tensor(2.0).exp()
    out = dilated_attention(qkv, 1, 3, (3,), 1.0)[0, 0]
    assert out[0, 0].item() == pytest.approx((inside * weight / (4 * weight + 5)).item())


def test_training_keeps_projections_and_probabilities_only():
    qkv = torch.randn(1, 36, 6, 7, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dilated_attention(qkv, 3, 3, (1, 2, 3), 0.5)
    assert sum(t.numel() for t in saved) == 42 * (36 + 3 * 9)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_module_equals_projections_around_the_loop(qkv_bias):
    module = DilatedAttention(24, 6, qkv_bias=qkv_bias)
    x = torch.randn(2, 5, 6, 24, requires_grad=True)
    qkv = module.qkv(x.permute(0, 3, 1, 2))
    expected = module.proj(literal.dilated_attention(qkv, 6, 3, (1, 2, 3), 0.5).permute(0, 2, 3, 1))
    out = module(x)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    inputs = [x, *module.parameters()]
    direction = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_module_works_under_autocast():
    module, x = DilatedAttention(24, 3), torch.randn(2, 6, 5, 24, requires_grad=True)
    expected = module(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().square().sum(), x)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02)
    torch.testing.assert_close(grad, expected_grad, rtol=0.1, atol=0.02)


def test_image_size_changes_no_parameter():
    shapes = [
        {n: t.shape for n, t in small(img_size=size).state_dict().items()}
        for size in (224, [64, 96])
    ]
    assert shapes[0] == shapes[1]


def test_maps_stay_channels_last():
    for feature in small().forward_pyramid(torch.randn(2, 3, 64, 96)):
        assert feature.is_contiguous(memory_format=torch.channels_last)


def test_dense_tasks_leave_no_parameter_without_gradient():
    model = small(num_classes=0).train()
    maps = model.forward_pyramid(torch.randn(2, 3, 64, 96))
    sum(m.square().mean() for m in maps).backward()
    assert not without_useful_gradient(model)


def test_last_map_is_what_the_classifier_sees():
    model, images = small(), torch.randn(2, 3, 64, 96)
    features = model.forward_pyramid(images)[-1].mean((2, 3))
    torch.testing.assert_close(model.head(features), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "patch_way", ["overlapping", "nonoverlapping", "pointconv", "overlaping", "nonoverlaping"]
)
def test_every_stem_reduces_to_a_quarter(patch_way):
    model = small(patch_way=patch_way)
    assert model.forward_pyramid(torch.randn(1, 3, 50, 70))[0].shape == (1, 24, 13, 18)
    names = {n for n, _ in model.patch_embed.named_parameters() if "weight" in n}
    if patch_way.startswith("non"):
        assert names == {"proj.weight"}
        assert model.patch_embed.proj.bias is not None
    else:
        assert names == {f"proj.{i}.weight" for i in (0, 1, 3, 4, 6, 7, 9)}
        kernels = [model.patch_embed.proj[i].kernel_size[0] for i in (0, 3, 6, 9)]
        assert kernels == ([3, 1, 3, 1] if patch_way == "pointconv" else [3, 3, 3, 3])
        assert all(model.patch_embed.proj[i].bias is None for i in (0, 3, 6, 9))


@pytest.mark.parametrize(("merging_way", "kernel"), [("conv3_2", 3), ("conv2_2", 2)])
def test_every_merging_halves_the_map(merging_way, kernel):
    model = small(merging_way=merging_way)
    assert model.stages[0].downsample.proj[0].weight.shape == (48, 24, kernel, kernel)
    assert [m.shape[2:] for m in model.forward_pyramid(torch.randn(1, 3, 52, 70))] == [
        (13, 18),
        (7, 9),
        (4, 5),
        (2, 3),
    ]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(kernel_size=4), r"kernel_size=4 must be odd.*take 5"),
        (dict(dilation=(1, 2)), r"num_heads=3 heads for dilation=\[1, 2\].*multiple of 2"),
        (dict(dilation=(0, 1, 2)), r"dilation=\[0, 1, 2\] must be positive"),
        (dict(merging_way="avgpool3_2"), r"MERGING_WAY='avgpool3_2' must be one of"),
        (dict(patch_way="conv"), r"PATCH_WAY='conv' must be one of"),
        (dict(depths=(1, 1, 1)), r"four entries"),
    ],
)
def test_impossible_settings_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        small(**keywords)


def test_fresh_weights_have_the_published_spread():
    model = DilateFormer(depths=(1, 1, 1, 1))
    block = model.stages[0].blocks[0]
    # The dilated projections are convolutions and keep PyTorch's default, the others do not.
    assert block.attn.qkv.weight.std().item() == pytest.approx((3 * 72) ** -0.5, rel=0.05)
    assert block.attn.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stages[2].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.no_weight_decay() == set()


def test_depths_count_blocks_and_mergings_join_the_next_one():
    model = small(depths=(1, 2, 1, 1))
    assert model.layer_id("patch_embed.proj.0.weight") == 0
    assert model.layer_id("stages.0.blocks.0.norm1.weight") == 1
    assert model.layer_id("stages.0.downsample.proj.0.weight") == 2
    assert model.layer_id("stages.1.blocks.0.mlp.fc1.weight") == 2
    assert model.layer_id("stages.1.blocks.1.mlp.fc1.weight") == 3
    assert (
        model.layer_id("head.bias") == model.layer_id("norm.weight") == model.num_layers() - 1 == 6
    )


def test_dilated_attention_is_one_graph_forward_and_backward():
    module, x = DilatedAttention(8, 2, dilation=(2,)), torch.randn(1, 4, 5, 8)
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
    grads = []
    for function in (module, compiled):
        out = function(x)
        grads.append(torch.autograd.grad(out.square().sum(), list(module.parameters())))
    for plain, traced in zip(*grads, strict=True):
        torch.testing.assert_close(plain, traced, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_token_maps_hold_neighbours_of_local_and_means_of_global_attention():
    model = small(dilation=(1, 3), num_heads=(2, 2, 6, 6))
    images = torch.randn(2, 3, 21, 30)
    layers = [stage.blocks[-1].attn for stage in model.stages]
    inputs = [inputs_of(layer, lambda: model(images))[0] for layer in layers]
    maps = model.token_maps()
    names = [f"attention::stages.{i}.blocks.0.attn" for i in range(4)]
    assert list(maps) == names
    sizes = [(2, 2, 9, 6, 8), (2, 2, 9, 3, 4), (2, 6, 2, 2), (2, 6, 1, 1)]
    assert [tuple(maps[name].shape) for name in names] == sizes

    x = inputs[0]
    q, k, _ = layers[0].qkv(x.permute(0, 3, 1, 2)).chunk(3, dim=1)
    for head, r in enumerate((1, 3)):
        part = slice(head * 12, (head + 1) * 12)
        for row in range(6):
            for column in range(8):
                logits = torch.zeros(2, 3, 3)
                for i, y in enumerate((row - r, row, row + r)):
                    for j, z in enumerate((column - r, column, column + r)):
                        if 0 <= y < 6 and 0 <= z < 8:
                            product = q[:, part, row, column] * k[:, part, y, z]
                            logits[:, i, j] = product.sum(1) * 12**-0.5
                expected = logits.flatten(1).softmax(1)
                found = maps[names[0]][:, head, :, row, column]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    rows = packed_probabilities(layers[2], inputs[2].flatten(1, 2))
    torch.testing.assert_close(maps[names[2]].flatten(2), rows.mean(2), rtol=1e-4, atol=1e-6)
