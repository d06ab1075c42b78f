"""--plan against a table written from the papers and their scripts, and against what training builds."""

import csv
import json
import logging
import math
import re

import pytest
import torch

import main as program
from config import load_config
from models import CONFIG_DIR, build_model
from modes.planning import make_plan
from modes.training import TrainingRun
from tests.golden_tools import SkipInit
from utils.distributed import Runtime
from utils.plan import Group, summarise_groups
from utils.plotting import plot_schedule

SMOKE = CONFIG_DIR / "_base_" / "smoke_cls.yaml"
ALONE = Runtime(0, 1, 0, torch.device("cpu"))
IMAGENET, CIFAR, CLIPART = 1_281_167, 50_000, 33_525

# Per recipe: processes, images per process, training images, epochs, warm-up epochs; rates after scaling:
# base, warm-up, minimum; weight decay, clipping, drop path, repeated augmentation, decay of the average.
# DeiT's descendants scale the base rate only, Swin and DFvT all three, DFFormer none.
TABLE = {
    "dilateformer": (8, 128, IMAGENET, 300, 10, 2e-3, 1e-6, 1e-5, 0.05, 0, 0.1, True, 0.99996),
    "dfvt": (4, 256, IMAGENET, 300, 20, 1e-3, 1e-6, 1e-5, 0.05, 5, None, False, None),
    "dhvt_cifar": (2, 256, CIFAR, 300, 5, 1e-3, 1e-6, 1e-5, 0.05, 0, 0.1, True, None),
    "dhvt_domainnet": (2, 128, CLIPART, 300, 20, 5e-4, 1e-6, 1e-5, 0.05, 0, 0.1, True, None),
    "dhvt_imagenet": (2, 128, IMAGENET, 300, 10, 2.5e-4, 1e-6, 1e-5, 0.05, 0, 0.1, True, None),
    "dhvt_finetune": (2, 128, IMAGENET, 100, 2, 2.5e-4, 1e-6, 1e-6, 1e-8, 0, 0.1, False, None),
    "evit": (8, 256, IMAGENET, 300, 5, 2e-3, 1e-6, 1e-5, 0.05, 0, 0.1, True, None),
    "evit_finetune": (8, 256, IMAGENET, 30, 0, 8e-5, 1e-6, 2e-6, 1e-6, 0, 0.1, True, None),
    "vtpack": (8, 32, IMAGENET, 300, 20, 2.5e-4, 1e-6, 1e-5, 0.05, 0, 0.1, True, None),
    "dfformer": (8, 128, IMAGENET, 300, 20, 1e-3, 1e-6, 1e-5, 0.05, 0, 0.2, False, None),
    "swin": (8, 128, IMAGENET, 300, 20, 1e-3, 1e-6, 1e-5, 0.05, 5, None, False, None),
}
STEPS_PER_EPOCH = {
    "dilateformer": 1251,
    "dfvt": 1251,
    "dhvt_cifar": 97,
    "dhvt_domainnet": 130,
    "dhvt_imagenet": 5004,
    "dhvt_finetune": 5004,
    "evit": 625,
    "evit_finetune": 625,
    "vtpack": 5004,
    "dfformer": 1251,
    "swin": 1251,
}
# What all recipes share.
SHARED = dict(
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    reprob=0.25,
    remode="pixel",
    recount=1,
    mixup=0.8,
    cutmix=1.0,
    mixup_prob=1.0,
    mixup_switch_prob=0.5,
    mixup_mode="batch",
)


def recipe(name, *opts):
    opts = ["PLAN.TRAIN_SIZE", str(CLIPART), *opts] if name == "dhvt_domainnet" else opts
    return load_config(CONFIG_DIR / "_base_" / f"{name}.yaml", opts)


