"""Every config key with its default and meaning; how YAML files and command lines become a config.

    config = load_config("configs/dhvt/dhvt_tiny_cifar_patch4.yaml", ["DATA.BATCH_SIZE", "64"])

Merge order: defaults, BASE files (depth first), the file, `--opts`, named flags that were given. The
result is validated, then frozen, once; this module alone changes a CfgNode. The keys of `MODEL.<NODE>`
are not listed: they are the keyword arguments of the architecture's constructor (`models/registry.py`).
"""

import ast
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

import models  # noqa: F401  importing it registers every architecture
from models import registry
from utils.spelling import nearest

_LOG = logging.getLogger(__name__)

_C = CfgNode()
_C.BASE = [""]  # parent YAML files, relative to the file that names them, merged first and in order
_C.TASK = "classification"

_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 128  # images per process and forward pass
_C.DATA.DATA_PATH = ""  # root folder of the dataset
_C.DATA.DATASET = "imagenet"  # a format of data/: imagenet (any image folder), cifar10, digits, ...
_C.DATA.IMG_SIZE = 224  # pixels: one side, or [height, width]
_C.DATA.INTERPOLATION = "bicubic"  # bicubic | bilinear | random (training only)
_C.DATA.ZIP_MODE = False  # read {train,val}.zip with {train,val}_map.txt instead of folders
_C.DATA.CACHE_MODE = "part"  # zip in memory: no | full | part (each process keeps its own share)
_C.DATA.PIN_MEMORY = True  # page-locked batches, where there is a GPU
_C.DATA.NUM_WORKERS = 8  # loader processes per training process
_C.DATA.ON_ERROR = "raise"  # unreadable image: raise | skip (logged and counted)
_C.DATA.MEAN = [0.485, 0.456, 0.406]  # per channel, of values in [0, 1]
_C.DATA.STD = [0.229, 0.224, 0.225]
_C.DATA.SYNTHETIC = CfgNode()  # DATASET: synthetic, random images for smoke runs
_C.DATA.SYNTHETIC.TRAIN_SIZE = 256  # images
_C.DATA.SYNTHETIC.VAL_SIZE = 64
_C.DATA.SYNTHETIC.NUM_CLASSES = 10

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "swin"  # architecture: a registered name, without regard to case
_C.MODEL.NAME = "swin_tiny_patch4_window7_224"  # variant: names the output folder
_C.MODEL.PRETRAINED = ""  # weights to start from: tables are resized, another head is replaced
_C.MODEL.PRETRAINED_PARTIAL = False  # accept a file that lacks tensors, or has others
_C.MODEL.PRETRAINED_EMA = False  # take the averaged weights of a file that holds both
_C.MODEL.RESUME = ""  # checkpoint to continue, or the file that --eval scores
_C.MODEL.NUM_CLASSES = None  # None: as many as the data has (1000 without data)
_C.MODEL.IN_CHANS = 3  # image channels
_C.MODEL.DROP_RATE = 0.0
_C.MODEL.DROP_PATH_RATE = 0.1
_C.MODEL.LABEL_SMOOTHING = 0.1

_C.TRAIN = CfgNode()
_C.TRAIN.START_EPOCH = 0
_C.TRAIN.EPOCHS = 300
_C.TRAIN.MAX_STEPS = 0  # > 0: train this many optimizer steps instead of EPOCHS
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WARMUP_STEPS = 0  # > 0: instead of WARMUP_EPOCHS
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.BASE_LR = 5e-4  # for 512 images per step, see LR_SCALING
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
_C.TRAIN.LR_SCALING = "linear"  # linear: x (images per step) / 512 | none: BASE_LR is used as it is
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 is off
_C.TRAIN.AUTO_RESUME = True  # continue from the output folder's last.pth, if there is one
_C.TRAIN.ACCUMULATION_STEPS = 1  # forward passes per optimizer step; 0 means 1, as in DFvT
_C.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass
_C.TRAIN.LAYER_DECAY = 1.0  # learning-rate factor per depth below the head
_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step | multistep | poly
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step: epochs between decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: factor
_C.TRAIN.LR_SCHEDULER.WARMUP_PREFIX = True  # cosine: starts after the warm-up, not under it
_C.TRAIN.LR_SCHEDULER.GAMMA = 0.1  # multistep: factor
_C.TRAIN.LR_SCHEDULER.MULTISTEPS = []  # multistep: epochs of the decays
_C.TRAIN.LR_SCHEDULER.POWER = 0.9  # poly: exponent
_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = (
    "adamw"  # adamw | sgd | fused_adam | fused_lamb (Apex) | any timm optimizer
)
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9
_C.TRAIN.EMA = CfgNode()  # moving average of the weights, evaluated and saved beside them
_C.TRAIN.EMA.ENABLE = False
_C.TRAIN.EMA.DECAY = 0.9999
_C.TRAIN.EMA.WARMUP = False  # start with a shorter memory
_C.TRAIN.SYNC_BN = False  # batch statistics over all processes

