"""Recipes train; every published figure has a file that names it and leads to its recipe."""

import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import main as program
from config import load_config, output_dir
from logger import MetricsWriter
from models import CONFIG_DIR, list_models, registry, variant_file
from modes import check
from modes.build import load_weights
from modes.training import TrainingRun
from tests.golden_tools import SkipInit
from tests.processes import interrupted_after_saving
from tests.small_models import SMALL
from utils.distributed import Runtime

ALONE = Runtime(0, 1, 0, torch.device("cpu"))
SMOKE = str(CONFIG_DIR / "_base_" / "smoke_cls.yaml")

# Recipes of detection and segmentation: tests/test_dense_configs.py.
DENSE = {"dense"} | {
    path.stem
    for path in (CONFIG_DIR / "_base_").glob("*.yaml")
    if load_config(path).TASK != "classification"
}

# Which small model stands for the one that a recipe is for.
RECIPES = {
    "deit": "deit",
    "dilateformer": "dilateformer",
    "dfvt": "dfvt",
    "dhvt_cifar": "dhvt",
    "dhvt_domainnet": "dhvt",
    "dhvt_imagenet": "dhvt",
    "dhvt_finetune": "dhvt",
    "evit": "evit",
    "evit_finetune": "evit",
    "vtpack": "deit_dge",
    "dfformer": "dfformer",
    "swin": "swin",
    "linear_probe": "deit",
}

# Top-1 (%) of the systems' papers and READMEs, by the file that trains for it.
FIGURES = {
    "dilateformer/dilateformer_tiny": "82.1",
    "dilateformer/dilateformer_small": "83.3",
    "dilateformer/dilateformer_small_token_labelling": "83.9",
    "dilateformer/dilateformer_base_token_labelling": "84.9",
    "dilateformer/dilateformer_base_token_labelling_384": "85.6",
    "dfvt/dfvt_tiny": "72.95",
    "dfvt/dfvt_small": "78.29",
    "dfvt/dfvt_base": "81.98",
    "dhvt/dhvt_tiny_imagenet_patch16": "77.6",
    "dhvt/dhvt_small_imagenet_patch16": "82.3",
    "dhvt/dhvt_tiny_cifar_patch4": "80.93",
    "dhvt/dhvt_small_cifar_patch4": "82.91",
    "dhvt/dhvt_tiny_cifar_patch2": "83.54",
    "dhvt/dhvt_small_cifar_patch2": "85.68",
    "dhvt/dhvt_tiny_clipart": "71.73",
    "dhvt/dhvt_tiny_painting": "63.34",
    "dhvt/dhvt_tiny_sketch": "66.60",
    "dhvt/dhvt_small_clipart": "73.89",
    "dhvt/dhvt_small_painting": "66.08",
    "dhvt/dhvt_small_sketch": "68.72",
    "evit/evit_small_r09_fuse": "79.8",
    "evit/evit_small_r08_fuse": "79.8",
    "evit/evit_small_r07_fuse": "79.5",
    "evit/evit_small_r06_fuse": "78.9",
    "evit/evit_small_r05_fuse": "78.5",
    "evit/evit_small_r09_drop": "79.9",
    "evit/evit_small_r08_drop": "79.7",
    "evit/evit_small_r07_drop": "79.4",
    "evit/evit_small_r06_drop": "79.1",
    "evit/evit_small_r05_drop": "78.4",
    "deit/deit_tiny_patch16_224": "72.2",
    "deit/deit_small_patch16_224": "79.9",
    "deit/deit_base_patch16_224": "81.8",
    "deit/deit_tiny_distilled_patch16_224": "74.5",
    "deit/deit_small_distilled_patch16_224": "81.2",
    "deit/deit_base_distilled_patch16_224": "83.4",
    "deit/deit_base_patch16_384": "82.9",
    "deit/deit_base_distilled_patch16_384": "85.2",
    "deit/deit_tiny_patch16_256": "73.2",
    "deit/deit_small_patch16_256": "80.6",
    "dge/deit_dge_s124_tiny_patch16_256": "73.2",
    "dge/deit_dge_s124_small_patch16_256": "80.1",
    "swin/swin_tiny_patch4_window7_224": "81.2",
    "swin/swin_small_patch4_window7_224": "83.2",
    "swin/swin_base_patch4_window7_224": "83.5",
    "swin/swin_base_patch4_window12_384_finetune": "84.5",
    "swin/swin_base_patch4_window7_224_22kto1k_finetune": "85.2",
    "swin/swin_base_patch4_window12_384_22kto1k_finetune": "86.4",
    "swin/swin_large_patch4_window7_224_22kto1k_finetune": "86.3",
    "swin/swin_large_patch4_window12_384_22kto1k_finetune": "87.3",
    "swin/swin_tiny_c24_patch4_window8_256": "81.6",
    "swin/swin_mlp_tiny_c24_patch4_window8_256": "79.4",
    "swin/swin_mlp_tiny_c12_patch4_window8_256": "79.6",
    "swin/swin_mlp_tiny_c6_patch4_window8_256": "79.7",
    "swin/swin_mlp_base_patch4_window7_224": "81.3",
}
EXPERIMENTS = sorted(p for p in CONFIG_DIR.glob("[!_]*/*.yaml") if p.parent.name != "lab")


