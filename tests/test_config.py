"""Config files, overrides and the errors that a user meets before any work starts."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import config as config_module
import optimizer
from config import all_keys, dump, load_config, output_dir
from models import CONFIG_DIR, build_model, registry, variant_file
from models.heads import head_entries
from tests.golden_tools import SkipInit
from utils import config_rules as rules

DFVT_TINY = CONFIG_DIR / "dfvt" / "dfvt_tiny.yaml"
SMOKES = [CONFIG_DIR / "_base_" / f"smoke_{task}.yaml" for task in ("det", "seg")]
EVERY_FILE = sorted(CONFIG_DIR.rglob("*.yaml"))

# Swin's own swin_base_patch4_window7_224.yaml and swin_tiny..._22kto1k_finetune.yaml, as facts.
SWIN_YAML = """
MODEL:
  TYPE: swin
  NAME: swin_base_patch4_window7_224
  DROP_PATH_RATE: 0.5
  SWIN:
    EMBED_DIM: 128
    DEPTHS: [ 2, 2, 18, 2 ]
    NUM_HEADS: [ 4, 8, 16, 32 ]
    WINDOW_SIZE: 7
TRAIN:
  EPOCHS: 30
  WARMUP_EPOCHS: 5
  WEIGHT_DECAY: 1e-8
  BASE_LR: 2e-05
  WARMUP_LR: 2e-08
  MIN_LR: 2e-07