def plan_of(config, processes=1):
    with SkipInit():
        return make_plan(config, Runtime(0, processes, 0, torch.device("cpu")))


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_of_a_recipe_is_the_published_training(name):
    processes, batch, images, epochs, warmup, base, start, minimum, *rest = TABLE[name]
    decay, clip, drop_path, repeated, average = rest
    plan = plan_of(recipe(name))
    facts = plan.facts
    assert facts["data"]["images"] == images
    assert facts["batch"]["per_process"] == batch
    assert facts["batch"]["processes"] == processes
    assert facts["batch"]["images_per_step"] == batch * processes
    per_epoch = STEPS_PER_EPOCH[name]
    assert facts["steps"] == dict(
        per_epoch=per_epoch, epochs=epochs, warmup=warmup * per_epoch, total=epochs * per_epoch
    )
    assert [facts["lr"][key] for key in ("base", "warmup", "minimum")] == pytest.approx(
        [base, start, minimum]
    )
    assert facts["weight_decay"] == dict(first=decay, last=decay)
    optimizer = facts["optimizer"]
    assert (optimizer["name"], optimizer["betas"], optimizer["eps"]) == (
        "adamw",
        [0.9, 0.999],
        1e-8,
    )
    assert optimizer["clip_grad"] == clip
    assert facts["regularisation"]["label_smoothing"] == 0.1
    if drop_path is not None:
        assert facts["regularisation"]["drop_path_rate"] == drop_path
    augmentation = facts["augmentation"]
    assert {key: augmentation[key] for key in SHARED} == SHARED
    assert augmentation["repeated_aug"] is repeated
    assert facts["ema"]["enable"] is (average is not None)
    if average is not None:
        assert facts["ema"]["decay"] == average


@pytest.mark.parametrize("name", TABLE)
def test_the_rate_of_a_recipe_rises_linearly_and_falls_along_a_cosine(name):
    _, _, _, epochs, warmup, base, start, minimum, *_ = TABLE[name]
    plan = plan_of(recipe(name))
    total, warmup = epochs * STEPS_PER_EPOCH[name], warmup * STEPS_PER_EPOCH[name]
    # Swin's cosine starts after the warm-up; all others' runs under it.
    first = warmup if name == "swin" else 0
    for step in (0, warmup // 2, warmup, (warmup + total) // 2, total - 1):
        share = (step - first) / (total - first)
        expected = minimum + (base - minimum) * (1 + math.cos(math.pi * share)) / 2
        if step < warmup:
            expected = start + (base - start) * step / warmup
        assert plan.lr_at(step) == pytest.approx(expected)


@pytest.mark.parametrize("name", TABLE)
def test_the_groups_of_a_recipe_hold_every_parameter_once(name):
    config = recipe(name)
    with torch.device("meta"), SkipInit():
        model = build_model(config, num_classes=config.MODEL.NUM_CLASSES or 1000)
    if name == "dhvt_cifar":
        model.reset_classifier(100)
    plan = plan_of(config)
    assert plan.params == sum(p.numel() for p in model.parameters())
    assert plan.facts["parameters"] == dict(trainable=plan.params, frozen=0)
    assert sum(group.tensors for group in plan.groups) == len(list(model.parameters()))
    assert {group.weight_decay for group in plan.groups} == {0.0, config.TRAIN.WEIGHT_DECAY}
    assert f"{plan.params:,}" in plan.to_text()
    assert "number of trainable parameters" in plan.to_text()


@pytest.mark.parametrize(("size", "drop_path"), [("tiny", 0.0), ("small", 0.1), ("base", 0.2)])
def test_the_convolution_branch_of_dfvt_learns_at_twice_the_rate(size, drop_path):
    config = load_config(CONFIG_DIR / "dfvt" / f"dfvt_{size}.yaml")
    with torch.device("meta"), SkipInit():
        model = build_model(config)
    branch = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(("convlayers.", "multiresolution_conv."))
    )
    plan = plan_of(config)
    assert 0 < branch < plan.params
    assert sum(group.params for group in plan.groups if group.lr_scale == 2.0) == branch
    assert {group.lr_scale for group in plan.groups} == {1.0, 2.0}
    assert plan.facts["regularisation"]["drop_path_rate"] == drop_path


@pytest.mark.parametrize(("size", "drop_path"), [("tiny", 0.2), ("small", 0.3), ("base", 0.5)])
def test_drop_path_of_swin_grows_with_the_model(size, drop_path):
    config = load_config(CONFIG_DIR / "swin" / f"swin_{size}_patch4_window7_224.yaml")
    assert plan_of(config).facts["regularisation"]["drop_path_rate"] == drop_path


def test_evit_shrinks_from_epoch_10_and_its_fine_tuning_at_once():
    """Trap: with the training's default, EViT's fine-tuning kept all patches for 10 of its 30 epochs."""
    trained = plan_of(recipe("evit")).facts["architecture"]
    tuned = load_config(CONFIG_DIR / "evit" / "evit_small_r07_fuse_finetune.yaml")
    tuned = plan_of(tuned).facts["architecture"]
    keys = ("drop_loc", "shrink_start_epoch", "shrink_epochs")
    assert [trained[key] for key in keys] == [[3, 6, 9], 10, 100]
    assert [tuned[key] for key in keys] == [[3, 6, 9], 0, 0]
    assert tuned["keep_rate"] == 0.7


