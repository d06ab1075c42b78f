"""Dense recipes say what was published, leave nothing of a classification recipe, and train every head."""

import json
import math
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
import yaml
from torch import nn

import main as program
from config import all_keys, load_config, output_dir
from logger import MetricsWriter
from lr_scheduler import build_scheduler
from models import CONFIG_DIR, build_model, list_models, registry, variant_file
from models.heads import DenseModel, head_entries
from modes import check
from modes.build import check_batch_norm
from modes.results import throughput_size
from modes.training import TrainingRun
from optimizer import build_optimizer
from tests.golden_tools import SkipInit
from tests.small_models import SMALL
from utils.distributed import Runtime
from utils.names import leaves

ALONE = Runtime(0, 1, 0, torch.device("cpu"))
BASE = CONFIG_DIR / "_base_"
DETR_SIDES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]

DETECTION = {
    "TASK": "detection",
    "DATA.DATASET": "coco",
    "DATA.SIZE_DIVISOR": 32,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.BASE_LR": 1e-4,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.EPOCHS": 12,
    "TRAIN.MAX_STEPS": 0,
    "TRAIN.LR_SCHEDULER.NAME": "multistep",
    "TRAIN.LR_SCHEDULER.MULTISTEPS": [8, 11],
    "TRAIN.WARMUP_STEPS": 500,
    "TRAIN.WARMUP_LR": 1e-7,
    "AUG.HFLIP": 0.5,
    "AUG.DETECTION.LONG_SIDE": 1333,
    "TEST.DETECTION.SHORT_SIDE": 800,
    "TEST.DETECTION.LONG_SIDE": 1333,
}
ONE_SCALE = {"AUG.DETECTION.SHORT_SIDES": [800], "AUG.DETECTION.CROP": False}
SCALES = {
    "AUG.DETECTION.SHORT_SIDES": DETR_SIDES,
    "AUG.DETECTION.CROP": True,
    "AUG.DETECTION.CROP_SHORT_SIDES": [400, 500, 600],
    "AUG.DETECTION.CROP_SIDES": [384, 600],
}
MASK_RCNN = DETECTION | {
    "MODEL.HEAD.TYPE": "mask_rcnn",
    "MODEL.HEAD.MASK_RCNN.FPN_CHANNELS": 256,
    "MODEL.HEAD.MASK_RCNN.NUM_MAPS": 4,
    "MODEL.HEAD.MASK_RCNN.EXTRA_LEVELS": "pool",
    "MODEL.HEAD.MASK_RCNN.ANCHOR_SCALE": 8.0,
    "MODEL.HEAD.MASK_RCNN.ROI_SIZE": 7,
    "MODEL.HEAD.MASK_RCNN.ROI_SAMPLING": 0,
    "MODEL.HEAD.MASK_RCNN.FC_DIM": 1024,
}
SEGMENTATION = {
    "TASK": "segmentation",
    "DATA.DATASET": "ade20k",
    "DATA.ADE20K.REDUCE_ZERO_LABEL": True,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.LR_SCHEDULER.NAME": "poly",
    "TRAIN.MIN_LR": 0.0,
    "TRAIN.SYNC_BN": True,
    "AUG.HFLIP": 0.5,
    "AUG.SEGMENTATION.RESIZE": [2048, 512],
    "AUG.SEGMENTATION.RATIOS": [0.5, 2.0],
    "AUG.SEGMENTATION.CROP": [512, 512],
    "AUG.SEGMENTATION.MAX_CLASS_SHARE": 0.75,
    "AUG.SEGMENTATION.PHOTOMETRIC": True,
    "TEST.SEGMENTATION.RESIZE": [2048, 512],
    "TEST.SEGMENTATION.MODE": "whole",
}
# What the papers and their programs say: the images of one step, and the keys.
PUBLISHED = {
    "retinanet_1x_coco": (
        16,
        DETECTION
        | ONE_SCALE
        | {
            "MODEL.HEAD.TYPE": "retinanet",
            "MODEL.HEAD.RETINANET.FPN_CHANNELS": 256,
            "MODEL.HEAD.RETINANET.NUM_MAPS": 3,
            "MODEL.HEAD.RETINANET.EXTRA_LEVELS": "convs",
            "MODEL.HEAD.RETINANET.SCALES_PER_OCTAVE": 3,
            "MODEL.HEAD.RETINANET.ANCHOR_SCALE": 4.0,
            "MODEL.HEAD.RETINANET.ANCHOR_RATIOS": [0.5, 1.0, 2.0],
            "MODEL.HEAD.RETINANET.NUM_CONVS": 4,
            "MODEL.HEAD.RETINANET.FOCAL_GAMMA": 2.0,
            "MODEL.HEAD.RETINANET.FOCAL_ALPHA": 0.25,
            "MODEL.HEAD.RETINANET.POSITIVE_IOU": 0.5,
            "MODEL.HEAD.RETINANET.NEGATIVE_IOU": 0.4,
            "MODEL.HEAD.RETINANET.SCORE_THRESHOLD": 0.05,
            "MODEL.HEAD.RETINANET.NMS_THRESHOLD": 0.5,
            "MODEL.HEAD.RETINANET.DETECTIONS_PER_IMAGE": 100,
        },
    ),
    "mask_rcnn_1x_coco": (16, MASK_RCNN | ONE_SCALE | {"MODEL.HEAD.MASK_RCNN.SOFT_NMS": "none"}),
    "mask_rcnn_ms_1x_coco": (
        16,
        MASK_RCNN | SCALES | {"MODEL.HEAD.MASK_RCNN.SOFT_NMS": "linear"},
    ),
    "cascade_mask_rcnn_ms_3x_coco": (
        16,
        DETECTION
        | SCALES
        | {
            "MODEL.HEAD.TYPE": "cascade_mask_rcnn",
            "TRAIN.EPOCHS": 36,
            "TRAIN.LR_SCHEDULER.MULTISTEPS": [27, 33],
        },
    ),
    "semantic_fpn_40k_ade20k": (
        32,
        SEGMENTATION
        | {
            "MODEL.HEAD.TYPE": "semantic_fpn",
            "MODEL.HEAD.SEMANTIC_FPN.FPN_CHANNELS": 256,
            "MODEL.HEAD.SEMANTIC_FPN.CHANNELS": 128,
            "MODEL.HEAD.SEMANTIC_FPN.DROPOUT": 0.1,
            "TRAIN.BASE_LR": 2e-4,
            "TRAIN.WEIGHT_DECAY": 1e-4,
            "TRAIN.LR_SCHEDULER.POWER": 0.9,
            "TRAIN.MAX_STEPS": 40_000,
            "TRAIN.WARMUP_STEPS": 0,
            "TRAIN.WARMUP_EPOCHS": 0,
        },
    ),
    "upernet_160k_ade20k": (
        16,
        SEGMENTATION
        | {
            "MODEL.HEAD.TYPE": "upernet",
            "MODEL.HEAD.UPERNET.AUX_STAGE": 3,
            "MODEL.HEAD.UPERNET.AUX_WEIGHT": 0.4,
            "TRAIN.BASE_LR": 6e-5,
            "TRAIN.WEIGHT_DECAY": 0.01,
            "TRAIN.LR_SCHEDULER.POWER": 1.0,
            "TRAIN.MAX_STEPS": 160_000,
            "TRAIN.WARMUP_STEPS": 1500,
        },
    ),
}
# Box and mask AP on COCO, and mIoU on ADE20K, by the file that trains for it.
FIGURES = {
    "dfvt/dfvt_tiny_mask_rcnn": "34.8 box AP, 32.6 mask AP",
    "dfvt/dfvt_small_mask_rcnn": "39.2 box AP, 36.3 mask AP",
    "dfvt/dfvt_base_mask_rcnn": "43.4 box AP, 39.0 mask AP",
    "dfformer/cdfformer_m36_semantic_fpn": "48.6 mIoU",
    "swin/swin_tiny_patch4_window7_224_upernet": "44.51 mIoU",
}
# Published parameters, in millions. Ours are 23.8, 31.1 and 57.4.
PARAMETERS = {"dfvt_tiny_mask_rcnn": 25, "dfvt_small_mask_rcnn": 32, "dfvt_base_mask_rcnn": 58}
LINES = ("deit", "dfformer", "dfvt", "dge", "dhvt", "dilateformer", "dpvt", "pvt", "swin")


