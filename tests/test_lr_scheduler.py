"""Every schedule against values worked out by hand."""

import logging
import math

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from lr_scheduler import build_scheduler
from optimizer import build_optimizer

BASE, WARMUP, MIN = 1e-3, 1e-6, 1e-5  # with 512 images per step, so that nothing is scaled


def config(name="cosine", prefix=True, **train):
    scheduler = dict(
        NAME=name,
        WARMUP_PREFIX=prefix,
        DECAY_EPOCHS=3,
        DECAY_RATE=0.1,
        GAMMA=0.5,
        MULTISTEPS=[4, 7],
        POWER=2.0,
    )
    defaults = dict(
        EPOCHS=10,
        MAX_STEPS=0,
        WARMUP_EPOCHS=2,
        WARMUP_STEPS=0,
        BASE_LR=BASE,
        WARMUP_LR=WARMUP,
        MIN_LR=MIN,
        WEIGHT_DECAY=0.05,
        WEIGHT_DECAY_END=None,
        ACCUMULATION_STEPS=1,
        LR_SCALING="linear",
    )
    train = defaults | train | dict(LR_SCHEDULER=scheduler)
    return CfgNode(dict(TRAIN=train, DATA=dict(BATCH_SIZE=512)))


def sgd(lr=BASE, *scales):
    groups = [dict(params=[nn.Parameter(torch.zeros(()))], lr_scale=s) for s in scales or (1.0,)]
    return torch.optim.SGD(groups, lr=lr)


def build(name="cosine", steps_per_epoch=10, world_size=1, **keys):
    return build_scheduler(
        config(name, **keys), sgd(BASE * world_size), steps_per_epoch, world_size
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "step", "multistep", "poly"])
def test_warm_up_rises_linearly_and_reaches_the_base_rate(name):
    schedule = build(name)
    assert schedule.lr_at(0) == pytest.approx(WARMUP)
    assert schedule.lr_at(5) == pytest.approx(WARMUP + (BASE - WARMUP) * 5 / 20)
    assert schedule.lr_at(20) == pytest.approx(BASE)


def test_cosine_with_prefix_spans_what_follows_the_warm_up():
    schedule = build("cosine", prefix=True)
    for step in (20, 40, 60, 99):
        share = (step - 20) / 80
        expected = MIN + (BASE - MIN) * (1 + math.cos(math.pi * share)) / 2
        assert schedule.lr_at(step) == pytest.approx(expected)
    assert schedule.lr_at(100) == pytest.approx(MIN)


def test_cosine_without_prefix_spans_the_whole_run():
    """DFvT and DeiT: the warm-up hides the first part of the cosine."""
    schedule = build("cosine", prefix=False)
    for step in (20, 50, 99):
        expected = MIN + (BASE - MIN) * (1 + math.cos(math.pi * step / 100)) / 2
        assert schedule.lr_at(step) == pytest.approx(expected)


def test_linear_ends_at_one_percent_as_in_swin():
    schedule = build("linear")
    assert schedule.lr_at(60) == pytest.approx(BASE * (1 - 0.99 * 0.5))
    assert schedule.lr_at(100) == pytest.approx(BASE * 0.01)


def test_step_decays_count_from_the_start_of_the_run():
    """Trap: newer timm counts them from the end of the warm-up, which shifts Swin's schedules."""
    schedule = build("step")
    assert [schedule.lr_at(s) for s in (29, 30, 59, 60)] == pytest.approx(
        [BASE, BASE * 0.1, BASE * 0.1, BASE * 0.01]
    )


def test_multistep_decays_at_the_first_step_of_its_epoch():
    """Trap: timm's own milestones act one step early."""
    schedule = build("multistep")
    assert [schedule.lr_at(s) for s in (39, 40, 69, 70)] == pytest.approx(
        [BASE, BASE / 2, BASE / 2, BASE / 4]
    )


def test_poly_follows_its_power():
    schedule = build("poly")
    assert schedule.lr_at(60) == pytest.approx(MIN + (BASE - MIN) * 0.5**2)


def test_warm_up_and_minimum_scale_like_the_base_rate():
    """4 processes x 4 accumulated batches of 512, so 16 times all three rates."""
    train = config(ACCUMULATION_STEPS=4)
    schedule = build_scheduler(train, sgd(BASE * 16), 10, world_size=4)
    assert schedule.lr_at(0) == pytest.approx(16 * WARMUP)
    assert schedule.lr_at(20) == pytest.approx(16 * BASE)
    assert schedule.lr_at(100) == pytest.approx(16 * MIN)


def test_groups_follow_their_factor():
    optimizer = sgd(BASE, 1.0, 2.0, 0.25)
    schedule = build_scheduler(config(), optimizer, 10)
    for step in (0, 7, 33, 100):
        schedule.step_update(step)
        base = schedule.lr_at(step)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
            [base, 2 * base, 0.25 * base]
        )


