"""Parameter groups, the scaled learning rate, and every optimizer by name."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from optimizer import build_optimizer, build_rates, param_groups, scaled_lr


class Toy(nn.Module):
    """Two blocks and a head, with every hook that a backbone may have."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.stem = nn.Linear(8, 8)
        self.convlayers = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)])
        self.table_bias = nn.Parameter(torch.zeros(2, 2))
        self.head = nn.Linear(8, 3)

    def no_weight_decay(self):
        return {"pos_embed"}

    def lr_multipliers(self):
        return {"convlayers": 2.0, "convlayers.1": 3.0}

    def num_layers(self):
        return 3

    def layer_id(self, name):
        return 0 if name.startswith(("stem", "pos_embed")) else 2 if name.startswith("head") else 1


def config(name="adamw", **train):
    optimizer = dict(NAME=name, EPS=1e-8, BETAS=[0.9, 0.999], MOMENTUM=0.9)
    defaults = dict(
        BASE_LR=1e-3,
        WARMUP_LR=1e-6,
        MIN_LR=1e-5,
        WEIGHT_DECAY=0.05,
        LAYER_DECAY=1.0,
        LR_MULTIPLIERS=[],
        NO_WEIGHT_DECAY=[],
        ACCUMULATION_STEPS=1,
        LR_SCALING="linear",
    )
    return CfgNode(
        dict(TRAIN=defaults | train | dict(OPTIMIZER=optimizer), DATA=dict(BATCH_SIZE=512))
    )


def names_by(groups, key):
    return {name: group[key] for group in groups for name, _ in group["params"]}


def test_weight_decay_skips_vectors_biases_and_exempt_names_only():
    decay = names_by(param_groups(Toy(), 0.05), "weight_decay")
    assert {name for name, value in decay.items() if value == 0.05} == {
        "stem.weight",
        "convlayers.0.weight",
        "table_bias",  # two dimensions, and its name does not end in ".bias"
        "head.weight",
    }


def test_exempt_names_match_in_full():
    """A nested tensor that shares the last part of an exempt name does decay (DHVT trains that way)."""
    outer = nn.Module()
    outer.inner = Toy()
    outer.no_weight_decay = lambda: {"pos_embed"}
    assert names_by(param_groups(outer, 0.05), "weight_decay")["inner.pos_embed"] == 0.05


def test_groups_hold_each_trainable_parameter_once():
    model = Toy()
    model.stem.weight.requires_grad_(False)
    groups = param_groups(model, 0.05, layer_decay=0.5)
    grouped = [p for group in groups for _, p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    expected = sum(p.numel() for p in model.parameters()) - model.stem.weight.numel()
    assert sum(p.numel() for p in grouped) == expected
    assert "stem.weight" not in names_by(groups, "lr_scale")
    keys = [(g["weight_decay"], g["lr_scale"]) for g in groups]
    assert len(set(keys)) == len(keys)


def test_the_longest_multiplier_prefix_wins_and_prefixes_end_at_dots():
    model = Toy()
    model.convlayers_extra = nn.Linear(2, 2)
    scale = names_by(param_groups(model, 0.05), "lr_scale")
    assert scale["convlayers.0.weight"] == 2.0
    assert scale["convlayers.1.weight"] == 3.0
    assert scale["convlayers_extra.weight"] == 1.0


def test_layer_decay_multiplies_per_layer_above():
    scale = names_by(param_groups(Toy(), 0.05, layer_decay=0.5), "lr_scale")
    assert scale["head.weight"] == 1.0
    assert scale["table_bias"] == 0.5
    assert scale["stem.weight"] == 0.25
    assert scale["convlayers.0.weight"] == 1.0  # 0.5 x its multiplier 2


def test_layer_decay_needs_a_model_with_layers():
    with pytest.raises(ValueError, match=r"LAYER_DECAY=0.9"):
        param_groups(nn.Linear(2, 2), 0.05, layer_decay=0.9)


def test_a_fully_frozen_model_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 0.05)


@pytest.mark.parametrize(
    ("rule", "accumulation", "expected"),
    [
        ("linear", 1, 1e-3),
        ("linear", 0, 1e-3),
        ("linear", 4, 4e-3),
        ("base", 4, 4e-3),
        ("none", 4, 5e-4),
    ],
)
def test_the_learning_rate_scales_with_the_images_per_step(rule, accumulation, expected):
    """Trap: accumulation changes the images per step, and DFvT's 0 means 1."""
    assert scaled_lr(5e-4, 128, 8, accumulation, rule) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("linear", (4e-3, 4e-6, 4e-5)), ("base", (4e-3, 1e-6, 1e-5)), ("none", (1e-3, 1e-6, 1e-5))],
)
def test_swin_scales_all_three_rates_and_deit_one(rule, expected):
    """Trap: DeiT's program scales --lr and passes --warmup-lr and --min-lr on as they are."""
    assert build_rates(config(LR_SCALING=rule), 4) == pytest.approx(expected)


def test_an_unknown_scaling_rule_is_an_error():
    message = r"LR_SCALING='square' must be one of \['linear', 'base', 'none'\]"
    with pytest.raises(ValueError, match=message):
        scaled_lr(1.0, 1, 1, 1, "square")


