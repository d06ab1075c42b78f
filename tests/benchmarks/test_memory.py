"""Activation memory of a training step: less than the literal models', and halved by recomputation."""

import copy

import pytest
import torch

from benchmarks.contestants import Contestant, Setting, make_pass
from benchmarks.literal import literal
from benchmarks.measure import peak_memory
from models import create_model
from tests.small_models import SMALL
from utils.amp import Amp


def step_memory(model, size):
    setting = Setting(torch.device("cpu"), Amp("cpu", "float32"), 4, False)
    run = make_pass(Contestant("model", model, (size, size)), "train", setting)
    run()  # gradients and tables that stay are there before
    return peak_memory(run, setting.device)


def test_a_step_of_a_student_with_two_outputs_reaches_all_its_parameters():
    sizes = dict(img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    model = create_model("deit_tiny_distilled_patch16_224", **sizes).train()
    setting = Setting(torch.device("cpu"), Amp("cpu", "float32"), 4, False)
    make_pass(Contestant("model", model, (32, 32)), "train", setting)()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_a_step_holds_less_than_the_literal_one(family):
    name, overrides = SMALL[family]
    if "window_size" in overrides:
        overrides = dict(overrides, window_size=7)  # the published one: 3 has hardly any logits
    model = create_model(name, num_classes=10, drop_path_rate=0.0, **overrides)
    size = 2 * overrides["img_size"]
    assert step_memory(model, size) < step_memory(literal(model), size)


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_recomputation_halves_what_a_deep_model_holds(family):
    name, overrides = SMALL[family]
    overrides = dict(overrides, **{"depth": 8} if "depth" in overrides else {"depths": [4] * 4})
    if family == "dilateformer":
        overrides["embed_dim"] = 48  # narrow models have as wide a stem
    model = create_model(name, num_classes=10, drop_path_rate=0.0, **overrides)
    lean = copy.deepcopy(model)
    lean.set_grad_checkpointing()
    size = 2 * overrides["img_size"]
    assert step_memory(lean, size) < 0.5 * step_memory(model, size)
