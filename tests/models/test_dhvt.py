"""What DHVT's paper and release say of its blocks, against literal implementations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from models import create_model
from models.backbone import BATCH_NORMS
from models.dhvt import DHVT
from models.folding import fold_batch_norms
from models.layers import eager
from models.layers.conv_stem import ConvStem
from models.layers.daff import DAFF
from models.layers.head_interaction import HIAttention
from modes.build import converted_to_sync
from tests.golden_tools import fill_module_, relative_error
from tests.reference.attention import inputs_of, packed_probabilities

TINY = dict(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=7)


def literal_daff(mlp, tokens, size):
    """Class token and patches (B, 1 + H*W, C), all layers as modules on planar maps."""
    cls, patches = tokens[:, :1], tokens[:, 1:]
    x = patches.transpose(1, 2).unflatten(2, size)
    x = F.gelu(mlp.bn1(mlp.conv1(x)))
    x = x + F.gelu(mlp.bn2(mlp.conv2(x)))
    x = mlp.bn3(mlp.conv3(x)).flatten(2).transpose(1, 2)
    weight = mlp.excitation(F.gelu(mlp.compress(x.mean(1, keepdim=True))))
    return torch.cat([cls * weight, x], dim=1)


def literal_attention(attn, tokens):
    """Class token first, head tokens last, softmax written out."""
    batch, length, dim = tokens.shape
    heads, width = attn.num_heads, dim // attn.num_heads
    pooled = tokens.reshape(batch, length, heads, width).mean(1)
    head_tokens = attn.ht_proj(pooled).reshape(batch, heads, heads, width)
    head_tokens = F.gelu(attn.ht_norm(head_tokens)).reshape(batch, heads, dim) + attn.pos_embed
    x = torch.cat([tokens, head_tokens], dim=1)
    q, k, v = attn.qkv(x).reshape(batch, length + heads, 3, heads, width).permute(2, 0, 3, 1, 4)
    x = ((q @ k.transpose(-2, -1) * width**-0.5).softmax(-1) @ v).transpose(1, 2)
    cls, patches, head_tokens = attn.proj(x.reshape(batch, -1, dim)).split(
        [1, length - 1, heads], 1
    )
    return torch.cat([cls + head_tokens.mean(1, keepdim=True), patches], dim=1)


@torch.no_grad()
def test_images_in_pieces_equal_them_at_once(monkeypatch):
    model = fill_module_(DHVT(**TINY)).eval()
    x, sizes = torch.randn(5, 3, 32, 48), []
    expected = model(x)

    def note(_, inputs, __):
        if inputs[0].ndim == 4:  # the class token's squeeze has the same activation
            sizes.append(len(inputs[0]))

    for module in (model.patch_embed.proj[0], model.blocks[0].mlp.act):
        module.register_forward_hook(note)
    monkeypatch.setattr(eager, "PIECE", 1)
    monkeypatch.setattr(eager, "POSITIONS", 1)
    assert relative_error(model(x), expected) < 1e-5
    assert set(sizes) == {1}


@pytest.mark.parametrize("training", [False, True])
def test_daff_equals_its_definition(training):
    mlp = fill_module_(DAFF(24)).train(training)
    tokens = torch.randn(2, 1 + 5 * 3, 24)
    expected = literal_daff(mlp, tokens, (5, 3))
    y = mlp(tokens[:, 1:].unflatten(1, (5, 3)))
    cls = mlp.reweight(tokens[:, :1], y)
    assert relative_error(torch.cat([cls, y.flatten(1, 2)], dim=1), expected.detach()) < 1e-5


def test_attention_dropout_keeps_the_mean_and_is_off_in_evaluation():
    plain = fill_module_(DHVT(**TINY, drop_path_rate=0.0)).blocks[0].attn
    model = fill_module_(DHVT(**TINY, drop_path_rate=0.0, attn_drop_rate=0.5))
    dropped = model.blocks[0].attn
    x, cls = torch.randn(1, 12, 32), torch.randn(1, 1, 32)
    with torch.no_grad():
        assert torch.equal(dropped.eval()(x, cls)[0], plain.eval()(x, cls)[0])
        expected = plain(x, cls)[0]
        draws = dropped.train()(x.expand(4000, -1, -1), cls.expand(4000, -1, -1))[0]
    assert draws.std(0).max() > 0.01
    assert (draws.mean(0) - expected[0]).abs().max() < 6 * draws.std(0).max() / 4000**0.5


def test_daff_updates_its_statistics_in_training_and_uses_them_in_evaluation():
    mlp = fill_module_(DAFF(8, class_gate=False))
    before = mlp.bn2.running_mean.clone()
    x = torch.randn(2, 4, 4, 8)
    mlp.eval()(x)
    assert torch.equal(mlp.bn2.running_mean, before)
    mlp.train()(x)
    assert not torch.equal(mlp.bn2.running_mean, before)
    assert mlp.bn2.num_batches_tracked == 1


@torch.no_grad()
def test_daff_in_evaluation_takes_the_pruned_weights_of_now():
    module, x = DAFF(8).eval(), torch.randn(2, 5, 7, 8)
    prune.l1_unstructured(module.conv1, "weight", 0.5)
    module(x)
    module.conv1.weight_orig.mul_(3)
    found = module(x)
    module.conv1(x.permute(0, 3, 1, 2))  # its hook prunes again
    torch.testing.assert_close(found, module(x))


def test_head_interacted_attention_equals_its_definition():
    attn = fill_module_(HIAttention(24, 4))
    tokens = torch.randn(2, 1 + 15, 24)
    x, cls = attn(tokens[:, 1:], tokens[:, :1])
    expected = literal_attention(attn, tokens)
    assert relative_error(torch.cat([cls, x], dim=1), expected.detach()) < 1e-5


def test_head_interacted_attention_without_class_token_uses_every_parameter():
    attn = HIAttention(24, 4)
    x, cls = attn(torch.randn(2, 15, 24))
    assert cls is None
    assert x.shape == (2, 15, 24)
    x.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attn.parameters())


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
def test_stem_rounds_up_and_ends_without_activation_but_for_patch_2(patch_size):
    stem = ConvStem(16, patch_size)
    assert stem(torch.randn(2, 3, 33, 47)).shape == (
        2,
        16,
        -(-33 // patch_size),
        -(-47 // patch_size),
    )
    assert isinstance(stem.proj[-1], nn.GELU) == (patch_size == 2)


@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("patch_size", [2, 8])
def test_stem_has_the_gradients_of_its_definition(patch_size, of_images):
    """In training the affine map is part of the first convolution; its offset ends at the border."""
    stem = fill_module_(ConvStem(16, patch_size)).double().train()
    with torch.no_grad():
        stem.pre_affine.beta.fill_(3.0)
    images = torch.randn(2, 3, 33, 18, dtype=torch.double, requires_grad=of_images)
    sources = [*stem.parameters(), *[images] * of_images]
    x = stem.pre_affine.alpha * images + stem.pre_affine.beta
    expected = stem.post_affine(stem.proj(x))
    direction = torch.randn_like(expected)
    y = stem(images)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, sources, direction),
        torch.autograd.grad(expected, sources, direction),
    )


@pytest.mark.parametrize("mode", ["folded", "evaluation", "bytes"])
def test_stem_in_evaluation_is_its_definition_also_with_gradients(mode):
    stem = fill_module_(ConvStem(16, 4)).eval()
    images = torch.randn(2, 3, 33, 18)
    if mode == "bytes":
        images = images.mul(50).clamp(0, 255).byte()
    expected = stem.post_affine(stem.proj(stem.pre_affine(images)))
    stem = fold_batch_norms(stem) if mode == "folded" else stem
    assert relative_error(stem(images), expected.detach()) < 1e-5


def test_stem_calls_the_hooks_of_its_layers_in_evaluation():
    stem, called = ConvStem(16, 4).eval(), []
    watched = [stem.pre_affine, stem.proj, stem.proj[0], stem.proj[0][0], stem.post_affine]
    for module in watched:
        module.register_forward_hook(lambda module, *_: called.append(module))
    stem(torch.randn(1, 3, 16, 16))
    assert {id(module) for module in called} == {id(module) for module in watched}


def test_stem_trains_with_a_pruned_convolution():
    stem = ConvStem(16, 4).train()
    prune.random_unstructured(stem.proj[0][0], "weight", amount=0.5)
    for _ in range(2):
        stem.zero_grad()
        stem(torch.randn(2, 3, 16, 16)).square().mean().backward()
    conv = stem.proj[0][0]
    assert conv.weight_orig.grad[conv.weight_mask == 0].eq(0).all()
    assert conv.weight_orig.grad.abs().sum() > 0


def test_a_model_in_evaluation_is_exported_with_a_free_batch_also_with_gradients():
    model = DHVT(**TINY).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},), strict=False
    )
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("patch_size", [0, 1, 6, 64])
def test_stem_names_the_patch_sizes_that_it_has(patch_size):
    with pytest.raises(ValueError, match="power of two"):
        ConvStem(16, patch_size)


def test_a_branch_is_dropped_for_the_map_and_the_class_token_together():
    block = fill_module_(DHVT(**TINY, drop_path_rate=0.5)).blocks[1].train()
    x, cls = torch.randn(64, 2, 2, 32), torch.randn(64, 1, 32)
    out, out_cls = block(x, cls)
    kept = (out != x).flatten(1).any(1)
    assert torch.equal((out_cls != cls).flatten(1).any(1), kept)
    assert 0 < kept.sum() < 64  # a quarter of the images loses both branches


def test_a_wide_map_is_not_read_as_a_square_one():
    model = fill_module_(DHVT(**TINY)).eval()
    image = torch.randn(1, 3, 16, 64)
    square = image.unflatten(3, (2, 32)).permute(0, 1, 3, 2, 4).reshape(1, 3, 32, 32)
    assert model.forward_pyramid(image)[0].shape == (1, 32, 4, 16)
    assert relative_error(model(image), model(square).detach()) > 1e-2


def test_transposed_image_with_transposed_filters_gives_the_same_logits():
    model = fill_module_(DHVT(**TINY)).eval()
    image = torch.randn(2, 3, 24, 40)
    logits = model(image).detach()
    for conv in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        conv.weight.data = conv.weight.data.transpose(2, 3).contiguous()
    assert relative_error(model(image.transpose(2, 3)), logits) < 1e-5


def test_without_classifier_the_last_block_has_no_class_gate():
    with_head, without = (set(DHVT(**(TINY | dict(num_classes=n))).state_dict()) for n in (7, 0))
    gate = {f"blocks.1.mlp.{m}.{p}" for m in ("compress", "excitation") for p in ("weight", "bias")}
    assert with_head - without == gate | {"head.weight", "head.bias"}
    assert not without - with_head


def test_resetting_the_classifier_keeps_the_trained_class_gate():
    model = fill_module_(DHVT(**TINY))
    before = model.blocks[-1].mlp.excitation.weight.clone()
    model.reset_classifier(3)
    assert torch.equal(model.blocks[-1].mlp.excitation.weight, before)


def test_nested_position_embeddings_and_affine_maps_decay():
    assert create_model("dhvt_tiny_cifar_patch4", depth=1).no_weight_decay() == {"cls_token"}


def test_building_one_variant_leaves_the_next_one_alone():
    assert create_model("dhvt_tiny_cifar_patch4", depth=1, num_classes=7).num_classes == 7
    assert create_model("dhvt_tiny_cifar_patch4", depth=1).num_classes == 100


@torch.no_grad()
def test_token_map_is_the_attention_of_the_class_token_among_all_keys():
    model = fill_module_(DHVT(**TINY)).eval()
    attn = model.blocks[-1].attn
    x, cls = inputs_of(attn, lambda: model(torch.randn(2, 3, 24, 40)))
    tokens = torch.cat([cls, x], dim=1)
    pooled = attn.ht_proj(tokens.unflatten(2, (2, -1)).mean(1)).unflatten(2, (2, -1))
    head_tokens = F.gelu(attn.ht_norm(pooled)).flatten(2) + attn.pos_embed
    rows = packed_probabilities(attn, torch.cat([tokens, head_tokens], dim=1))  # B h 1+60+2 1+60+2
    maps = model.token_maps()
    assert maps.keys() == {"attention::blocks.1.attn"}
    attention = maps["attention::blocks.1.attn"]
    assert attention.shape == (2, 2, 6, 10)
    torch.testing.assert_close(attention.flatten(2), rows[:, :, 0, 1:61])
    assert attention.sum((2, 3)).max() < 1


def test_only_the_batch_norms_of_the_stem_are_synchronised():
    """As in the release; without parameters behind it, since PyTorch's work on GPUs only."""
    with torch.device("meta"):
        model = converted_to_sync(DHVT(**TINY))
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
    stem = [name for name in kinds if name.startswith("patch_embed.")]
    assert {kinds[name] for name in stem} == {nn.SyncBatchNorm}
    assert nn.SyncBatchNorm not in {kind for name, kind in kinds.items() if name not in stem}
    assert len(kinds) > len(stem) > 0
    names = [name for name, _ in DHVT(**TINY).named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