def small(name: str) -> list[str]:
    """Options that make a recipe's model small and its data random."""
    variant, keywords = SMALL[RECIPES[name]]
    config = load_config(variant_file(variant))
    keys = registry.find(config.MODEL.TYPE).keys
    opts = [text for word, value in keywords.items() for text in (keys[word], value)]
    data = dict(DATASET="synthetic", BATCH_SIZE=4, NUM_WORKERS=0)
    opts += [text for key, value in data.items() for text in (f"DATA.{key}", value)]
    opts += ["MODEL.TYPE", config.MODEL.TYPE, "MODEL.NAME", name, "MODEL.NUM_CLASSES", "None"]
    opts += ["DATA.SYNTHETIC.TRAIN_SIZE", 8, "DATA.SYNTHETIC.VAL_SIZE", 6, "TRAIN.MAX_STEPS", 2]
    return opts


def a_run(name: str, folder: Path, *opts) -> TrainingRun:
    path = CONFIG_DIR / "_base_" / f"{name}.yaml"
    config = load_config(path, [*small(name), "OUTPUT", str(folder), *opts])
    check(config, ALONE)
    return TrainingRun(config, ALONE)


def two_steps(run: TrainingRun) -> int:
    with MetricsWriter(run.folder, 0) as writer:
        return run.run_epoch(run.model, writer, 0, 0, 0)


def parents(path: Path) -> list[str]:
    """Stems of all BASE files, the nearest first."""
    bases = (yaml.safe_load(path.read_text()) or {}).get("BASE") or []
    return [stem for base in bases for stem in (Path(base).stem, *parents(path.parent / base))]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_two_steps(name, tmp_path):
    run = a_run(name, tmp_path)
    trained = {key: p for key, p in run.model.named_parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in trained.items()}
    assert two_steps(run) == 2
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(math.isfinite(record["loss"]) for record in records)
    assert records[-1]["kind"] == "eval"
    same = [key for key, p in trained.items() if torch.equal(p, before[key])]
    # The first rates of a warm-up, 1e-8 here, do not move every weight of a norm in float32, which is 1.
    assert len(same) < 0.2 * len(before)
    state = torch.load(run.folder / "checkpoints" / "last.pth", weights_only=True)
    assert (state["ema"] is not None) is (name == "dilateformer")


def test_every_recipe_is_tested():
    stems = {path.stem for path in (CONFIG_DIR / "_base_").glob("*.yaml")} - DENSE
    assert {stem for stem in stems if not stem.startswith("smoke")} == {*RECIPES, "common"}


@pytest.mark.parametrize("file", FIGURES)
def test_a_published_figure_has_a_file_that_names_it(file):
    path = CONFIG_DIR / f"{file}.yaml"
    text = path.read_text()
    header = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    assert f"Expected: {FIGURES[file]} % top-1" in header
    assert re.search(r"\((README(_deit\.md)? of github\.com/|arXiv:)", header)
    assert f"--cfg configs/{file}.yaml" in header
    documented = (CONFIG_DIR.parent / "docs" / "reproducing.md").read_text()
    assert re.search(rf"\| {FIGURES[file]}[^|]*\| `{re.escape(file)}.yaml`", documented)


@pytest.mark.parametrize("file", FIGURES)
def test_a_published_training_would_start(file):
    path = CONFIG_DIR / f"{file}.yaml"
    classes = load_config(path).MODEL.NUM_CLASSES or 1000
    opts = ["DATA.DATASET", "synthetic", "DATA.SYNTHETIC.NUM_CLASSES", classes]
    with SkipInit():
        check(load_config(path, opts), ALONE)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_leads_to_its_recipe(path):
    found = [stem for stem in parents(path) if stem in RECIPES]
    assert found
    family = {"dpvt": "vtpack", "pvt": "vtpack", "dge": "vtpack", "deit": "deit"}
    expected = family.get(path.parent.name, path.parent.name)
    if path.stem.startswith("deit_") and path.stem.endswith("_256"):
        expected = "vtpack"
    assert found[0].startswith(expected)


def test_an_experiment_is_no_variant_and_has_a_folder_of_its_own():
    """Files that share a model share its name, and differ by TAG."""
    named = {
        path.stem
        for path in CONFIG_DIR.glob("[!_]*/*.yaml")
        if f"NAME: {path.stem}\n" in path.read_text()
    }
    assert set(list_models()) == named
    assert not named & {"dhvt_tiny_clipart", "evit_small_r07_fuse_finetune"}
    assert len(EXPERIMENTS) > len([p for p in EXPERIMENTS if p.stem in named])
    configs = [load_config(path) for path in EXPERIMENTS]
    folders = [output_dir(config) for config in configs]
    assert len(set(folders)) == len(folders)
    assert {config.MODEL.NAME for config in configs} <= named


