"""Frozen prefixes: what is trained, in which mode, and that the rest learns as before."""

import copy

import pytest
import torch
from torch import nn

from models import create_model
from models.backbone import BATCH_NORMS
from optimizer import param_groups
from tests.small_models import SMALL
from utils.ema import ModelEma


def build(name):
    variant, overrides = SMALL[name]
    overrides = dict(overrides, drop_path_rate=0.0)
    return create_model(variant, num_classes=10, **overrides), overrides["img_size"]


def classifier_of(model):
    head = {id(p) for p in model.get_classifier().parameters()}
    return {name for name, p in model.named_parameters() if id(p) in head}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_linear_probe_trains_the_classifier_and_nothing_else(name):
    model, side = build(name)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    frozen = model.freeze(["backbone"])
    assert trainable - set(frozen) == classifier_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    output = model(torch.rand(2, 3, side, side))
    outputs = output if isinstance(output, tuple) else (output,)
    sum(part.square().mean() for part in outputs).backward()
    learns = {key for key, p in model.named_parameters() if p.grad is not None}
    assert learns == classifier_of(model)
    named = [key for group in param_groups(model, 0.1) for key, _ in group["params"]]
    assert set(named) == learns
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "no statistic has moved"


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_upper_layers_learn_as_if_the_frozen_ones_were_not(name):
    model, side = build(name)
    whole = copy.deepcopy(model)
    depth = max(model.num_layers() - 2, 1)
    frozen = set(model.freeze(depth=depth))
    assert frozen == {key for key, _ in whole.named_parameters() if whole.layer_id(key) < depth}
    images = torch.rand(2, 3, side, side)
    for net in (model, whole):
        net.eval()  # batch norms alike in both
        output = net(images)
        output.square().mean().backward()
    reference = dict(whole.named_parameters())
    for key, parameter in model.named_parameters():
        if key in frozen:
            assert parameter.grad is None
        elif parameter.requires_grad and reference[key].grad is not None:
            torch.testing.assert_close(parameter.grad, reference[key].grad, rtol=1e-4, atol=1e-6)


def test_frozen_batch_norms_stay_in_eval_mode_while_the_rest_trains():
    model, side = build("dilateformer")
    model.freeze(["patch_embed"])
    wrapped = [nn.DataParallel(model), torch.compile(model, backend="eager")]
    for net in [model, copy.deepcopy(model), ModelEma(model).module, *wrapped]:
        net.eval()
        net.train()
        for path, module in net.named_modules():
            path = path.removeprefix("module.").removeprefix("_orig_mod.")
            is_frozen = isinstance(module, BATCH_NORMS) and path.startswith("patch_embed.")
            assert module.training != is_frozen, path
    assert any(isinstance(module, BATCH_NORMS) for module in model.patch_embed.modules())
    statistics = [m.running_mean.clone() for m in model.modules() if isinstance(m, BATCH_NORMS)]
    model(torch.rand(2, 3, side, side))
    moved = [
        not torch.equal(old, m.running_mean)
        for old, m in zip(
            statistics, (m for m in model.modules() if isinstance(m, BATCH_NORMS)), strict=True
        )
    ]
    frozen = sum(isinstance(module, BATCH_NORMS) for module in model.patch_embed.modules())
    assert moved == [False] * frozen + [True] * (len(moved) - frozen)


def test_without_freezing_everything_trains():
    """Trap: the lineage fine-tunes in eval mode by accident."""
    model, _ = build("dhvt")
    assert model.freeze() == []
    assert all(module.training for module in model.eval().train().modules())


def test_prefixes_are_whole_components():
    model, _ = build("deit")
    frozen = model.freeze(["blocks.1", "cls_token"])
    assert {name.split(".")[0] for name in frozen} == {"blocks", "cls_token"}
    assert {name.split(".")[1] for name in frozen if "." in name} == {"1"}


def test_mistakes_name_what_is_there():
    model, _ = build("deit")
    with pytest.raises(ValueError, match=r"TRAIN.FREEZE=\['block'\]: no parameter .*'blocks'"):
        model.freeze(["block"])
    with pytest.raises(ValueError, match=r"TRAIN.FREEZE_DEPTH=9 must be from 0 to 3"):
        model.freeze(depth=9)
    assert all(p.requires_grad for p in model.parameters())