"""

# What distinguishes DFvT's tiny.yaml, small.yaml and base.yaml.
DFVT_YAMLS = {
    "tiny": (48, [1, 1, 2, 1], [3, 6, 12, 24], 4.0, 0.0, 3_967_627),
    "small": (96, [1, 1, 2, 1], [3, 6, 12, 24], 2.0, 0.1, 11_225_485),
    "base": (128, [2, 2, 6, 2], [4, 8, 16, 32], 2.0, 0.2, 37_331_136),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def count(config) -> int:
    # Detectors and segmenters have as many classes as their data, which is not here.
    classes = {} if config.TASK == "classification" else dict(num_classes=80)
    with torch.device("meta"), SkipInit():
        return sum(p.numel() for p in build_model(config, **classes).parameters())


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda p: p.stem)
def test_every_config_file_loads_and_builds(path):
    config = load_config(path)
    assert count(config) > 0
    assert config.is_frozen()


@pytest.mark.parametrize("name", DFVT_YAMLS)
def test_dfvt_yaml_files_parse_and_build_unchanged(name, tmp_path):
    dim, depths, heads, ratio, drop_path, parameters = DFVT_YAMLS[name]
    text = yaml.safe_dump(
        dict(
            MODEL=dict(
                TYPE="DFvT",
                NAME=name,
                DROP_PATH_RATE=drop_path,
                DFvT=dict(
                    EMBED_DIM=dim, DEPTHS=depths, NUM_HEADS=heads, WINDOW_SIZE=7, MLP_RATIO=ratio
                ),
            ),
            TRAIN=dict(ACCUMULATION_STEPS=0),
        )
    )
    config = load_config(write(tmp_path / f"{name}.yaml", text))
    assert count(config) == parameters
    assert output_dir(config) == Path("output") / name / "default"


def test_swin_yaml_file_parses_and_builds_unchanged(tmp_path):
    config = load_config(write(tmp_path / "swin.yaml", SWIN_YAML))
    assert count(config) == 87_768_224
    assert pytest.approx(2e-5) == config.TRAIN.BASE_LR
    assert pytest.approx(1e-8) == config.TRAIN.WEIGHT_DECAY


def test_a_dump_of_swin_with_all_its_sections_parses(tmp_path, caplog):
    text = SWIN_YAML + "ENABLE_AMP: false\nFUSED_LAYERNORM: true\nLOCAL_RANK: 0\n"
    tree = yaml.safe_load(text)
    tree["MODEL"]["SWIN_MOE"] = dict(NUM_LOCAL_EXPERTS=1, MOE_BLOCKS=[[-1], [-1]])
    tree["MODEL"]["SIMMIM"] = dict(NORM_TARGET=dict(ENABLE=False, PATCH_SIZE=47))
    tree["MODEL"]["SWIN"]["IN_CHANS"] = 3
    tree["DATA"] = dict(MASK_PATCH_SIZE=32, MASK_RATIO=0.6)
    with caplog.at_level(logging.WARNING):
        config = load_config(write(tmp_path / "config.json", yaml.safe_dump(tree)))
    assert config.MODEL.IN_CHANS == 3
    assert [r.getMessage() for r in caplog.records if "FUSED_LAYERNORM" in r.getMessage()]
    assert not [r for r in caplog.records if "MASK_RATIO" in r.getMessage()], (
        "defaults need no warning"
    )


def test_model_type_and_node_match_without_regard_to_case(tmp_path):
    config = load_config(
        write(tmp_path / "a.yaml", "MODEL: {TYPE: DFVT, NAME: x, dfvt: {EMBED_DIM: 48}}")
    )
    assert config.MODEL.DFvT.EMBED_DIM == 48


def test_later_sources_win_base_then_file_then_opts_then_flags(tmp_path):
    write(tmp_path / "grand.yaml", "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 1}\nTAG: grand\nSEED: 1\n")
    write(tmp_path / "one.yaml", "BASE: [grand.yaml]\nTRAIN: {EPOCHS: 2}\n")
    write(tmp_path / "two.yaml", "TRAIN: {WARMUP_EPOCHS: 3}\nTAG: two\n")
    child = write(tmp_path / "child.yaml", "BASE: [one.yaml, two.yaml]\nOUTPUT: here\n")
    config = load_config(child)
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.TAG) == (2, 3, "two")
    assert (config.SEED, config.OUTPUT, config.BASE) == (1, "here", [""])
    config = load_config(child, ["TRAIN.EPOCHS", "4", "TAG", "opts"], {"TAG": "flag"})
    assert (config.TRAIN.EPOCHS, config.TAG) == (4, "flag")


def test_a_file_that_names_an_architecture_and_not_itself_has_its_own_name(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text("MODEL: {TYPE: metaformer}")
    assert load_config(path).MODEL.NAME == "mixed"
    assert load_config(path, ["MODEL.NAME", "other"]).MODEL.NAME == "other"
    path.write_text("MODEL: {DROP_RATE: 0.1}")
    assert load_config(path).MODEL.NAME == "swin_tiny_patch4_window7_224"


LATE = """
import sys
from config import dump, load_config
from models import build_model
from models.registry import register
from models.vit import VisionTransformer

def make(default):
    @register("late", node="LATE")
    class Late(VisionTransformer):
        def __init__(self, *, scale: int = default, **keywords):
            super().__init__(**keywords)
            self.given = scale