def test_dge_trains_towards_half_the_complexity():
    config = load_config(CONFIG_DIR / "dge" / "deit_dge_s124_small_patch16_256.yaml")
    facts = plan_of(config).facts
    assert (facts["architecture"]["budget"], facts["architecture"]["budget_weight"]) == (0.5, 1.0)
    assert facts["steps"]["warmup"] == 20 * 5004


@pytest.mark.parametrize(("task", "head"), [("det", "retinanet"), ("seg", "semantic_fpn")])
def test_the_plan_of_a_dense_task_names_its_head_and_nothing_of_other_tasks(task, head):
    config = load_config(CONFIG_DIR / "_base_" / f"smoke_{task}.yaml")
    plan = plan_of(config)
    facts, text = plan.facts, plan.to_text()
    own = config.AUG.DETECTION if task == "det" else config.AUG.SEGMENTATION
    assert facts["augmentation"] == dict(
        hflip=0.5, **{name.lower(): value for name, value in own.items()}
    )
    assert facts["head"]["type"] == head
    assert facts["head"]["fpn_channels"] == 16
    assert "objective" not in facts
    assert set(facts["regularisation"]) == {"drop_rate", "drop_path_rate"}
    for other in ("cross_entropy", "label_smoothing", "mixup", "token_labels"):
        assert other not in text
    assert ("short_sides" in text, "max_class_share" in text) == (task == "det", task == "seg")


@pytest.mark.parametrize("file", ["smoke_cls", "smoke_det", "smoke_seg"])
def test_a_plan_has_a_line_per_section(file):
    """Trap: a section within a section is shown over several lines."""
    plan = plan_of(load_config(CONFIG_DIR / "_base_" / f"{file}.yaml"))
    assert plan.to_text().split("\n\n")[0].count("\n") == len(plan.facts) - 1
    assert "retinanet" not in plan.to_text() or file == "smoke_det"