_C.AUG = CfgNode()
_C.AUG.COLOR_JITTER = 0.4  # 0 is off; AUTO_AUGMENT takes its place where both are on
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # timm's policy string; none is off
_C.AUG.REPROB = 0.25  # probability of random erasing
_C.AUG.REMODE = "pixel"  # pixel | const | rand
_C.AUG.RECOUNT = 1
_C.AUG.HFLIP = 0.5  # probability
_C.AUG.VFLIP = 0.0
_C.AUG.SCALE = [0.08, 1.0]  # random resized crop: share of the area
_C.AUG.RATIO = [0.75, 1.3333333333333333]  # random resized crop: width / height
_C.AUG.REPEATED_AUG = False  # each drawn image three times, differently augmented
_C.AUG.MIXUP = 0.8  # alpha; 0 is off
_C.AUG.CUTMIX = 1.0
_C.AUG.CUTMIX_MINMAX = None  # [smallest, largest] cut, instead of CUTMIX
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5
_C.AUG.MIXUP_MODE = "batch"  # batch | pair | elem

_C.TEST = CfgNode()
_C.TEST.CROP = True  # resize to 256/224 of the size, then crop the centre; else resize to the size

_C.AMP_ENABLE = True  # the one switch of mixed precision
_C.AMP_DTYPE = "auto"  # auto: bf16 (else fp16) on a GPU, float32 on the CPU | bf16 | fp16
_C.AMP_OPT_LEVEL = ""  # '': native | O0: off | O1, O2: NVIDIA Apex
_C.CHANNELS_LAST = False
_C.COMPILE = False  # torch.compile the model
_C.DETERMINISTIC = False  # the same bits on every run of the same machine, slower
_C.OUTPUT = "output"  # a run writes to OUTPUT/MODEL.NAME/TAG
_C.TAG = "default"
_C.SAVE_FREQ = 1  # epochs between numbered checkpoints (last.pth is written after every epoch)
_C.SAVE_KEEP = 3  # newest numbered checkpoints that are kept; 0 keeps all
_C.SAVE_STEPS = 0  # > 0: last.pth is also written every so many optimizer steps
_C.PRINT_FREQ = 10  # batches between log lines
_C.SEED = 0
_C.EVAL_MODE = False
_C.THROUGHPUT_MODE = False
_C.INFO_MODE = False

for _entry in registry.entries():
    _C.MODEL[_entry.node] = CfgNode(
        {name.upper(): copy.deepcopy(field.default) for name, field in _entry.fields.items()}
    )