def test_multipliers_of_the_config_multiply_those_of_the_model():
    entries = ["convlayers=0.5", "*.bias=3", "head=10"]
    scale = names_by(param_groups(Toy(), 0.05, lr_multipliers=entries), "lr_scale")
    assert scale["convlayers.0.weight"] == 1.0  # 2 of the model x 0.5
    assert scale["convlayers.0.bias"] == 3.0
    assert scale["head.weight"] == 10.0
    assert scale["head.bias"] == 30.0
    assert scale["table_bias"] == 1.0  # the pattern asks for a dot before "bias"
    assert scale["stem.weight"] == 1.0


def test_a_multiplier_of_zero_keeps_the_weights_where_they_are():
    model = Toy()
    optimizer = build_optimizer(config("sgd", LR_MULTIPLIERS=["stem=0"]), model, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert kept == {"stem.weight", "stem.bias"}


def test_names_of_the_config_are_exempt_from_decay_too():
    groups = param_groups(Toy(), 0.05, no_weight_decay=["table_bias", "conv*.weight"])
    decay = names_by(groups, "weight_decay")
    assert {name for name, value in decay.items() if value == 0.05} == {
        "stem.weight",
        "head.weight",
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(LR_MULTIPLIERS=["haed=10"]), r"LR_MULTIPLIERS: 'haed' covers no parameter.*'head"),
        (dict(NO_WEIGHT_DECAY=["router"]), r"NO_WEIGHT_DECAY: 'router' covers no .*'\*.router.\*'"),
        (dict(LR_MULTIPLIERS=["head"]), r"LR_MULTIPLIERS: 'head' must be 'name=factor'"),
        (dict(LR_MULTIPLIERS=["head=-1"]), r"'head=-1' must be 'name=factor'"),
        (dict(LR_MULTIPLIERS=["head=nan"]), r"'head=nan' must be 'name=factor'"),
    ],
)
def test_names_that_the_model_does_not_have_are_errors(keys, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(config(**keys), Toy(), 1)


def test_building_twice_from_one_config_scales_once():
    """Trap: the lineage writes the scaled rate into the config, so a re-run scales it again."""
    frozen = config()
    frozen.freeze()
    rates = [build_optimizer(frozen, Toy(), 4).param_groups[0]["lr"] for _ in range(2)]
    assert rates == [pytest.approx(4e-3)] * 2


@pytest.mark.parametrize("name", ["adamw", "SGD", "lamb", "lion", "adan", "lookahead_radam"])
def test_optimizers_by_name_step_all_groups(name):
    model = Toy()
    optimizer = build_optimizer(config(name), model, 1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((p != before[n]).all() for n, p in model.named_parameters())
    scales = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert scales == {1.0: 1e-3, 2.0: 2e-3, 3.0: 3e-3}


def test_sgd_has_nesterov_momentum():
    group = build_optimizer(config("sgd"), Toy(), 1).param_groups[0]
    assert group["nesterov"]
    assert group["momentum"] == 0.9


def test_other_optimizers_keep_their_own_betas_unless_set():
    assert build_optimizer(config("lion"), Toy(), 1).param_groups[0]["betas"] == (0.9, 0.99)
    asked = config("lion")
    asked.TRAIN.OPTIMIZER.BETAS = [0.8, 0.95]
    assert build_optimizer(asked, Toy(), 1).param_groups[0]["betas"] == (0.8, 0.95)


def test_parameter_names_are_kept_for_tables():
    groups = build_optimizer(config(), Toy(), 1).param_groups
    assert sorted(n for g in groups for n in g["param_names"]) == sorted(
        n for n, _ in Toy().named_parameters()
    )


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(ValueError, match=r"OPTIMIZER.NAME='adamx' is unknown.*adam"):
        build_optimizer(config("adamx"), Toy(), 1)


def test_second_order_optimizers_are_refused():
    with pytest.raises(ValueError, match="second-order"):
        build_optimizer(config("adahessian"), Toy(), 1)


@pytest.mark.parametrize("installed", [False, True], ids=["absent", "the other apex of PyPI"])
def test_a_missing_apex_is_explained(monkeypatch, installed):
    """Trap: installing "apex" from PyPI gives another package."""
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex") if installed else None)
    with pytest.raises(ValueError, match=r"fused_adam.*NVIDIA Apex.*PyPI"):
        build_optimizer(config("fused_adam"), Toy(), 1)


def test_fused_lamb_is_apex(monkeypatch):
    class FusedLAMB(torch.optim.AdamW):
        pass

    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedLAMB, optimizers.FusedAdam = FusedLAMB, torch.optim.Adam
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert isinstance(build_optimizer(config("fused_lamb"), Toy(), 1), FusedLAMB)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_kernels_of_a_step_are_those_of_this_run_not_of_the_file(name, monkeypatch):
    """A checkpoint of a CPU names no kernel; with a fused one, fp16 hands the loss scale to the optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model.no_weight_decay = set

    def stepped(optimizer):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return optimizer

    state = stepped(build_optimizer(config(name), model)).state_dict()
    assert not any(group["fused"] for group in state["param_groups"])
    monkeypatch.setattr("optimizer._on_gpu", lambda groups: True)
    fused = build_optimizer(config(name), model)
    fused.load_state_dict(state)
    assert all(group["fused"] for group in fused.param_groups)
    stepped(fused)
    assert fused.state_dict()["state"].keys() == state["state"].keys()