def test_the_files_of_a_plan(tmp_path, caplog):
    opts = ["PLAN.WORLD_SIZE", "2", "TRAIN.WEIGHT_DECAY_END", "0.2"]
    with caplog.at_level(logging.INFO):
        program.main(["--cfg", str(SMOKE), "--plan", "--output", str(tmp_path), "--opts", *opts])
    folder = tmp_path / "smoke_cls" / "default"
    assert not (folder / "checkpoints").exists()
    assert (folder / "plan_lr.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((folder / "plan.json").read_text())
    # 32 images, 2 x 8 of them per step; 2 epochs, 1 of warm-up
    assert facts["steps"] == dict(per_epoch=2, epochs=2, warmup=2, total=4)
    assert facts["batch"]["started"] == 1
    with (folder / "plan_lr.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["epoch"]) for row in rows] == [
        ("0", "0"),
        ("1", "0"),
        ("2", "1"),
        ("3", "1"),
    ]
    base, start, low = 5e-4 / 32, 5e-7 / 32, 5e-6 / 32  # 16 of 512 images per step
    expected = [start, (start + base) / 2, base, (low + base) / 2]
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected)
    decays = [0.2 + (0.05 - 0.2) * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [float(row["weight_decay"]) for row in rows] == pytest.approx(decays)
    assert sum(group["params"] for group in facts["groups"]) == facts["parameters"]["trainable"]
    assert "group  lr factor  weight decay" in caplog.text


def test_training_builds_what_the_plan_says(tmp_path):
    opts = ["OUTPUT", str(tmp_path), "TRAIN.LAYER_DECAY", "0.8", "TRAIN.ACCUMULATION_STEPS", "3"]
    opts += ["TRAIN.LR_MULTIPLIERS", "['head=10']", "TRAIN.WEIGHT_DECAY_END", "0.1"]
    config = load_config(SMOKE, opts)
    plan, run = plan_of(config), TrainingRun(config, ALONE)
    assert plan.groups == summarise_groups(run.optimizer.param_groups, run.model.layer_id)
    schedule = run.schedule
    steps = plan.facts["steps"]
    assert (steps["total"], steps["warmup"]) == (schedule.total_steps, schedule.warmup_steps)
    assert steps["per_epoch"] == schedule.steps_per_epoch
    assert steps["epochs"] == run.epochs
    for step, epoch, lr, decay in plan.curve():
        schedule.step_update(step)
        first = run.optimizer.param_groups[0]
        assert first["lr"] == lr * first["lr_scale"]
        assert max(group["weight_decay"] for group in run.optimizer.param_groups) == decay
        assert epoch == step // schedule.steps_per_epoch
    # one depth per group: stem, two blocks, the norm, and the head at ten times the rate
    assert all(first == last for first, last in (group.layers for group in plan.groups))
    scales = sorted({group.lr_scale for group in plan.groups})
    assert scales == pytest.approx([0.8**3, 0.8**2, 0.8, 1.0, 10.0])


def test_what_is_frozen_is_in_no_group():
    plan = plan_of(load_config(SMOKE, ["TRAIN.FREEZE", "['backbone']"]))
    head = 32 * 10 + 10
    assert plan.params == head
    assert plan.facts["parameters"]["trainable"] == head
    with torch.device("meta"), SkipInit():
        total = sum(p.numel() for p in build_model(load_config(SMOKE), num_classes=10).parameters())
    assert plan.facts["parameters"]["frozen"] == total - head


def test_processes_that_were_started_count_more_than_assumed_ones():
    config = recipe("swin")
    assert plan_of(config).facts["batch"]["processes"] == 8
    started = plan_of(config, processes=4).facts
    assert (started["batch"]["processes"], started["lr"]["base"]) == (4, pytest.approx(5e-4))
    alone = plan_of(recipe("swin", "PLAN.WORLD_SIZE", "0")).facts
    assert (alone["batch"]["processes"], alone["steps"]["per_epoch"]) == (1, 10_009)


def test_the_images_at_hand_count_more_than_assumed_ones(tmp_path):
    config = load_config(SMOKE, ["PLAN.TRAIN_SIZE", "1000"])
    assert plan_of(config).facts["data"]["images"] == 32
    absent = ["DATA.DATA_PATH", str(tmp_path / "absent")]
    config = recipe("swin", "PLAN.TRAIN_SIZE", "1024", *absent)
    assert plan_of(config).facts["data"]["images"] == 1024
    published = plan_of(recipe("swin", *absent)).facts["data"]
    assert published["images"] == IMAGENET
    assert "not here" in published["source"]
    large = plan_of(recipe("swin", "DATA.DATASET", "imagenet22k", *absent)).facts
    assert large["data"]["images"] == 14_197_087


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DATA.DATASET", "folder"], r"absent.* does not exist.*set PLAN.TRAIN_SIZE"),
        (["PLAN.TRAIN_SIZE", "100"], r"100 images, and one batch needs 1024"),
        (["TRAIN.LR_MULTIPLIERS", "['nothing=2']"], r"'nothing' covers no parameter"),
        (["TRAIN.EPOCHS", "0"], r"nothing to train"),
        (["EVAL_MODE", "True"], r"EVAL_MODE and PLAN_MODE exclude each other"),
    ],
)
def test_what_cannot_be_planned_stops_before_anything_is_written(opts, message, tmp_path, capsys):
    arguments = ["--cfg", str(CONFIG_DIR / "_base_" / "swin.yaml"), "--data-path", "absent"]
    with pytest.raises(SystemExit):
        program.main([*arguments, "--plan", "--output", str(tmp_path / "out"), "--opts", *opts])
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [1, 7, 9000])
def test_a_schedule_of_any_length_is_drawn(steps, tmp_path):
    picture = tmp_path / "new" / "lr.png"
    plot_schedule([(step, 1e-3, 0.05) for step in range(steps)], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_groups_say_which_depths_they_hold():
    parameters = [torch.zeros(2, 3), torch.zeros(4), torch.zeros(5)]
    groups = [
        dict(
            params=parameters[:2], param_names=["stem.w", "head.b"], lr_scale=1.0, weight_decay=0.1
        ),
        dict(params=parameters[2:], param_names=["head.w"], lr_scale=2.0, weight_decay=0.0),
    ]
    found = summarise_groups(groups, {"stem.w": 0, "head.b": 4, "head.w": 4}.get)
    assert found == [Group(1.0, 0.1, (0, 4), 2, 10), Group(2.0, 0.0, (4, 4), 1, 5)]
