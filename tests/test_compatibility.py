"""Keys and flags that users of Swin's and DFvT's programs bring along: each is there and means the same."""

import pytest
import yaml

from config import load_config
from models import registry
from utils.arguments import FLAGS, parse_args
from utils.names import leaves

# Swin's config.py (f82860b): every key that it shares with ours, with its default.
SWIN = yaml.safe_load("""
DATA: {BATCH_SIZE: 128, DATA_PATH: '', DATASET: imagenet, IMG_SIZE: 224, INTERPOLATION: bicubic,
       ZIP_MODE: false, CACHE_MODE: part, PIN_MEMORY: true, NUM_WORKERS: 8}
MODEL:
  TYPE: swin
  NAME: swin_tiny_patch4_window7_224
  PRETRAINED: ''
  RESUME: ''
  DROP_RATE: 0.0
  DROP_PATH_RATE: 0.1
  LABEL_SMOOTHING: 0.1
  SWIN: {PATCH_SIZE: 4, EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24],
               WINDOW_SIZE: 7, MLP_RATIO: 4.0, QKV_BIAS: true, APE: false, PATCH_NORM: true,
               QK_SCALE: null}
  SWINV2: {PATCH_SIZE: 4, EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24],
           WINDOW_SIZE: 7, MLP_RATIO: 4.0, QKV_BIAS: true, APE: false, PATCH_NORM: true,
           PRETRAINED_WINDOW_SIZES: [0, 0, 0, 0]}
  SWIN_MLP: {PATCH_SIZE: 4, EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24],
             WINDOW_SIZE: 7, MLP_RATIO: 4.0, APE: false, PATCH_NORM: true}
TRAIN:
  START_EPOCH: 0
  EPOCHS: 300
  WARMUP_EPOCHS: 20
  WEIGHT_DECAY: 0.05
  BASE_LR: 0.0005
  WARMUP_LR: 0.0000005
  MIN_LR: 0.000005
  CLIP_GRAD: 5.0
  AUTO_RESUME: true
  ACCUMULATION_STEPS: 1
  USE_CHECKPOINT: false
  LAYER_DECAY: 1.0
  LR_SCHEDULER: {NAME: cosine, DECAY_EPOCHS: 30, DECAY_RATE: 0.1, WARMUP_PREFIX: true, GAMMA: 0.1,
                 MULTISTEPS: []}
  OPTIMIZER: {NAME: adamw, EPS: 0.00000001, BETAS: [0.9, 0.999], MOMENTUM: 0.9}
AUG: {COLOR_JITTER: 0.4, AUTO_AUGMENT: rand-m9-mstd0.5-inc1, REPROB: 0.25, REMODE: pixel, RECOUNT: 1,
      MIXUP: 0.8, CUTMIX: 1.0, CUTMIX_MINMAX: null, MIXUP_PROB: 1.0, MIXUP_SWITCH_PROB: 0.5,
      MIXUP_MODE: batch}
TEST: {CROP: true}
AMP_ENABLE: true
AMP_OPT_LEVEL: ''
TAG: default
SAVE_FREQ: 1
PRINT_FREQ: 10
SEED: 0
EVAL_MODE: false
THROUGHPUT_MODE: false
""")

# What its files may say beyond: accepted without a word at these values, and without effect.
WITHOUT_EFFECT = yaml.safe_load("""
DATA: {MASK_PATCH_SIZE: 32, MASK_RATIO: 0.6}
MODEL:
  SIMMIM: {NORM_TARGET: {ENABLE: false, PATCH_SIZE: 47}}
  SWIN_MOE: {PATCH_SIZE: 4, IN_CHANS: 3, EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24],
             WINDOW_SIZE: 7, MLP_RATIO: 4.0, QKV_BIAS: true, QK_SCALE: null, APE: false,
             PATCH_NORM: true, MLP_FC2_BIAS: true, INIT_STD: 0.02,
             PRETRAINED_WINDOW_SIZES: [0, 0, 0, 0], MOE_BLOCKS: [[-1], [-1], [-1], [-1]],
             NUM_LOCAL_EXPERTS: 1, TOP_VALUE: 1, CAPACITY_FACTOR: 1.25, COSINE_ROUTER: false,
             NORMALIZE_GATE: false, USE_BPR: true, IS_GSHARD_LOSS: false, GATE_NOISE: 1.0,
             COSINE_ROUTER_DIM: 256, COSINE_ROUTER_INIT_T: 0.5, MOE_DROP: 0.0, AUX_LOSS_WEIGHT: 0.01}
TRAIN: {MOE: {SAVE_MASTER: false}}
TEST: {SEQUENTIAL: false, SHUFFLE: false}
ENABLE_AMP: false
LOCAL_RANK: 0
FUSED_WINDOW_PROCESS: false
FUSED_LAYERNORM: false
""")