def test_factors_of_a_built_optimizer_count_once():
    class Doubled(nn.Linear):
        def lr_multipliers(self):
            return {"weight": 2.0}

    keys = config(LAYER_DECAY=1.0, LR_MULTIPLIERS=[], NO_WEIGHT_DECAY=[])
    keys.TRAIN.OPTIMIZER = CfgNode(dict(NAME="sgd", MOMENTUM=0.9, EPS=1e-8, BETAS=[0.9, 0.999]))
    optimizer = build_optimizer(keys, Doubled(2, 2), 1)
    assert optimizer.param_groups[0]["lr_scale"] == 2.0
    schedule = build_scheduler(keys, optimizer, 10)
    schedule.step_update(20)
    assert schedule.lr_at(20) == pytest.approx(BASE)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2 * BASE, BASE])


def test_drawing_the_schedule_leaves_the_optimizer_alone():
    optimizer = sgd()
    schedule = build_scheduler(config(), optimizer, 10)
    schedule.step_update(50)
    lr = optimizer.param_groups[0]["lr"]
    curve = [schedule.lr_at(step) for step in range(100)]
    assert optimizer.param_groups[0]["lr"] == lr == curve[50]
    assert max(curve) == curve[20]


def test_steps_replace_epochs_where_given():
    schedule = build("cosine", MAX_STEPS=50, WARMUP_STEPS=10)
    assert (schedule.total_steps, schedule.warmup_steps) == (50, 10)
    assert schedule.lr_at(10) == pytest.approx(BASE)
    assert schedule.lr_at(50) == pytest.approx(MIN)


def test_a_run_inside_its_warm_up_warns_and_still_rises(caplog):
    schedule = build("cosine", EPOCHS=1)
    assert "ends inside its warm-up (10 of 20 steps)" in caplog.text
    assert len(caplog.records) == 1
    assert schedule.lr_at(9) == pytest.approx(WARMUP + (BASE - WARMUP) * 9 / 20)


def test_an_empty_run_is_an_error():
    with pytest.raises(ValueError, match=r"EPOCHS=0.*nothing to train"):
        build("cosine", EPOCHS=0)


def test_an_unknown_schedule_names_the_choices():
    with pytest.raises(ValueError, match=r"NAME='cosin' must be one of \['cosine', 'linear'"):
        build("cosin")


def test_resuming_another_length_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        build().load_state_dict(build().state_dict())
    assert not caplog.text
    build().load_state_dict(build("cosine", EPOCHS=20).state_dict())
    assert "'total_steps': 200" in caplog.text


def decaying(first, last):
    """An optimizer with a group that decays and one that does not, and its schedule."""
    keys = config(WEIGHT_DECAY=first, WEIGHT_DECAY_END=last)
    keys.TRAIN.update(LAYER_DECAY=1.0, LR_MULTIPLIERS=[], NO_WEIGHT_DECAY=[])
    keys.TRAIN.OPTIMIZER = CfgNode(dict(NAME="adamw", MOMENTUM=0.9, EPS=1e-8, BETAS=[0.9, 0.999]))
    optimizer = build_optimizer(keys, nn.Linear(2, 2), 1)
    return optimizer, build_scheduler(keys, optimizer, 10)


@pytest.mark.parametrize(("first", "last"), [(0.04, 0.4), (0.05, 0.0), (0.0, 0.1)])
def test_weight_decay_follows_a_cosine_over_the_whole_run(first, last):
    """DINO's: 100 steps, no warm-up of its own; what does not decay stays at 0."""
    optimizer, schedule = decaying(first, last)
    for step in (0, 10, 50, 99, 100):
        expected = last + (first - last) * (1 + math.cos(math.pi * step / 100)) / 2
        schedule.step_update(step)
        assert schedule.weight_decay_at(step) == pytest.approx(expected)
        decays = {g["param_names"][0]: g["weight_decay"] for g in optimizer.param_groups}
        assert decays == {"weight": pytest.approx(expected), "bias": 0.0}
    assert schedule.weight_decay_at(0) == pytest.approx(first)
    assert schedule.weight_decay_at(50) == pytest.approx((first + last) / 2)
    assert schedule.weight_decay_at(100) == pytest.approx(last)


def test_without_an_end_the_decay_of_the_groups_is_left_alone():
    optimizer, schedule = decaying(0.05, None)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    schedule.step_update(70)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert schedule.weight_decay_at(70) == 0.3


def test_the_decay_goes_on_in_groups_that_a_checkpoint_has_replaced():
    optimizer, schedule = decaying(0.04, 0.4)
    schedule.step_update(30)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["wd_scale"]  # as in checkpoints from before there was a schedule
    resumed, again = decaying(0.04, 0.4)
    resumed.load_state_dict(state)
    for step in (31, 80):
        schedule.step_update(step)
        again.step_update(step)
        expected = [group["weight_decay"] for group in optimizer.param_groups]
        assert [group["weight_decay"] for group in resumed.param_groups] == expected
        assert expected[1] == 0.0