@cache
def read(path):
    """Content of a YAML file."""
    return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


@cache
def bases_of(path):
    """All BASE files of a file, and theirs."""
    bases = [(path.parent / base).resolve() for base in read(path).get("BASE") or []]
    return [file for base in bases for file in (base, *bases_of(base))]


def is_dense(path):
    return BASE / "dense.yaml" in (path, *bases_of(path))


FAMILY_FILES = sorted(
    path for path in CONFIG_DIR.glob("[!_]*/*.yaml") if is_dense(path) and path.parent.name != "lab"
)
# A variant's own: its architecture, and how it drops paths.
OF_THE_VARIANT = {"MODEL.TYPE", "MODEL.NAME", "MODEL.DROP_PATH_RATE", "TAG"}


def keys_set_by(path):
    """All keys that a file and its BASE files set."""
    files = (path, *bases_of(path))
    return {key for file in files for key, _ in leaves(read(file)) if key != "BASE"}


@cache
def keys_of_classification():
    """Every key that a variant, its recipe or another experiment sets -> one of the files."""
    return {
        key: path.stem
        for path in CONFIG_DIR.glob("*/*.yaml")
        if not is_dense(path) and path.parent.name != "lab" and not path.stem.startswith("smoke")
        for key, _ in leaves(read(path))
        if key != "BASE"
    }