FLAG_VALUES = {
    "--batch-size 64": {"DATA.BATCH_SIZE": 64},
    "--data-path /data": {"DATA.DATA_PATH": "/data"},
    "--zip": {"DATA.ZIP_MODE": True},
    "--cache-mode full": {"DATA.CACHE_MODE": "full"},
    "--pretrained a.pth": {"MODEL.PRETRAINED": "a.pth"},
    "--resume https://host/b.pth": {"MODEL.RESUME": "https://host/b.pth"},
    "--accumulation-steps 4": {"TRAIN.ACCUMULATION_STEPS": 4},
    "--use-checkpoint": {"TRAIN.USE_CHECKPOINT": True},
    "--disable_amp": {"AMP_ENABLE": False},
    "--disable-amp": {"AMP_ENABLE": False},
    "--enable-amp": {"AMP_ENABLE": True},
    "--amp-opt-level O0": {"AMP_OPT_LEVEL": "O0"},
    "--output out": {"OUTPUT": "out"},
    "--tag t": {"TAG": "t"},
    "--eval": {"EVAL_MODE": True},
    "--throughput": {"THROUGHPUT_MODE": True},
    "--fused_window_process": {"FUSED_WINDOW_PROCESS": True},
    "--fused_layernorm": {"FUSED_LAYERNORM": True},
    "--optim sgd": {"TRAIN.OPTIMIZER.NAME": "sgd"},
    # Ours.
    "--info": {"INFO_MODE": True},
    "--plan": {"PLAN_MODE": True},
    "--attack-type pgd": {"TEST.ATTACK": "pgd"},
    "--adv-eps 2": {"TEST.ATTACK_EPS": 2.0},
    "--adv-steps 3": {"TEST.ATTACK_STEPS": 3},
    "--adv-step-size 0.25": {"TEST.ATTACK_STEP_SIZE": 0.25},
}


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return path


@pytest.mark.parametrize(("key", "default"), list(leaves(SWIN)), ids=str)
def test_every_key_of_swin_has_its_default(key, default, empty):
    assert dict(leaves(load_config(empty)))[key] == default


def test_number_of_classes_is_left_to_the_data(empty):
    """Swin's default is 1000, which its data builder replaces."""
    assert load_config(empty).MODEL.NUM_CLASSES is None


def test_a_file_with_every_key_of_swin_gives_the_defaults(tmp_path, empty, caplog):
    path = tmp_path / "all.yaml"
    channels = {entry.node: {"IN_CHANS": 3} for entry in registry.entries() if "SWIN" in entry.node}
    path.write_text(yaml.safe_dump(SWIN))
    assert load_config(path) == load_config(empty)
    path.write_text(yaml.safe_dump(WITHOUT_EFFECT | {"MODEL": WITHOUT_EFFECT["MODEL"] | channels}))
    assert load_config(path) == load_config(empty)
    assert not caplog.records


@pytest.mark.parametrize(("key", "default"), list(leaves(WITHOUT_EFFECT)), ids=str)
def test_a_key_without_effect_says_so_at_any_other_value(key, default, empty, caplog):
    other = not default if isinstance(default, bool) else "9"
    load_config(empty, [key, str(other)])
    assert f"{key}=" in caplog.text
    assert "has no effect" in caplog.text


@pytest.mark.parametrize(("words", "expected"), list(FLAG_VALUES.items()), ids=str)
def test_every_flag_sets_its_key_and_no_other(words, expected, empty):
    _, own, flags = parse_args(["--cfg", str(empty), *words.split()])
    assert flags == expected
    assert own.opts == []
    load_config(empty, flags=flags)


def test_no_flag_is_left_out_above():
    assert {name for name, *_ in FLAGS} == {words.split()[0] for words in FLAG_VALUES}


@pytest.mark.parametrize("words", ["--local_rank 3", "--local-rank 3"])
def test_older_launchers_pass_the_rank(words):
    _, own, flags = parse_args(["--cfg", "x.yaml", *words.split()])
    assert own.local_rank == 3
    assert not flags


def test_all_flags_go_together(empty):
    words = [word for flag in FLAG_VALUES for word in flag.split()]
    _, _, flags = parse_args(["--cfg", str(empty), *words])
    assert flags["AMP_ENABLE"] is True, "the last one of a key counts"
    assert {key for expected in FLAG_VALUES.values() for key in expected} == flags.keys()
