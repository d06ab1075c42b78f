"""Every config key with its default and meaning; how YAML files and command lines become a config.

    config = load_config("configs/dhvt/dhvt_tiny_cifar_patch4.yaml", ["DATA.BATCH_SIZE", "64"])

Merge order: defaults, BASE files (depth first), the file, `--opts`, named flags that were given. The
result is validated, then frozen, once; this module alone changes a CfgNode. The keys of `MODEL.<NODE>`
are not listed: they are the keyword arguments of the architecture's constructor (`models/registry.py`).
`utils/config_rules.py` says which values a key takes.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

import models  # noqa: F401  importing it registers every architecture
from models import registry
from models.heads import find_head, head_entries
from models.layers.tokens import to_pair
from utils import config_rules as rules
from utils.names import leaves
from utils.sharding import check_sharding
from utils.spelling import nearest
from utils.wrappers import CUDA_GRAPH_MODES
from utils.yaml_files import settings

_LOG = logging.getLogger(__name__)

_C = CfgNode()
_C.BASE = [""]  # parent YAML files, relative to the file that names them, merged first and in order
_C.TASK = "classification"  # classification | detection | segmentation

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
# pil | cv2 | simplejpeg (pip install simplejpeg): JPEGs faster, equal within rounding
_C.DATA.DECODER = "pil"
_C.DATA.DECODE_MIN_SIDE = 0  # > 0: decode JPEGs at 1/2, 1/4, ..., no side below this; inexact, fast
_C.DATA.ON_DEVICE = False  # small datasets (cifar10, digits): all images on the device, no workers
_C.DATA.ON_ERROR = "raise"  # unreadable image: raise | skip (logged, counted; classification only)
_C.DATA.MEAN = [0.485, 0.456, 0.406]  # per channel, of values in [0, 1]; one entry stands for all
_C.DATA.STD = [0.229, 0.224, 0.225]
_C.DATA.SYNTHETIC = CfgNode()  # DATASET: synthetic, random images for smoke runs
_C.DATA.SYNTHETIC.TRAIN_SIZE = 256  # images
_C.DATA.SYNTHETIC.VAL_SIZE = 64
_C.DATA.SYNTHETIC.NUM_CLASSES = 10
_C.DATA.LISTS = CfgNode()  # DATASET: lists, files of `path label`; docs/data.md has all formats
_C.DATA.LISTS.TRAIN = []  # list files, one or several jointly, relative to DATA_PATH
_C.DATA.LISTS.VAL = []
_C.DATA.LISTS.IMAGES = ""  # folder that the listed paths are relative to, below DATA_PATH
_C.DATA.LISTS.CLASSES = ""  # file with a class name per line; '': classes.txt, or named by folders
_C.DATA.DOMAINNET = CfgNode()  # DATASET: domainnet or pacs
_C.DATA.DOMAINNET.DOMAINS = []  # one domain, or several jointly; []: all of them
_C.DATA.INAT = CfgNode()  # DATASET: inat2018 or inat2019
# kingdom | phylum | class | order | supercategory | family | genus | name
_C.DATA.INAT.CATEGORY = "name"
_C.DATA.WEBDATASET = CfgNode()  # DATASET: webdataset
# Shards below DATA_PATH, train-{000..146}.tar; '': by the split's name
_C.DATA.WEBDATASET.TRAIN = ""
_C.DATA.WEBDATASET.VAL = ""
_C.DATA.PARQUET = CfgNode()  # DATASET: parquet, as on the Hugging Face Hub
_C.DATA.PARQUET.TRAIN = ""  # files below DATA_PATH, data/train-*.parquet; '': by the split's name
_C.DATA.PARQUET.VAL = ""
_C.DATA.PARQUET.IMAGE = "image"  # columns
_C.DATA.PARQUET.LABEL = "label"
_C.DATA.SIZE_DIVISOR = 32  # detection, segmentation: batches are padded to multiples of it
_C.DATA.COCO = CfgNode()  # DATASET: coco, for detection; docs/dense.md has all formats
_C.DATA.COCO.TRAIN = ""  # json below DATA_PATH; '': annotations/instances_train{2017,}.json
_C.DATA.COCO.VAL = ""
_C.DATA.COCO.TRAIN_IMAGES = ""  # folder of its images; '': train{2017,}
_C.DATA.COCO.VAL_IMAGES = ""
_C.DATA.ADE20K = CfgNode()  # DATASET: ade20k, for segmentation
_C.DATA.ADE20K.CLASSES = ""  # file with the names of the classes; '': objectInfo*.txt
_C.DATA.ADE20K.REDUCE_ZERO_LABEL = True  # label 0 is ignored, and the others count from 1
_C.DATA.PAIRS = CfgNode()  # DATASET: image_pairs, for segmentation: folders of images and of masks
_C.DATA.PAIRS.TRAIN_IMAGES = "images/train"
_C.DATA.PAIRS.TRAIN_MASKS = "annotations/train"
_C.DATA.PAIRS.VAL_IMAGES = "images/val"
_C.DATA.PAIRS.VAL_MASKS = "annotations/val"  # "": there are none, for --eval with TEST.REPORT True
_C.DATA.PAIRS.PALETTE = ""  # masks in colours: file with `R G B name` per label
_C.DATA.PAIRS.CLASSES = ""  # file with a class name per line
_C.DATA.PAIRS.REDUCE_ZERO_LABEL = False

_C.MODEL = CfgNode()
_C.MODEL.TYPE = "swin"  # architecture: a registered name, without regard to case
# Variant, which names the output folder; a file that gives a TYPE and no NAME has its own name.
_C.MODEL.NAME = "swin_tiny_patch4_window7_224"
_C.MODEL.PRETRAINED = ""  # weights to start from: tables are resized, another head is replaced
_C.MODEL.PRETRAINED_PARTIAL = False  # accept a file that lacks tensors, or has others
_C.MODEL.PRETRAINED_EMA = False  # take the averaged weights of a file that holds both
_C.MODEL.RESUME = ""  # checkpoint to continue, or the file that --eval scores
_C.MODEL.NUM_CLASSES = None  # None: as many as the data has (1000 without data)
_C.MODEL.IN_CHANS = 3  # image channels
_C.MODEL.DROP_RATE = 0.0
_C.MODEL.DROP_PATH_RATE = 0.1
_C.MODEL.LABEL_SMOOTHING = 0.1
_C.MODEL.HEAD = CfgNode()  # of dense tasks; MODEL.HEAD.<TYPE> holds the keywords of models/heads/
_C.MODEL.HEAD.TYPE = "retinanet"

_C.TRAIN = CfgNode()
_C.TRAIN.START_EPOCH = 0
_C.TRAIN.EPOCHS = 300
_C.TRAIN.MAX_STEPS = 0  # > 0: train this many optimizer steps instead of EPOCHS
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WARMUP_STEPS = 0  # > 0: instead of WARMUP_EPOCHS
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.WEIGHT_DECAY_END = None  # cosine from WEIGHT_DECAY to it over the run; None: constant
_C.TRAIN.NO_WEIGHT_DECAY = []  # names or patterns of parameters, beyond the model's own: ["*.router.*"]
_C.TRAIN.BASE_LR = 5e-4  # for 512 images per step, see LR_SCALING
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
_C.TRAIN.LR_SCALING = "linear"  # linear: x (images per step) / 512 | base: BASE_LR only | none
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 is off, and so is None
_C.TRAIN.AUTO_RESUME = True  # continue from the output folder's last.pth, if there is one
_C.TRAIN.ACCUMULATION_STEPS = 1  # forward passes per optimizer step; 0 means 1, as in DFvT
_C.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass
_C.TRAIN.LAYER_DECAY = 1.0  # learning-rate factor per depth below the head
_C.TRAIN.LR_MULTIPLIERS = []  # "name=factor" on the learning rate, beyond the model's own: ["head=10"]
_C.TRAIN.LOSS = "cross_entropy"  # of the labels: cross_entropy | bce (binary, for each class)
_C.TRAIN.BCE_THRESHOLD = None  # bce: mixed targets above it become 1, the others 0; None: soft
_C.TRAIN.BCE_SUM = False  # bce: sum over the classes instead of their mean
_C.TRAIN.FREEZE = []  # prefixes of parameters that are not trained; backbone: all but the classifier
_C.TRAIN.FREEZE_DEPTH = 0  # the same for so many depths (those of LAYER_DECAY), from the stem on
_C.TRAIN.FREEZE_BN = False  # the backbone's batch norms keep their statistics and weights
_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step | multistep | poly
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step: epochs between decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: factor
_C.TRAIN.LR_SCHEDULER.WARMUP_PREFIX = True  # cosine: starts after the warm-up, not under it
_C.TRAIN.LR_SCHEDULER.GAMMA = 0.1  # multistep: factor
_C.TRAIN.LR_SCHEDULER.MULTISTEPS = []  # multistep: epochs of the decays
_C.TRAIN.LR_SCHEDULER.POWER = 0.9  # poly: exponent
_C.TRAIN.OPTIMIZER = CfgNode()
# adamw | sgd | fused_adam | fused_lamb (Apex) | any timm optimizer
_C.TRAIN.OPTIMIZER.NAME = "adamw"
# With these two values, timm's optimizers have their own.
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9
_C.TRAIN.EMA = CfgNode()  # moving average of the weights, evaluated and saved beside them
_C.TRAIN.EMA.ENABLE = False
_C.TRAIN.EMA.DECAY = 0.9999
_C.TRAIN.EMA.WARMUP = False  # start with a shorter memory
_C.TRAIN.EMA.EVALUATE = True  # False: kept in checkpoints, and the trained weights scored
_C.TRAIN.SYNC_BN = False  # batch statistics over all processes
# spread weights, gradients and optimizer over the processes; files as without
_C.TRAIN.FSDP = False

_C.TRAIN.DISTILLATION = CfgNode()  # DeiT's, for students with a distillation head
_C.TRAIN.DISTILLATION.TYPE = "none"  # none | hard: the teacher's decisions | soft: its distribution
_C.TRAIN.DISTILLATION.TEACHER = ""  # variant, YAML file, or timm:NAME; gets the student's images
_C.TRAIN.DISTILLATION.TEACHER_WEIGHTS = ""  # its checkpoint; timm's may do without
_C.TRAIN.DISTILLATION.TEACHER_SIZE = 0  # > 0: pixels that images are resized to for the teacher
_C.TRAIN.DISTILLATION.ALPHA = 0.5  # weight of the teacher; the labels have 1 - ALPHA
_C.TRAIN.DISTILLATION.TAU = 1.0  # temperature of soft targets
_C.TRAIN.TOKEN_LABELS = CfgNode()  # LV-ViT's, for models with an auxiliary head
_C.TRAIN.TOKEN_LABELS.ENABLE = False
_C.TRAIN.TOKEN_LABELS.MAPS = ""  # folder of stored labels, LV-ViT's, in place of a teacher
_C.TRAIN.TOKEN_LABELS.TEACHER = ""  # as in DISTILLATION; names a class for each position
_C.TRAIN.TOKEN_LABELS.TEACHER_WEIGHTS = ""
_C.TRAIN.TOKEN_LABELS.TEACHER_SIZE = 0
_C.TRAIN.TOKEN_LABELS.WEIGHT = 0.5  # of the loss of the positions
_C.TRAIN.TOKEN_LABELS.MIX_ALPHA = 1.0  # MixToken's Beta distribution, instead of AUG's; 0 is off

_C.AUG = CfgNode()
_C.AUG.COLOR_JITTER = 0.4  # 0 is off; AUTO_AUGMENT takes its place where both are on, except 3a
# timm's policy string: rand-m9-mstd0.5-inc1 (RandAugment), original (AutoAugment), 3a (3-Augment of
# DeiT III), augmix-m3-w3 (AugMix) and others; none is off.
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
_C.AUG.REPROB = 0.25  # probability of random erasing
_C.AUG.REMODE = "pixel"  # pixel | const | rand
_C.AUG.RECOUNT = 1
_C.AUG.HFLIP = 0.5  # probability
_C.AUG.VFLIP = 0.0
# resized (random resized crop; images of at most 32 pixels are padded by an eighth and shifted instead) |
# simple (DeiT III: resized to cover the size, padded by 4 mirrored pixels, a window of it).
_C.AUG.CROP = "resized"
# Of the resized crop, share of the area and width / height; [1, 1] as SCALE is no crop at any size.
_C.AUG.SCALE = [0.08, 1.0]
_C.AUG.RATIO = [0.75, 1.3333333333333333]
_C.AUG.REPEATED_AUG = False  # each drawn image three times, differently augmented
_C.AUG.MIXUP = 0.8  # alpha; 0 is off
_C.AUG.CUTMIX = 1.0
_C.AUG.CUTMIX_MINMAX = None  # [smallest, largest] cut, instead of CUTMIX
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5
_C.AUG.MIXUP_MODE = "batch"  # batch | pair | elem
_C.AUG.DETECTION = CfgNode()  # with HFLIP, all that detection's training images undergo
_C.AUG.DETECTION.SHORT_SIDES = [800]  # pixels, one drawn for each image
_C.AUG.DETECTION.LONG_SIDE = 1333  # at most
_C.AUG.DETECTION.CROP = False  # DETR's: half of the images are resized, cropped and resized again
_C.AUG.DETECTION.CROP_SHORT_SIDES = [400, 500, 600]  # before that crop
_C.AUG.DETECTION.CROP_SIDES = [384, 600]  # smallest and largest side of that crop
_C.AUG.DETECTION.PHOTOMETRIC = False
_C.AUG.SEGMENTATION = CfgNode()  # with HFLIP, all that segmentation's training images undergo
_C.AUG.SEGMENTATION.RESIZE = [2048, 512]  # long and short side, times a ratio, that images fit into
_C.AUG.SEGMENTATION.RATIOS = [0.5, 2.0]  # smallest and largest of those ratios
_C.AUG.SEGMENTATION.CROP = [512, 512]  # height, width
_C.AUG.SEGMENTATION.MAX_CLASS_SHARE = 0.75  # a crop with more of one class is drawn again
_C.AUG.SEGMENTATION.PHOTOMETRIC = True

_C.TEST = CfgNode()
_C.TEST.CROP = True  # resize beyond the size, then crop the centre; else resize to the size
# size / side that is cropped from, 224 / 256; images beyond 32 pixels only
_C.TEST.CROP_RATIO = 0.875
# center: cover that side | squash: both sides to it | border: fit into it
_C.TEST.CROP_MODE = "center"
# The rest of TEST is for --eval, see docs/evaluation.md.
_C.TEST.SETS = ["val"]  # what is scored: val, and evaluation sets as NAME=PATH
_C.TEST.TTA = "none"  # views whose probabilities are averaged: none | flip | five | ten (crops)
_C.TEST.ATTACK = "none"  # adversarial images, scored too: none | fgsm | pgd
_C.TEST.ATTACK_EPS = 1.0  # largest change of a pixel, in 1/255 of its range
_C.TEST.ATTACK_STEPS = 5  # pgd
_C.TEST.ATTACK_STEP_SIZE = 0.5  # pgd: change per step, in 1/255
_C.TEST.PREDICTIONS = ""  # a .csv or .parquet file of predictions per image, in the run's folder
# Accuracy per class, confusion matrix, calibration error; dense tasks: the results of each image.
_C.TEST.REPORT = False
_C.TEST.PICTURES = 0  # dense tasks: so many images are drawn with what was found, in pictures/
_C.TEST.DETECTION = CfgNode()
_C.TEST.DETECTION.SHORT_SIDE = 800  # pixels
_C.TEST.DETECTION.LONG_SIDE = 1333  # at most
_C.TEST.DETECTION.EVALUATOR = "auto"  # auto | pycocotools | faster (pip install faster-coco-eval)
_C.TEST.SEGMENTATION = CfgNode()
_C.TEST.SEGMENTATION.RESIZE = [2048, 512]  # long and short side that images fit into
_C.TEST.SEGMENTATION.MODE = "whole"  # whole | slide: overlapping windows, whose logits are averaged
_C.TEST.SEGMENTATION.CROP = [512, 512]  # slide: height and width of a window
_C.TEST.SEGMENTATION.STRIDE = [341, 341]  # slide: between windows
_C.TEST.SEGMENTATION.SCALES = [1.0]  # factors on the size, whose probabilities are averaged
_C.TEST.SEGMENTATION.FLIP = False  # average with the mirrored image

_C.AMP_ENABLE = True  # the one switch of mixed precision
_C.AMP_DTYPE = "auto"  # auto: bf16 (else fp16) on a GPU, float32 on the CPU | bf16 | fp16
_C.AMP_OPT_LEVEL = ""  # '': native | O0: off | O1, O2: NVIDIA Apex
_C.DEVICE = "auto"  # auto: a GPU where there is one | cpu | cuda | cuda:1 (one process)
_C.CHANNELS_LAST = False
_C.COMPILE = False  # torch.compile the model
_C.COMPILE_MODE = "default"  # reduce-overhead: CUDA graphs, for batches of one size | max-autotune
_C.DETERMINISTIC = False  # the same bits on every run of the same machine, slower
_C.OUTPUT = "output"  # a run writes to OUTPUT/MODEL.NAME/TAG
_C.TAG = "default"
_C.EVAL_FREQ = 1  # epochs between evaluations (the last epoch is always evaluated)
_C.SAVE_FREQ = 1  # epochs between numbered checkpoints (last.pth is written after every epoch)
_C.SAVE_KEEP = 3  # newest numbered checkpoints that are kept; 0 keeps all
_C.SAVE_STEPS = 0  # > 0: last.pth is also written every so many optimizer steps
_C.PRINT_FREQ = 10  # batches between log lines
_C.SEED = 0
_C.EVAL_MODE = False
_C.THROUGHPUT_MODE = False
_C.INFO_MODE = False
_C.PLAN_MODE = False
_C.INFO_SIZE = []  # pixels, [height, width], that --info counts at; []: DATA.IMG_SIZE
_C.THROUGHPUT_SIZE = []  # the same, that models are timed at
_C.PLAN = CfgNode()  # what --plan takes for granted where it is not at hand
_C.PLAN.WORLD_SIZE = 0  # processes; 0, or several at hand: as many as were started
_C.PLAN.TRAIN_SIZE = 0  # training images; 0: those of the data, or of the data set of that name

# The keys that ask for something else than training.
MODE_KEYS = ("EVAL_MODE", "THROUGHPUT_MODE", "INFO_MODE", "PLAN_MODE")

# Keys of Swin's and DFvT's files that have another home here.
_ALIASES: dict[str, str] = {}

# What constructors say about their own keywords: types by annotations; blocks of a stage, or of the whole
# model, and widths are at least one; ranges and lists of heads. All other ranges are the constructors' own.
_COUNTS = ("depth", "depths", "embed_dim", "embed_dims")

_KNOWN: dict[str, Any] = {}  # architectures and heads that have a section, by its name


def _add_sections() -> None:
    """Give each registered architecture and head its section, those too that came after this import."""
    rules.CHOICES["MODEL.HEAD.TYPE"] = tuple(entry.name for entry in head_entries())
    for entry in registry.entries():
        if _add_section(_C.MODEL, "MODEL", entry):
            counted = [entry.keys[name] for name in entry.fields if name in _COUNTS]
            rules.RANGES.update(dict.fromkeys(counted, "[1, inf)"))
            _ALIASES[f"MODEL.{entry.node}.IN_CHANS"] = "MODEL.IN_CHANS"
    for entry in head_entries():
        if not _add_section(_C.MODEL.HEAD, "MODEL.HEAD", entry):
            continue
        for name, field in entry.fields.items():
            key = entry.keys[name]
            if list in field.types and key not in rules.NOT_EMPTY:
                rules.NOT_EMPTY.append(key)
            for pattern, interval in rules.HEAD_RANGES.items():
                if fnmatchcase(name, pattern) and {int, float} & {*field.types, *field.elements}:
                    rules.RANGES[key] = interval


def _add_section(parent: CfgNode, path: str, entry: Any) -> bool:
    """The section of one entry, with its defaults and types; False if it is there as it should be."""
    section = f"{path}.{entry.node}"
    if _KNOWN.get(section) is entry:
        return False
    _KNOWN[section] = entry
    parent[entry.node] = CfgNode(
        {name.upper(): copy.deepcopy(field.default) for name, field in entry.fields.items()}
    )
    for name, field in entry.fields.items():
        rules.TYPES[entry.keys[name]] = field.types
        rules.ELEMENTS[entry.keys[name]] = field.elements
    return True


_add_sections()


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
    _add_sections()
    given = [(key, value, str(file)) for key, value, file in settings(Path(cfg_file))]
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(f"--opts takes pairs of KEY VALUE, got {len(opts)} words: {opts}")
    pairs = zip(map(str, opts[::2]), opts[1::2], strict=True)
    given += [(key, value, "--opts") for key, value in pairs]
    given += [(key, value, "the command line") for key, value in (flags or {}).items()]
    config = _C.clone()
    last = {key: value for key, value, _ in given}
    kind = last.get("MODEL.TYPE", config.MODEL.TYPE)
    if "MODEL.TYPE" in last and "MODEL.NAME" not in last:
        config.MODEL.NAME = Path(cfg_file).stem  # not that of the default model
    for key, value, source in given:
        _set(config, key, value, source, str(kind))
    _follow_flags(config, opts, flags or {})
    validate(config)
    config.freeze()
    return config


def _follow_flags(config: CfgNode, opts: Sequence[Any], flags: Mapping[str, Any]) -> None:
    """Of two sources of weights, the one that the command line names counts."""
    given = {*opts[::2], *flags}
    named = "MODEL.PRETRAINED" in given and config.MODEL.PRETRAINED
    if named and "MODEL.RESUME" not in given and config.MODEL.RESUME:
        _LOG.warning(
            "--pretrained takes the place of the file's MODEL.RESUME=%r", config.MODEL.RESUME
        )
        config.MODEL.RESUME = ""


def validate(config: CfgNode) -> None:
    """Check ranges and combinations; ValueError names the key, the value and the fix.

    What only a mode needs is checked by `main.check`, so that a model can be built, timed and counted
    without the rest of a recipe: data, transforms, optimizer, an even batch for mixup.
    """
    for key in rules.RANGES:
        _check_range(key, _get(config, key))
    registry.find(config.MODEL.TYPE)
    betas = config.TRAIN.OPTIMIZER.BETAS
    if len(betas) not in (2, 3):
        raise ValueError(
            f"TRAIN.OPTIMIZER.BETAS={betas!r} must have two entries (three for timm's Adan)"
        )
    for key in rules.INTERVALS:
        limits = _get(config, key)
        if limits is not None and (len(limits) != 2 or limits[0] > limits[1]):
            raise ValueError(f"{key}={limits!r} must be [smallest, largest]")
    for key, meaning in rules.PAIRS.items():
        if len(_get(config, key)) != 2:
            raise ValueError(f"{key}={_get(config, key)!r} must be {meaning}")
    for key in rules.NOT_EMPTY:
        if not _get(config, key):
            raise ValueError(f"{key}=[] must have at least one entry")
    if config.TASK != "classification":
        find_head(config.MODEL.HEAD.TYPE, config.TASK)
        for key in rules.CLASSIFICATION_ONLY:
            if _get(config, key) != _get(_C, key):
                raise ValueError(
                    f"{key}={_get(config, key)!r} is for classification: with TASK '{config.TASK}' leave it "
                    f"{_get(_C, key)!r}"
                )
        for key, off in rules.OFF_IN_DENSE_TASKS.items():
            if _get(config, key) != off:
                raise ValueError(
                    f"{key}={_get(config, key)!r} is for classification: with TASK '{config.TASK}' set it to "
                    f"{off!r}, or name configs/_base_/dense.yaml in BASE, which does"
                )
    modes = [key for key in MODE_KEYS if config[key]]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(modes)} exclude each other: set one")
    if config.TRAIN.LR_SCHEDULER.NAME == "multistep" and not config.TRAIN.LR_SCHEDULER.MULTISTEPS:
        raise ValueError(
            "TRAIN.LR_SCHEDULER.NAME='multistep' needs epochs in LR_SCHEDULER.MULTISTEPS"
        )
    if (
        config.COMPILE
        and config.COMPILE_MODE in CUDA_GRAPH_MODES
        and config.TRAIN.ACCUMULATION_STEPS > 1
    ):
        raise ValueError(
            f"COMPILE_MODE='{config.COMPILE_MODE}' excludes TRAIN.ACCUMULATION_STEPS="
            f"{config.TRAIN.ACCUMULATION_STEPS}: a CUDA graph writes its gradients over those of the pass "
            "before. Set COMPILE_MODE to 'default' or 'max-autotune-no-cudagraphs', or accumulate nothing"
        )
    if config.TRAIN.FSDP:
        check_sharding(config.TRAIN.OPTIMIZER.NAME, config.COMPILE, config.AMP_OPT_LEVEL)
    if config.AMP_OPT_LEVEL in ("O1", "O2") and config.AMP_DTYPE == "bf16":
        raise ValueError("AMP_DTYPE='bf16' excludes AMP_OPT_LEVEL: Apex O1 and O2 work in fp16")


def checked(key: str, value: Any, source: str) -> Any:
    """`value`, which Python code gives for `key`, after the checks that `load_config` makes of that key.

    Text is not decoded: num_classes="10" is a mistake in Python. Tuples become lists.

    Args:
        source: where the value comes from, in words, for the error.

    Raises:
        ValueError: wrong type, or out of range; the message names key, value and what is allowed.
    """
    value = rules.of_type(key, value, _get(_C, key), source)
    _check_range(key, value)
    return value


def check_is_classifier(config: CfgNode, why: str) -> None:
    """ValueError unless TASK is classification; `why` says what that is needed for."""
    if config.TASK != "classification":
        raise ValueError(
            f"TASK='{config.TASK}' must be 'classification': {why}. Give a config of the classifier, such as "
            "the variant that this one has as BASE"
        )


def dump(config: CfgNode) -> str:
    """YAML text that runs the same experiment again; nodes of other architectures and heads are left out."""
    shown = config.clone()
    shown.defrost()
    del shown["BASE"]
    own = registry.find(config.MODEL.TYPE).node
    for entry in registry.entries():
        if entry.node != own:
            del shown.MODEL[entry.node]
    for head in head_entries():
        if head.task != config.TASK or head.name != config.MODEL.HEAD.TYPE:
            del shown.MODEL.HEAD[head.node]
    return shown.dump(sort_keys=False)


def output_dir(config: CfgNode) -> Path:
    """Folder that the run writes to."""
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def all_keys() -> list[str]:
    """Every config key with its full path, sorted."""
    return sorted(key for key, _ in leaves(_C))


def _check_range(key: str, value: Any) -> None:
    """ValueError if a number of `value` is out of the key's interval, or an image size is no size."""
    rules.check_range(key, value)
    if key == "DATA.IMG_SIZE" or (key in ("INFO_SIZE", "THROUGHPUT_SIZE") and value):
        to_pair(value, key)