@pytest.mark.parametrize("name", ["dhvt_finetune", "evit_finetune"])
def test_fine_tuning_is_in_train_mode(name, tmp_path):
    """Trap: the lineage fine-tunes in eval mode, without drop path and with frozen batch statistics."""
    start = a_run(name, tmp_path / "a", "TRAIN.MAX_STEPS", "1")
    start.run()
    weights = tmp_path / "a" / name / "default" / "checkpoints" / "last.pth"
    run = a_run(name, tmp_path / "b", "MODEL.PRETRAINED", str(weights))
    assert run.source.kind == "pretrained"
    load_weights(run.config, run.model, run.source)
    modes = []
    run.model.register_forward_pre_hook(
        lambda model, _: modes.append(all(part.training for part in model.modules()))
    )
    norms = [m for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
    means = [norm.running_mean.clone() for norm in norms]
    two_steps(run)
    assert modes[:2] == [True, True]
    assert all(not torch.equal(n.running_mean, m) for n, m in zip(norms, means, strict=True))
    assert bool(norms) is (name == "dhvt_finetune")


def test_an_average_may_be_kept_without_being_scored(tmp_path, monkeypatch):
    """As in DeiT's program: best.pth holds it, and the figures are those of the trained weights."""
    monkeypatch.chdir(tmp_path)
    opts = ["TRAIN.EMA.ENABLE", "True", "TRAIN.EMA.DECAY", "0.9", "TRAIN.EMA.EVALUATE", "False"]
    arguments = ["--cfg", SMOKE, "--output", "out"]
    program.main([*arguments, "--opts", *opts])
    folder = Path("out/smoke_cls/default")
    last = str(folder / "checkpoints" / "last.pth")
    state = torch.load(last, weights_only=True)
    assert any(not torch.equal(state["model"][key], state["ema"][key]) for key in state["model"])
    losses = []
    for scored in ("False", "True"):
        program.main([*arguments, "--eval", "--resume", last, "--opts", *opts[:-1], scored])
        losses.append(json.loads((folder / "eval.json").read_text())["loss"])
    assert losses[0] == pytest.approx(state["metrics"]["loss"], abs=1e-6)
    assert losses[1] != pytest.approx(losses[0], abs=1e-5)


def test_a_scheduled_weight_decay_is_logged_and_exact_after_resuming(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    arguments = ["--cfg", SMOKE, "--opts", "TRAIN.WEIGHT_DECAY_END", "0.5", "TRAIN.BASE_LR", "0.05"]
    program.main([*arguments, "OUTPUT", "whole"])
    with interrupted_after_saving(step=3):
        program.main([*arguments, "OUTPUT", "cut", "SAVE_STEPS", "3"])
    with caplog.at_level(logging.WARNING):
        program.main([*arguments, "OUTPUT", "cut", "SAVE_STEPS", "3"])
    assert "taken from the config" not in caplog.text
    whole, cut = (
        torch.load(f"{name}/smoke_cls/default/checkpoints/last.pth", weights_only=True)
        for name in ("whole", "cut")
    )
    assert all(torch.equal(whole["model"][key], cut["model"][key]) for key in whole["model"])
    lines = Path("cut/smoke_cls/default/metrics.jsonl").read_text().splitlines()
    logged = {r["step"]: r["weight_decay"] for r in map(json.loads, lines) if r["kind"] == "train"}
    # 8 steps; a record has the number of the steps done, and the decay of the last of them
    expected = {
        step + 1: 0.5 + (0.05 - 0.5) * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)
    }
    assert logged == pytest.approx(expected)


def test_the_linear_probe_trains_alike_whatever_recipe_comes_before_it(tmp_path):
    probe, trainings = tmp_path / "probe.yaml", {}
    for variant in (
        "deit/deit_small_patch16_224", "dfformer/dfformer_s18", "dilateformer/dilateformer_tiny",
        "dfvt/dfvt_tiny", "dhvt/dhvt_tiny_cifar_patch4", "swin/swin_tiny_patch4_window7_224",
        "evit/evit_small_r07_fuse", "dge/deit_dge_s124_small_patch16_256",
    ):  # fmt: skip
        files = [str(CONFIG_DIR / f"{name}.yaml") for name in (variant, "_base_/linear_probe")]
        probe.write_text(f"BASE: {files}\n")
        config = load_config(probe)
        assert not config.TRAIN.EMA.ENABLE
        assert config.MODEL.EVIT.SHRINK_EPOCHS == 0
        config.defrost()
        del config.TRAIN["EMA"]  # what is off may differ
        trainings[variant] = (config.TRAIN, config.AUG, config.MODEL.DROP_PATH_RATE)
    for variant, training in trainings.items():
        assert training == trainings["deit/deit_small_patch16_224"], variant


def test_commands_in_headers_are_whole():
    for path in CONFIG_DIR.rglob("*.yaml"):
        assert "# \\" not in path.read_text().splitlines(), path