def is_the_architectures(key):
    node = key.split(".")[1] if key.startswith("MODEL.") else ""
    return node in {entry.node for entry in registry.entries()}


def is_a_formats(key):
    """Options of a data set, which nothing reads beside another one."""
    return key.startswith("DATA.") and key.count(".") == 2


def with_base(tmp_path, *bases):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"BASE": [str(base) for base in bases]}))
    return path


def build_on_meta(config):
    classes = {"coco": 80, "ade20k": 150}[config.DATA.DATASET]
    with torch.device("meta"), SkipInit():
        return build_model(config, num_classes=classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_one(name):
    config = load_config(BASE / f"{name}.yaml")
    images, expected = PUBLISHED[name]
    found = dict(leaves(config))
    assert {key: found[key] for key in expected} == expected
    step = config.DATA.BATCH_SIZE * config.PLAN.WORLD_SIZE * config.TRAIN.ACCUMULATION_STEPS
    assert step == images
    assert config.TRAIN.LR_SCALING == "none"


@pytest.mark.parametrize("file", ["dfformer/dfformer_s18_retinanet", "_base_/mask_rcnn_1x_coco"])
def test_detectors_are_timed_at_one_size_whatever_their_tables_are_stored_for(file):
    assert throughput_size(load_config(CONFIG_DIR / f"{file}.yaml")) == (800, 1333)


def test_every_dense_recipe_is_in_the_table():
    found = {path.stem for path in BASE.glob("*.yaml") if is_dense(path)}
    assert {stem for stem in found if not stem.startswith("smoke")} == {*PUBLISHED, "dense"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_of_a_classification_recipe_is_left(name):
    """A dense recipe comes after the variant, so it must set whatever a variant's recipe may have set."""
    others = keys_of_classification()
    left = others.keys() - keys_set_by(BASE / f"{name}.yaml") - OF_THE_VARIANT
    left = {key for key in left if not (is_the_architectures(key) or is_a_formats(key))}
    assert not left, {key: others[key] for key in left}
    assert {"TRAIN.EMA.ENABLE", "AUG.MIXUP", "TRAIN.WARMUP_LR", "TRAIN.LR_SCALING"} <= others.keys()


@pytest.mark.parametrize("name", ["retinanet_1x_coco", "upernet_160k_ade20k"])
@pytest.mark.parametrize(
    "before",
    [
        "dilateformer/dilateformer_base_token_labelling.yaml",  # average, token labels
        "evit/evit_small_r07_fuse_finetune.yaml",
        "dhvt/dhvt_small_clipart.yaml",  # 345 classes, a data set of its own
        "swin/swin_base_patch4_window7_224_22kto1k_finetune.yaml",
        "_base_/linear_probe.yaml",  # frozen
    ],
)
def test_training_does_not_depend_on_what_stood_before(name, before, tmp_path):
    recipe = BASE / f"{name}.yaml"
    own = dict(leaves(load_config(with_base(tmp_path, recipe))))
    both = load_config(with_base(tmp_path, CONFIG_DIR / before, recipe))
    differing = {
        key for key, entry in leaves(both) if entry != own[key] and not is_the_architectures(key)
    }
    assert differing <= OF_THE_VARIANT | {"DATA.DOMAINNET.DOMAINS"}


def rates(name, steps_per_epoch, world_size):
    config = load_config(BASE / f"{name}.yaml")
    optimizer = build_optimizer(config, nn.Linear(2, 2), world_size)
    schedule = build_scheduler(config, optimizer, steps_per_epoch, world_size)
    return schedule, schedule.lr_at


def test_the_rate_of_detection_follows_the_published_steps():
    schedule, rate = rates("retinanet_1x_coco", 7330, 8)
    assert schedule.total_steps == 12 * 7330
    expected = {
        0: 1e-7,
        250: (1e-4 + 1e-7) / 2,
        500: 1e-4,
        8 * 7330 - 1: 1e-4,
        8 * 7330: 1e-5,
        11 * 7330 - 1: 1e-5,
        11 * 7330: 1e-6,
    }
    assert {step: rate(step) for step in expected} == pytest.approx(expected, rel=1e-6)


def test_the_rates_of_segmentation_follow_their_powers():
    schedule, rate = rates("semantic_fpn_40k_ade20k", 631, 8)
    assert schedule.total_steps == 40_000
    assert [rate(step) for step in (0, 10_000, 39_999)] == pytest.approx(
        [2e-4, 2e-4 * 0.75**0.9, 2e-4 * (1 / 40_000) ** 0.9]
    )
    schedule, rate = rates("upernet_160k_ade20k", 1263, 8)
    assert schedule.total_steps == 160_000
    assert [rate(step) for step in (0, 750, 80_000)] == pytest.approx(
        [6e-11, (6e-5 + 6e-11) / 2, 3e-5], rel=1e-6
    )


@pytest.mark.parametrize("path", FAMILY_FILES, ids=lambda path: path.stem)
def test_an_experiment_trains_as_its_recipe_says(path):
    (recipe,) = [base for base in read(path)["BASE"] if "_base_" in base]
    config, alone = load_config(path), load_config(path.parent / recipe)
    own = dict(leaves(alone))
    differing = {
        key: entry
        for key, entry in leaves(config)
        if entry != own[key] and not is_the_architectures(key)
    }
    # DFFormer's filters are stored for a square; DFvT suppresses softly in its base model only.
    allowed = OF_THE_VARIANT | {"DATA.IMG_SIZE", "MODEL.HEAD.MASK_RCNN.SOFT_NMS"}
    assert differing.keys() <= allowed
    assert config.DATA.IMG_SIZE in (alone.DATA.IMG_SIZE, [800, 800])
    assert throughput_size(config) == throughput_size(alone)
    assert config.MODEL.NAME in list_models()
    assert config.TAG == config.MODEL.HEAD.TYPE
    assert output_dir(config).parts[-2:] == (config.MODEL.NAME, config.TAG)


@pytest.mark.parametrize("path", FAMILY_FILES, ids=lambda path: path.stem)
def test_an_experiment_builds_and_its_header_starts_it(path):
    config = load_config(path)
    model = build_on_meta(config)
    assert isinstance(model, DenseModel)
    assert (model.task, config.TASK) == (config.TASK, model.task)
    assert model.num_classes == {"detection": 80, "segmentation": 150}[config.TASK]
    build_optimizer(config, model, world_size=8)
    if path.stem in PARAMETERS:
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert count == pytest.approx(PARAMETERS[path.stem], abs=1.3)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.strip("# ") for line in header)
    file = f"{path.parent.name}/{path.stem}"
    assert f"Expected: {FIGURES.get(file, '- (no figure recorded)')}" in text
    assert f"--nproc_per_node {config.PLAN.WORLD_SIZE} main.py --cfg configs/{file}.yaml" in text
    assert f"--pretrained {config.MODEL.NAME}.pth" in text
    assert max(map(len, header)) <= 110


@pytest.mark.parametrize("file", FIGURES)
def test_a_published_figure_is_documented(file):
    text = (CONFIG_DIR / f"{file}.yaml").read_text()
    assert re.search(r"\((readme\.md\s+(# )?of github\.com/|README of github\.com/|arXiv:)", text)
    documented = (CONFIG_DIR.parent / "docs" / "reproducing.md").read_text()
    assert re.search(rf"\| {FIGURES[file]} \| `{re.escape(file)}.yaml`", documented)


def test_every_line_of_work_can_be_compared():
    for head in ("retinanet", "semantic_fpn"):
        found = {path.parent.name for path in FAMILY_FILES if path.stem.endswith(f"_{head}")}
        assert found == set(LINES)
    names = {path.stem.removesuffix("_retinanet") for path in FAMILY_FILES}
    assert {"dfformer_s18", "cdfformer_s18"} <= names


@pytest.mark.parametrize("name", ["retinanet_1x_coco", "upernet_160k_ade20k"])
def test_evit_is_refused_unless_it_keeps_all_tokens(name, tmp_path):
    path = with_base(tmp_path, variant_file("evit_small_r07_fuse"), BASE / f"{name}.yaml")
    with pytest.raises(ValueError, match="drops tokens"):
        build_on_meta(load_config(path))
    assert build_on_meta(load_config(path, ["MODEL.EVIT.KEEP_RATE", "1.0"])).pyramid is not None


def two_steps(run):
    """Train and evaluate -> what was logged."""
    with MetricsWriter(run.folder, 0) as writer:
        assert run.run_epoch(run.model, writer, 0, 0, 0) == 2
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


# Per head a recipe, the small model that stands for its backbone, and keys that make the head small.
RUNS = {
    "retinanet_1x_coco": ("deit", {"FPN_CHANNELS": 8, "NUM_CONVS": 1}),
    "mask_rcnn_1x_coco": ("pvt", {"FPN_CHANNELS": 8, "FC_DIM": 16}),
    "mask_rcnn_ms_1x_coco": ("dfvt", {"FPN_CHANNELS": 8, "FC_DIM": 16}),
    "cascade_mask_rcnn_ms_3x_coco": ("dilateformer", {"FPN_CHANNELS": 8, "FC_DIM": 16}),
    "semantic_fpn_40k_ade20k": ("cdfformer", {"FPN_CHANNELS": 8, "CHANNELS": 8}),
    "upernet_160k_ade20k": ("swin", {"CHANNELS": 8, "AUX_CHANNELS": 8}),
}
TINY = {
    "DATA.DATASET": "synthetic",
    "DATA.SYNTHETIC.TRAIN_SIZE": 4,
    "DATA.SYNTHETIC.VAL_SIZE": 2,
    "DATA.SYNTHETIC.NUM_CLASSES": 3,
    "DATA.IMG_SIZE": [64, 96],
    "DATA.BATCH_SIZE": 2,
    "DATA.NUM_WORKERS": 0,
    "TRAIN.MAX_STEPS": 2,
    "TRAIN.WARMUP_STEPS": 0,
    "TRAIN.BASE_LR": 1e-3,
    "AUG.DETECTION.SHORT_SIDES": [64, 80],
    "AUG.DETECTION.CROP_SHORT_SIDES": [64],
    "AUG.DETECTION.CROP_SIDES": [40, 64],
    "AUG.SEGMENTATION.RESIZE": [128, 64],
    "AUG.SEGMENTATION.CROP": [64, 64],
    "TEST.DETECTION.SHORT_SIDE": 64,
    "TEST.SEGMENTATION.RESIZE": [128, 64],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_trains_two_steps_and_evaluates(name, tmp_path):
    small, head = RUNS[name]
    variant, keywords = SMALL[small]
    config = load_config(variant_file(variant))
    keys = registry.find(config.MODEL.TYPE).keys
    opts = {keys[word]: entry for word, entry in keywords.items() if word != "img_size"} | TINY
    path = with_base(tmp_path, variant_file(variant), BASE / f"{name}.yaml")
    node = load_config(path).MODEL.HEAD.TYPE.upper()
    opts |= {f"MODEL.HEAD.{node}.{key}": entry for key, entry in head.items()}
    opts["OUTPUT"] = str(tmp_path)
    config = load_config(path, [text for pair in opts.items() for text in pair])
    check(config, ALONE)
    run = TrainingRun(config, ALONE)
    before = {key: p.detach().clone() for key, p in run.model.named_parameters()}
    records = two_steps(run)
    trained = [record for record in records if record["kind"] == "train"]
    assert all(math.isfinite(record["loss"]) for record in trained)
    assert records[-1]["kind"] == "eval"
    assert run.task.metric in records[-1]
    trainable = {key: p for key, p in run.model.named_parameters() if p.requires_grad}
    unused = [key for key, p in trainable.items() if p not in run.optimizer.state]
    assert not unused, "these had no gradient, and would need find_unused_parameters"
    moved = [key for key, p in run.model.named_parameters() if not torch.equal(p, before[key])]
    assert len(moved) > 0.8 * len(before)


def test_one_image_is_too_few_for_upernet_before_anything_is_written(tmp_path, capsys):
    small = [
        *("MODEL.HEAD.TYPE", "upernet", "MODEL.HEAD.UPERNET.CHANNELS", "8"),
        *("MODEL.HEAD.UPERNET.AUX_CHANNELS", "8", "DATA.BATCH_SIZE", "1", "TRAIN.SYNC_BN", "True"),
        *("OUTPUT", str(tmp_path / "out")),
    ]
    file = BASE / "smoke_seg.yaml"
    with pytest.raises(SystemExit):
        program.main(["--cfg", str(file), "--opts", *small])
    words = " ".join(capsys.readouterr().err.split())
    assert "DATA.BATCH_SIZE=1: the batch norms of MODEL.HEAD.TYPE='upernet' need 2 images" in words
    assert not (tmp_path / "out").exists()
    # Two GPUs with one image each share their statistics; two CPUs cannot.
    config = load_config(file, small)
    model = build_model(config, num_classes=4)
    check_batch_norm(config, model, Runtime(0, 2, 0, torch.device("cuda")))
    with pytest.raises(ValueError, match=r"DATA\.BATCH_SIZE=1: .* TRAIN\.SYNC_BN True"):
        check_batch_norm(config, model, Runtime(0, 2, 0, torch.device("cpu")))
    check(load_config(file, [*small, "MODEL.HEAD.UPERNET.POOL_SCALES", "[2, 3]"]), ALONE)


@pytest.mark.parametrize("task", ["det", "seg"])
def test_the_smoke_files_train_evaluate_and_draw(task, tmp_path):
    file = BASE / f"smoke_{task}.yaml"
    opts = ["OUTPUT", str(tmp_path), "TRAIN.MAX_STEPS", "2"]
    run = TrainingRun(load_config(file, opts), ALONE)
    trained = two_steps(run)[-1]
    last = str(run.folder / "checkpoints" / "last.pth")
    program.main(
        ["--cfg", str(file), "--eval", "--resume", last, "--opts", *opts, "TEST.PICTURES", "2"]
    )
    evaluated = json.loads((run.folder / "eval.json").read_text())
    assert evaluated[run.task.metric] == pytest.approx(trained[run.task.metric])
    assert len(list((run.folder / "pictures").iterdir())) == 2
    assert (run.folder / "classes.csv").is_file()


def test_a_head_is_added_by_one_file(tmp_path):
    """The file is that of docs/dense.md, which this keeps true."""
    root = CONFIG_DIR.parent
    skipped = shutil.ignore_patterns(".git", ".venv", "output", "tests", "__pycache__", ".*_cache")
    shutil.copytree(root, tmp_path / "copy", ignore=skipped)
    text = (root / "docs" / "dense.md").read_text()
    ((name, content),) = re.findall(r"### `([^`]+)`\n\n```python\n(.*?)```", text, re.DOTALL)
    assert name == "models/heads/linear.py"
    (tmp_path / "copy" / name).write_text(content)
    (cfg, opts) = re.findall(r"python main\.py --cfg (\S+) --opts (.* linear .*)", text)[0]
    code = f"""
import torch
from config import load_config
from models import build_model

model = build_model(load_config("{cfg}", "{opts}".split()), num_classes=4)
assert model.head.dropout.p == 0.1
mask = torch.randint(4, (64, 64))
losses = model.train()(torch.rand(2, 3, 64, 64), [dict(mask=mask)] * 2)
sum(losses.values()).backward()
unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
assert not unused, unused
assert model.eval()(torch.rand(1, 3, 64, 96)).shape == (1, 4, 2, 3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "copy",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_documentation_lists_every_head_and_key():
    text = (CONFIG_DIR.parent / "docs" / "dense.md").read_text()
    assert set(re.findall(r"`([a-z_]+)`", text)) >= {entry.name for entry in head_entries()}
    known = set(all_keys())
    named = set(re.findall(r"\b((?:DATA|MODEL|TRAIN|AUG|TEST)\.[A-Z0-9_.]*[A-Z0-9])\b", text))
    nodes = {key.rpartition(".")[0] for key in known}
    own = {"MODEL.HEAD.LINEAR.DROPOUT"}
    assert not named - known - nodes - own
    assert re.findall(r"configs/(\w+/\w+\.yaml)", text)
    missing = [
        file
        for file in re.findall(r"configs/(\w+/\w+\.yaml)", text)
        if not (CONFIG_DIR / file).is_file()
    ]
    assert not missing