# Types beyond that of the default. Architecture nodes get theirs from the constructors' annotations.
_TYPES: dict[str, tuple[type, ...]] = {
    "DATA.IMG_SIZE": (int, list),
    "MODEL.NUM_CLASSES": (int, type(None)),
    "TRAIN.WARMUP_EPOCHS": (int, float),
    "AUG.CUTMIX_MINMAX": (list, type(None)),
} | {
    f"MODEL.{entry.node}.{name.upper()}": field.types
    for entry in registry.entries()
    for name, field in entry.fields.items()
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "TASK": ("classification",),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.CACHE_MODE": ("no", "full", "part"),
    "DATA.ON_ERROR": ("raise", "skip"),
    "TRAIN.LR_SCALING": ("linear", "none"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step", "multistep", "poly"),
    "AUG.REMODE": ("pixel", "const", "rand"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "AMP_DTYPE": ("auto", "bf16", "fp16"),
    "AMP_OPT_LEVEL": ("", "O0", "O1", "O2"),
}

# Smallest and largest allowed value of a number.
_RANGES: dict[str, tuple[float, float]] = {
    "DATA.BATCH_SIZE": (1, float("inf")),
    "DATA.NUM_WORKERS": (0, float("inf")),
    "MODEL.NUM_CLASSES": (0, float("inf")),
    "MODEL.IN_CHANS": (1, float("inf")),
    "MODEL.DROP_RATE": (0, 1),
    "MODEL.DROP_PATH_RATE": (0, 1),
    "MODEL.LABEL_SMOOTHING": (0, 1),
    "TRAIN.EPOCHS": (0, float("inf")),
    "TRAIN.MAX_STEPS": (0, float("inf")),
    "TRAIN.WARMUP_EPOCHS": (0, float("inf")),
    "TRAIN.WEIGHT_DECAY": (0, float("inf")),
    "TRAIN.BASE_LR": (0, float("inf")),
    "TRAIN.CLIP_GRAD": (0, float("inf")),
    "TRAIN.ACCUMULATION_STEPS": (0, float("inf")),
    "TRAIN.LAYER_DECAY": (0, 1),
    "TRAIN.EMA.DECAY": (0, 1),
    "AUG.REPROB": (0, 1),
    "AUG.HFLIP": (0, 1),
    "AUG.VFLIP": (0, 1),
    "AUG.MIXUP": (0, float("inf")),
    "AUG.CUTMIX": (0, float("inf")),
    "AUG.MIXUP_PROB": (0, 1),
    "AUG.MIXUP_SWITCH_PROB": (0, 1),
    "SAVE_FREQ": (1, float("inf")),
    "SAVE_KEEP": (0, float("inf")),
    "SAVE_STEPS": (0, float("inf")),
    "PRINT_FREQ": (1, float("inf")),
}

# Keys of Swin's and DFvT's files that have another home here.
_ALIASES = {f"MODEL.{entry.node}.IN_CHANS": "MODEL.IN_CHANS" for entry in registry.entries()}

# Keys of Swin's files that are accepted and do nothing: their default there, and why.
_INERT: dict[str, tuple[Any, str]] = {
    "DATA.MASK_PATCH_SIZE": (32, "SimMIM pre-training is not part of MixLab"),
    "DATA.MASK_RATIO": (0.6, "SimMIM pre-training is not part of MixLab"),
    "MODEL.SIMMIM": (None, "SimMIM pre-training is not part of MixLab"),
    "MODEL.SWIN_MOE": (None, "mixture-of-experts models are not part of MixLab"),
    "TRAIN.MOE": (None, "mixture-of-experts models are not part of MixLab"),
    "TEST.SEQUENTIAL": (False, "evaluation is always in order and exact"),
    "TEST.SHUFFLE": (False, "evaluation is always in order and exact"),
    "ENABLE_AMP": (False, "AMP_ENABLE is the one switch of mixed precision"),
    "LOCAL_RANK": (0, "the launcher's environment decides"),
    "FUSED_WINDOW_PROCESS": (False, "windows need no kernel of their own here"),
    "FUSED_LAYERNORM": (False, "PyTorch's own layer norm is fused"),
}


def load_config(
    cfg_file: str | Path, opts: Sequence[Any] = (), flags: Mapping[str, Any] | None = None
) -> CfgNode:
    """Read a YAML file with its BASE files and overrides -> a validated, frozen config.

    Args:
        cfg_file: the experiment's YAML file.
        opts: alternating keys and values, as after `--opts`; values may be text.
        flags: values of the named command-line flags that were given, by key.

    Raises:
        ValueError: unknown key, wrong type, value out of its choices, or an impossible combination;
            the message names key, value, choices and the nearest right spelling.
        FileNotFoundError: a file does not exist.
    """
    config = _C.clone()
    _merge_file(config, Path(cfg_file), chain=())
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(f"--opts takes pairs of KEY VALUE, got {len(opts)} words: {opts}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        _set(config, str(key), value, "--opts")
    for key, value in (flags or {}).items():
        _set(config, key, value, "the command line")
    config.BASE = [""]
    validate(config)
    config.freeze()
    return config


def validate(config: CfgNode) -> None:
    """Check choices, ranges and combinations; ValueError names the key, the value and the fix."""
    for key, choices in _CHOICES.items():
        value = _get(config, key)
        if value not in choices:
            raise ValueError(f"{key}={value!r} must be one of {list(choices)}")
    for key, (low, high) in _RANGES.items():
        value = _get(config, key)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{key}={value!r} must be between {low} and {high}")
    registry.find(config.MODEL.TYPE)
    size = config.DATA.IMG_SIZE
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"DATA.IMG_SIZE={size!r} must be one side in pixels or [height, width]")
    for key in ("MEAN", "STD"):
        if len(config.DATA[key]) not in (1, config.MODEL.IN_CHANS):
            raise ValueError(
                f"DATA.{key} has {len(config.DATA[key])} entries and MODEL.IN_CHANS is "
                f"{config.MODEL.IN_CHANS}: give one entry per channel, or one for all"
            )
    modes = [key for key in ("EVAL_MODE", "THROUGHPUT_MODE", "INFO_MODE") if config[key]]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(modes)} exclude each other: set one")
    if config.TRAIN.LR_SCHEDULER.NAME == "multistep" and not config.TRAIN.LR_SCHEDULER.MULTISTEPS:
        raise ValueError(
            "TRAIN.LR_SCHEDULER.NAME='multistep' needs epochs in LR_SCHEDULER.MULTISTEPS"
        )
    if config.AMP_OPT_LEVEL in ("O1", "O2") and config.AMP_DTYPE == "bf16":
        raise ValueError("AMP_DTYPE='bf16' excludes AMP_OPT_LEVEL: Apex O1 and O2 work in fp16")
    if uses_mixup(config) and config.DATA.BATCH_SIZE % 2:
        raise ValueError(
            f"DATA.BATCH_SIZE={config.DATA.BATCH_SIZE} must be even while mixup or cutmix is on; "
            "set AUG.MIXUP 0.0 AUG.CUTMIX 0.0 to turn them off"
        )
    minmax = config.AUG.CUTMIX_MINMAX
    if minmax is not None and not (len(minmax) == 2 and 0 <= minmax[0] <= minmax[1] <= 1):
        raise ValueError(f"AUG.CUTMIX_MINMAX={minmax!r} must be [smallest, largest] within [0, 1]")


def uses_mixup(config: CfgNode) -> bool:
    """Whether training mixes images, so that targets are soft."""
    aug = config.AUG
    return config.TASK == "classification" and (
        aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None
    )


def dump(config: CfgNode) -> str:
    """YAML text that runs the same experiment again; nodes of other architectures are left out."""
    shown = config.clone()
    shown.defrost()
    del shown["BASE"]
    own = registry.find(config.MODEL.TYPE).node
    for entry in registry.entries():
        if entry.node != own:
            del shown.MODEL[entry.node]
    return shown.dump(sort_keys=False)


def output_dir(config: CfgNode) -> Path:
    """Folder that the run writes to."""
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def all_keys() -> list[str]:
    """Every config key with its full path, sorted."""
    return sorted(_leaves(_C))


def _merge_file(config: CfgNode, path: Path, chain: tuple[Path, ...]) -> None:
    """Merge BASE files depth first, then the file itself."""
    if not path.is_file():
        near = nearest(path.stem, [p.stem for p in path.parent.glob("*.yaml")])
        named = f" named in BASE of {chain[-1]}" if chain else ""
        raise FileNotFoundError(
            f"config file {path}{named} does not exist; {path.parent} has {near or 'no YAML file'}"
        )
    if path.resolve() in chain:
        raise ValueError(
            f"BASE of {chain[-1]} leads back to {path}: files must not include each other"
        )
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold KEY: value pairs, got {type(content).__name__}")
    base = content.pop("BASE", [])
    for parent in [base] if isinstance(base, str) else base:
        if parent:
            _merge_file(config, path.parent / parent, (*chain, path.resolve()))
    for key, value in _leaves(content):
        _set(config, key, value, str(path))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[Any]:
    """Full keys of a CfgNode, or (full key, value) pairs of a plain dict of YAML."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, CfgNode) or (isinstance(value, dict) and not _is_inert(key)):
            yield from _leaves(value, f"{key}.")
        else:
            yield key if isinstance(tree, CfgNode) else (key, value)


def _is_inert(key: str) -> bool:
    return any(key == inert or key.startswith(inert + ".") for inert in _INERT)


def _get(config: CfgNode, key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node[name]
    return node


def _set(config: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one key after checking that it exists and that the value has its type."""
    if _is_inert(key):
        default, reason = _INERT.get(key, (None, ""))
        if key not in _INERT:
            reason = next(why for inert, (_, why) in _INERT.items() if key.startswith(inert + "."))
        elif value != default and not isinstance(value, dict):
            _LOG.warning("%s=%r (%s) has no effect: %s", key, value, source, reason)
        return
    key = _ALIASES.get(_spelling(key), _spelling(key))
    *path, name = key.split(".")
    node: Any = config
    for part in path:
        node = node.get(part) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or name not in node:
        raise ValueError(
            f"unknown config key {key} = {value!r} in {source}; "
            f"did you mean one of {nearest(key, all_keys())[:3]}?"
        )
    if isinstance(node[name], CfgNode):
        keys = list(node[name])
        raise ValueError(f"{key} = {value!r} in {source}: {key} is a section, its keys are {keys}")
    node[name] = _typed(key, value, node[name], source)


def _spelling(key: str) -> str:
    """Node names of architectures match without regard to case, as MODEL.TYPE does."""
    parts = key.split(".")
    if len(parts) == 3 and parts[0] == "MODEL":
        nodes = {entry.node.lower(): entry.node for entry in registry.entries()}
        parts[1] = nodes.get(parts[1].lower(), parts[1])
    return ".".join(parts)


def _typed(key: str, value: Any, current: Any, source: str) -> Any:
    """`value` in one of the key's types, or ValueError."""
    allowed = _TYPES.get(key) or (type(current),)
    if isinstance(value, str) and str not in allowed:
        value = _decoded(value)
    elif value is None and type(None) not in allowed and str in allowed:
        value = ""  # an empty entry of a YAML file
    if isinstance(value, tuple):
        value = list(value)
    if type(value) is int and int not in allowed and float in allowed:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ValueError(f"{key}={value!r} in {source} must be {names}, not {type(value).__name__}")
    return value


def _decoded(text: str) -> Any:
    """The value that `text` spells: a Python literal (1e-3 is text in YAML 1.1), or YAML."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return yaml.safe_load(text)