make(3)
assert build_model(load_config(sys.argv[1])).given == 3
make(4)  # again, as in a notebook
config = load_config(sys.argv[1])
assert build_model(config).given == 4
assert "SCALE: 4" in dump(config)
"""


def test_an_architecture_may_be_registered_after_the_config_was_imported(tmp_path):
    path = tmp_path / "late.yaml"
    path.write_text("MODEL: {TYPE: late, LATE: {EMBED_DIM: 24, NUM_HEADS: 3, DEPTH: 1}}")
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", LATE, str(path)], check=True, cwd=root)


def test_base_is_found_relative_to_the_file_that_names_it(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "base.yaml", "SEED: 7\n")
    child = write(tmp_path / "deep" / "child.yaml", "BASE: ['../base.yaml']\n")
    assert load_config(child).SEED == 7


def test_base_that_includes_itself_is_an_error(tmp_path):
    write(tmp_path / "a.yaml", "BASE: [b.yaml]\n")
    write(tmp_path / "b.yaml", "BASE: [a.yaml]\n")
    with pytest.raises(ValueError, match="leads back to"):
        load_config(tmp_path / "a.yaml")


def test_missing_file_names_what_is_there(tmp_path):
    write(tmp_path / "tiny.yaml", "SEED: 0\n")
    with pytest.raises(FileNotFoundError, match=r"tinny.yaml does not exist.*tiny"):
        load_config(tmp_path / "tinny.yaml")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.EPOCH", "3"], r"unknown config key TRAIN.EPOCH = '3'.*TRAIN.EPOCHS"),
        (["MODEL.DFvT.EMBED", "3"], r"MODEL.DFvT.EMBED_DIM"),
        (["MODEL.DFvT", "3"], r"MODEL.DFvT is a section, its keys are"),
        (["TRAIN.EPOCHS", "many"], r"TRAIN.EPOCHS='many' .* must be int, not str"),
        (["MODEL.DFvT.DEPTHS", "2"], r"MODEL.DFvT.DEPTHS=2 .* must be list"),
        (["AMP_ENABLE", "1"], r"AMP_ENABLE=1 .* must be bool"),
        (["AMP_DTYPE", "half"], r"AMP_DTYPE='half' must be one of \['auto', 'bf16', 'fp16'\]"),
        (["AMP_DTYPE", "bfloat16"], r"AMP_DTYPE='bfloat16'.*did you mean 'bf16'\?"),
        (["MODEL.TYPE", "dfvit"], r"MODEL.TYPE='dfvit' is not registered.*dfvt"),
        (["MODEL.DROP_PATH_RATE", "1.5"], r"MODEL.DROP_PATH_RATE=1.5 must be within \[0, 1\)"),
        (["DATA.BATCH_SIZE", "[1"], r"DATA.BATCH_SIZE='\[1' .* must be int, not str"),
        (["DATA.STD", "[0, 0, 0]"], r"DATA.STD=\[0.0, 0.0, 0.0\] must be within \(0, inf\)"),
        (["DATA.MEAN", "[123.675]"], r"DATA.MEAN=\[123.675\] must be within"),
        (["DATA.SYNTHETIC.TRAIN_SIZE", "0"], r"DATA.SYNTHETIC.TRAIN_SIZE=0 must be within"),
        (["TRAIN.MIN_LR", "-1"], r"TRAIN.MIN_LR=-1.0 must be within"),
        (["TRAIN.WARMUP_LR", "-1"], r"TRAIN.WARMUP_LR=-1.0 must be within"),
        (["TRAIN.BASE_LR", "float('nan')"], r"TRAIN.BASE_LR=.* must be float"),
        (["TRAIN.BASE_LR", ".nan"], r"TRAIN.BASE_LR=nan must be within"),
        (["TRAIN.WARMUP_STEPS", "-5"], r"TRAIN.WARMUP_STEPS=-5 must be within"),
        (["TRAIN.START_EPOCH", "-1"], r"TRAIN.START_EPOCH=-1 must be within"),
        (["TRAIN.EMA.DECAY", "1.0"], r"TRAIN.EMA.DECAY=1.0 must be within \[0, 1\)"),
        (["TRAIN.OPTIMIZER.BETAS", "[0.9]"], r"OPTIMIZER.BETAS=\[0.9\] must have two entries"),
        (["TRAIN.OPTIMIZER.BETAS", "[0.9, 1]"], r"OPTIMIZER.BETAS=\[0.9, 1.0\] must be within"),
        (["AUG.SCALE", "[0.5]"], r"AUG.SCALE=\[0.5\] must be \[smallest, largest\]"),
        (["AUG.RATIO", "[2, 1]"], r"AUG.RATIO=\[2.0, 1.0\] must be \[smallest, largest\]"),
        (["AUG.CUTMIX_MINMAX", "[0.5, 2]"], r"AUG.CUTMIX_MINMAX=\[0.5, 2.0\] must be within"),
        (["MODEL.DFvT.DEPTHS", "['a', 2]"], r"MODEL.DFvT.DEPTHS=\['a', 2\] .* list of int"),
        (["MODEL.DFvT.DEPTHS", "[2.0, 2]"], r"MODEL.DFvT.DEPTHS=\[2.0, 2\] .* list of int"),
        (["DATA.MEAN", "['a']"], r"DATA.MEAN=\['a'\] .* must be a list of float"),
        (["MODEL.SIMMIM.TYPO", "1"], r"unknown config key MODEL.SIMMIM.TYPO"),
        (
            ["MODEL.DFvT.DEPTHS", "[1, 0, 2, 1]"],
            r"DFvT.DEPTHS=\[1, 0, 2, 1\] must be within \[1, inf\)",
        ),
        (["MODEL.DHVT.DEPTH", "0"], r"MODEL.DHVT.DEPTH=0 must be within \[1, inf\)"),
        (["MODEL.DHVT.EMBED_DIM", "-4"], r"MODEL.DHVT.EMBED_DIM=-4 must be within \[1, inf\)"),
        (["DATA.IMG_SIZE", "[224]"], r"DATA.IMG_SIZE=\[224\] must be"),
        (["DATA.IMG_SIZE", "[1, 2, 3]"], r"DATA.IMG_SIZE=\[1, 2, 3\] must be"),
        (["THROUGHPUT_SIZE", "[800]"], r"THROUGHPUT_SIZE=\[800\] must be"),
        (["THROUGHPUT_SIZE", "[0, 800]"], r"THROUGHPUT_SIZE=\[0, 800\] must be within"),
        (["EVAL_MODE", "True", "INFO_MODE", "True"], r"EVAL_MODE and INFO_MODE exclude"),
        (["TRAIN.LR_SCHEDULER.NAME", "multistep"], r"needs epochs in LR_SCHEDULER.MULTISTEPS"),
        (["AMP_OPT_LEVEL", "O1", "AMP_DTYPE", "bf16"], r"Apex O1 and O2 work in fp16"),
        (["TRAIN.EPOCHS"], r"pairs of KEY VALUE"),
    ],
)
def test_bad_values_stop_with_key_value_and_fix(opts, message):
    with pytest.raises(ValueError, match=message):
        load_config(DFVT_TINY, opts)


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("det", ["RETINANET.FPN_CHANNELS", "0"], r"FPN_CHANNELS=0 must be within \[1, inf\)"),
        ("det", ["RETINANET.NUM_CONVS", "-1"], r"NUM_CONVS=-1 must be within \[0, inf\)"),
        ("det", ["RETINANET.PRIOR", "0"], r"PRIOR=0.0 must be within \(0, 1\)"),
        ("det", ["RETINANET.NMS_THRESHOLD", "5"], r"RETINANET.NMS_THRESHOLD=5.0 must be within"),
        ("det", ["RETINANET.DETECTIONS_PER_IMAGE", "0"], r"DETECTIONS_PER_IMAGE=0 must be within"),
        ("det", ["RETINANET.SCALES_PER_OCTAVE", "0"], r"SCALES_PER_OCTAVE=0 must be within"),
        ("det", ["RETINANET.ANCHOR_RATIOS", "[]"], r"ANCHOR_RATIOS=\[\] must have at least one"),
        (
            "det",
            ["RETINANET.ANCHOR_RATIOS", "[1, 0]"],
            r"ANCHOR_RATIOS=\[1.0, 0.0\] must be within",
        ),
        (
            "det",
            ["MASK_RCNN.RPN_POSITIVE_FRACTION", "2"],
            r"RPN_POSITIVE_FRACTION=2.0 must be within",
        ),
        ("det", ["MASK_RCNN.ROI_BATCH", "0"], r"MASK_RCNN.ROI_BATCH=0 must be within \[1, inf\)"),
        ("det", ["CASCADE_RCNN.FC_DIM", "0"], r"CASCADE_RCNN.FC_DIM=0 must be within \[1, inf\)"),
        ("seg", ["UPERNET.CHANNELS", "0"], r"MODEL.HEAD.UPERNET.CHANNELS=0 must be within"),
        ("seg", ["UPERNET.POOL_SCALES", "[]"], r"POOL_SCALES=\[\] must have at least one entry"),
        ("seg", ["FCN.DROPOUT", "1.5"], r"MODEL.HEAD.FCN.DROPOUT=1.5 must be within \[0, 1\]"),
    ],
)
def test_bad_values_of_heads_stop_with_key_and_value(name, opts, message):
    key, value = opts
    with pytest.raises(ValueError, match=message):
        load_config(CONFIG_DIR / "_base_" / f"smoke_{name}.yaml", [f"MODEL.HEAD.{key}", value])


def test_every_number_of_a_head_has_a_range():
    # How many maps there are is known with the backbone, which the constructors ask.
    free = ("num_maps", "aux_stage")
    missing = [
        entry.keys[name]
        for entry in head_entries()
        for name, field in entry.fields.items()
        if {int, float} & {*field.types, *field.elements} and name not in free
        if entry.keys[name] not in rules.RANGES
    ]
    assert not missing


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("AUG.VFLIP", "0.5", r"AUG.VFLIP=0.5 is for classification.* leave it 0.0"),
        (
            "AUG.CUTMIX_MINMAX",
            "[0.2, 0.8]",
            r"CUTMIX_MINMAX=.* is for classification.* leave it None",
        ),
        ("TRAIN.LOSS", "bce", r"TRAIN.LOSS='bce' is for classification.* leave it 'cross_entropy'"),
        ("DATA.ON_ERROR", "skip", r"DATA.ON_ERROR='skip' is for classification.* leave it 'raise'"),
        ("AUG.MIXUP", "0.8", r"AUG.MIXUP=0.8 is for classification.* set it to 0.0"),
        ("AUG.CUTMIX", "1.0", r"AUG.CUTMIX=1.0 is for classification.* set it to 0.0"),
        ("AUG.REPROB", "0.25", r"AUG.REPROB=0.25 .* set it to 0.0, or name .*dense.yaml in BASE"),
        ("AUG.COLOR_JITTER", "0.4", r"AUG.COLOR_JITTER=0.4 is for classification"),
        ("AUG.AUTO_AUGMENT", "3a", r"AUG.AUTO_AUGMENT='3a' .* set it to 'none'"),
        ("MODEL.LABEL_SMOOTHING", "0.1", r"LABEL_SMOOTHING=0.1 is for classification"),
    ],
)
@pytest.mark.parametrize("name", ["det", "seg"])
def test_what_a_dense_task_would_leave_out_is_refused(name, key, value, message):
    with pytest.raises(ValueError, match=message):
        load_config(CONFIG_DIR / "_base_" / f"smoke_{name}.yaml", [key, value])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BASE: 3\n", r"BASE=3 in .*a.yaml must be a YAML file, or a list"),
        ("BASE: [[b.yaml]]\n", r"BASE=\[\['b.yaml'\]\] in"),
        ("TAG: yes\n", r"TAG=True in .* must be str, not bool; put it in quotes"),
        ("TRAIN: [\n", r"a.yaml is not valid YAML"),
        ("TAG: {{ name }}\n", r"(?s)a.yaml is not valid YAML.*unhashable key"),
        (
            "DATA:\n  ON_DEVICE: False\nTAG: a\nDATA:\n  CROP: 1\n",
            r"(?s)a.yaml.*'DATA' comes twice.*line 4",
        ),
    ],
)
def test_bad_files_stop_with_key_value_and_fix(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path / "a.yaml", text))


def test_yaml_may_be_written_as_people_write_it(tmp_path):
    """Trap: YAML 1.1 reads no as False, 1 as a number, and nothing as None."""
    text = "BASE:\nTAG: 1\nDATA: {CACHE_MODE: no}\nTRAIN: {LR_SCHEDULER: {NAME: Cosine}}\n"
    config = load_config(write(tmp_path / "a.yaml", text + "AMP_OPT_LEVEL: o1\n"))
    assert (config.TAG, config.DATA.CACHE_MODE) == ("1", "no")
    assert (config.TRAIN.LR_SCHEDULER.NAME, config.AMP_OPT_LEVEL) == ("cosine", "O1")


def test_keys_without_effect_warn_where_they_differ_from_swins_defaults(tmp_path, caplog):
    section = "TRAIN: {MOE: {SAVE_MASTER: %s}}\nMODEL: {SIMMIM: {NORM_TARGET: {ENABLE: %s}}}\n"
    path = tmp_path / "a.yaml"
    load_config(write(path, section % (False, False)), ["FUSED_LAYERNORM", "False"])
    assert not caplog.records
    load_config(write(path, section % (True, True)), ["FUSED_LAYERNORM", "True"])
    warned = [record.getMessage().split("=")[0] for record in caplog.records]
    assert warned == [
        "TRAIN.MOE.SAVE_MASTER",
        "MODEL.SIMMIM.NORM_TARGET.ENABLE",
        "FUSED_LAYERNORM",
    ]


def test_a_model_can_be_described_without_the_rest_of_a_recipe():
    opts = ["MODEL.IN_CHANS", "1", "DATA.BATCH_SIZE", "1"]
    assert build_model(load_config(DFVT_TINY, opts)).patch_embed is not None


def test_other_optimizers_keep_their_own_numbers_where_the_config_has_its_defaults():
    shared = load_config(DFVT_TINY).TRAIN.OPTIMIZER
    assert optimizer.DEFAULT_EPS == shared.EPS
    assert list(optimizer.DEFAULT_BETAS) == shared.BETAS


def test_swin_writes_every_section_and_only_the_own_one_counts(tmp_path):
    """Its dumped configs have MODEL.SWIN.IN_CHANS and MODEL.SWINV2.IN_CHANS, whichever is built."""
    text = "MODEL: {TYPE: Swin, SWIN: {IN_CHANS: 1}, SWINV2: {IN_CHANS: 3}}"
    file = write(tmp_path / "a.yaml", text)
    assert load_config(file).MODEL.IN_CHANS == 1
    assert load_config(file, ["MODEL.IN_CHANS", "4"]).MODEL.IN_CHANS == 4
    assert load_config(file, ["MODEL.TYPE", "swinv2"]).MODEL.IN_CHANS == 3


def test_parents_are_named_in_files_alone():
    with pytest.raises(ValueError, match=r"BASE = .* in --opts: only YAML files"):
        load_config(DFVT_TINY, ["BASE", "['x.yaml']"])


def test_weights_that_the_command_line_names_win_over_those_of_the_file(tmp_path, caplog):
    """A run that was started with --resume has it in its config.yaml."""
    file = write(tmp_path / "a.yaml", "MODEL: {RESUME: old.pth}")
    model = load_config(file, flags={"MODEL.PRETRAINED": "new.pth"}).MODEL
    assert (model.RESUME, model.PRETRAINED) == ("", "new.pth")
    assert "takes the place of the file's MODEL.RESUME='old.pth'" in caplog.text
    model = load_config(file, ["MODEL.PRETRAINED", ""]).MODEL
    assert (model.RESUME, model.PRETRAINED) == ("old.pth", "")
    model = load_config(file, ["MODEL.RESUME", "r.pth"], {"MODEL.PRETRAINED": "new.pth"}).MODEL
    assert (model.RESUME, model.PRETRAINED) == ("r.pth", "new.pth")


def test_gradients_are_not_clipped_at_none(tmp_path):
    assert (
        load_config(write(tmp_path / "a.yaml", "TRAIN: {CLIP_GRAD: null}")).TRAIN.CLIP_GRAD is None
    )


def test_values_from_the_command_line_are_read_as_literals():
    opts = ["MODEL.DFvT.DEPTHS", "[1,1,1,1]", "DATA.IMG_SIZE", "(64, 96)", "TRAIN.BASE_LR", "1e-3"]
    opts += [
        "MODEL.NUM_CLASSES",
        "10",
        "TAG",
        "7",
        "TRAIN.CLIP_GRAD",
        "1",
        "AUG.CUTMIX_MINMAX",
        "None",
    ]
    config = load_config(DFVT_TINY, opts)
    assert config.MODEL.DFvT.DEPTHS == [1, 1, 1, 1]
    assert config.DATA.IMG_SIZE == [64, 96]
    assert (config.TRAIN.BASE_LR, config.TAG, config.TRAIN.CLIP_GRAD) == (1e-3, "7", 1.0)
    assert (config.MODEL.NUM_CLASSES, config.AUG.CUTMIX_MINMAX) == (10, None)


def test_dumped_config_runs_the_same_experiment_again(tmp_path):
    """Trap: Swin dumps the learning rate after scaling it, so that a second run scales it twice."""
    config = load_config(DFVT_TINY, ["TRAIN.BASE_LR", "0.01", "MODEL.NUM_CLASSES", "7", "TAG", "x"])
    again = load_config(write(tmp_path / "config.yaml", dump(config)))
    assert again == config


@pytest.mark.parametrize(
    "path", [p for p in EVERY_FILE if "_base_" not in p.parts][::7] + SMOKES, ids=lambda p: p.stem
)
def test_dumped_config_of_any_task_says_all(path, tmp_path):
    text = dump(load_config(path))
    assert dump(load_config(write(tmp_path / "config.yaml", text))) == text
    assert load_config(tmp_path / "config.yaml") == load_config(path)


def test_dump_leaves_other_architectures_out():
    model = yaml.safe_load(dump(load_config(DFVT_TINY)))["MODEL"]
    assert "DFvT" in model
    assert not {entry.node for entry in registry.entries()} - {"DFvT"} & set(model)


def test_a_loaded_config_is_frozen_and_leaves_the_defaults_alone():
    config = load_config(DFVT_TINY)
    with pytest.raises(AttributeError):
        config.SEED = 3
    config.MODEL.DFvT.DEPTHS.append(9)
    assert load_config(DFVT_TINY).MODEL.DFvT.DEPTHS == [1, 1, 2, 1]


def test_every_choice_and_range_names_a_key_that_exists():
    keys = set(all_keys())
    assert set(rules.CHOICES) <= keys
    assert set(rules.RANGES) <= keys
    assert set(rules.TYPES) <= keys
    assert set(rules.ELEMENTS) <= keys
    assert not set(rules.INERT) & keys


def test_every_shared_key_is_read_by_some_code():
    root = CONFIG_DIR.parent
    skipped = {"tests", ".venv", "config.py", "config_rules.py"}
    files = [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts)]
    code = "".join(p.read_text() for p in files)
    code += Path(config_module.__file__).read_text().split("def load_config")[1]
    nodes = {entry.node for entry in registry.entries()}
    shared = [k for k in all_keys() if not (k.startswith("MODEL.") and k.split(".")[1] in nodes)]
    # Keys of a data format's own section reach its builder as lower-case keywords.
    names = {k: k.rpartition(".")[2] for k in shared}
    unused = [k for k, name in names.items() if name not in code and name.lower() not in code]
    assert not unused, f"no code reads {unused}"


def test_a_cuda_graph_does_not_accumulate_gradients():
    path = variant_file("dfvt_tiny")
    opts = ["COMPILE", "True", "COMPILE_MODE", "reduce-overhead", "TRAIN.ACCUMULATION_STEPS", "2"]
    with pytest.raises(ValueError, match=r"excludes TRAIN\.ACCUMULATION_STEPS=2"):
        load_config(path, opts=opts)
    for mode in ("default", "max-autotune-no-cudagraphs"):
        load_config(path, opts=[*opts, "COMPILE_MODE", mode])