def _get(config: CfgNode, key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node[name]
    return node


def _set(config: CfgNode, key: str, value: Any, source: str, kind: str) -> None:
    """Set a key of a config of the architecture `kind`, after checking that it exists, and the type."""
    if key == "BASE":
        raise ValueError(f"BASE = {value!r} in {source}: only YAML files name their parents")
    if key in rules.INERT:
        default, reason = rules.INERT[key]
        if (rules.decoded(value) if isinstance(value, str) else value) != default:
            _LOG.warning("%s=%r (%s) has no effect: %s", key, value, source, reason)
        return
    key = _spelling(key)
    if key in _ALIASES:
        if key.split(".")[1] != registry.find(kind).node:
            return  # a section that nothing reads: Swin writes all of them into its files
        key = _ALIASES[key]
    *path, name = key.split(".")
    node: Any = config
    for part in path:
        node = node.get(part) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or name not in node:
        raise ValueError(
            f"unknown config key {key} = {value!r} in {source}; "
            f"did you mean one of {nearest(key, [*all_keys(), *rules.INERT])[:3]}?"
        )
    if isinstance(node[name], CfgNode):
        keys = list(node[name])
        raise ValueError(f"{key} = {value!r} in {source}: {key} is a section, its keys are {keys}")
    node[name] = rules.typed(key, value, _get(_C, key), source)


def _spelling(key: str) -> str:
    """Node names of architectures match without regard to case, as MODEL.TYPE does."""
    parts = key.split(".")
    if len(parts) == 3 and parts[0] == "MODEL":
        nodes = {entry.node.lower(): entry.node for entry in registry.entries()}
        parts[1] = nodes.get(parts[1].lower(), parts[1])
    return ".".join(parts)
