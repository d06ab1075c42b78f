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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from yacs.config import CfgNode

import models  # noqa: F401  importing it registers every architecture
from models import registry
from models.heads import find_head, head_entries
from models.layers.tokens import to_pair
from utils.sharding import check_sharding
from utils.spelling import nearest
from utils.wrappers import COMPILE_MODES, CUDA_GRAPH_MODES

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
_C.DATA.DECODER = (
    "pil"  # pil | cv2 | simplejpeg (pip install simplejpeg): JPEGs faster, equal within rounding
)
_C.DATA.DECODE_MIN_SIDE = 0  # > 0: decode JPEGs at 1/2, 1/4, ..., no side below this; inexact, fast
_C.DATA.ON_DEVICE = False  # small datasets (cifar10, digits): all images on the device, no workers
_C.DATA.ON_ERROR = "raise"  # unreadable image: raise | skip (logged, counted; classification only)
_C.DATA.MEAN = [0.485, 0.456, 0.406]  # per channel, of values in [0, 1]; one entry stands for all
_C.DATA.STD = [0.229, 0.224, 0.225]
_C.DATA.SYNTHETIC = CfgNode()  # DATASET: synthetic, random images for smoke runs
_C.DATA.SYNTHETIC.TRAIN_SIZE = 256  # images
_C.DATA.SYNTHETIC.VAL_SIZE = 64
_C.DATA.SYNTHETIC.NUM_CLASSES = 10
_C.DATA.LISTS = (
    CfgNode()
)  # DATASET: lists, text files of `path label`; docs/data.md has all formats
_C.DATA.LISTS.TRAIN = []  # list files, one or several jointly, relative to DATA_PATH
_C.DATA.LISTS.VAL = []
_C.DATA.LISTS.IMAGES = ""  # folder that the listed paths are relative to, below DATA_PATH
_C.DATA.LISTS.CLASSES = ""  # file with a class name per line; '': classes.txt, or named by folders
_C.DATA.DOMAINNET = CfgNode()  # DATASET: domainnet or pacs
_C.DATA.DOMAINNET.DOMAINS = []  # one domain, or several jointly; []: all of them
_C.DATA.INAT = CfgNode()  # DATASET: inat2018 or inat2019
_C.DATA.INAT.CATEGORY = (
    "name"  # kingdom | phylum | class | order | supercategory | family | genus | name
)
_C.DATA.WEBDATASET = CfgNode()  # DATASET: webdataset
_C.DATA.WEBDATASET.TRAIN = (
    ""  # shards below DATA_PATH, train-{000..146}.tar; '': by the split's name
)
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
_C.DATA.PAIRS.VAL_MASKS = "annotations/val"
_C.DATA.PAIRS.PALETTE = ""  # masks in colours: file with `R G B name` per label
_C.DATA.PAIRS.CLASSES = ""  # file with a class name per line
_C.DATA.PAIRS.REDUCE_ZERO_LABEL = False

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
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 is off
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
_C.TRAIN.EMA.EVALUATE = True  # False: kept in checkpoints, and the trained weights scored
_C.TRAIN.SYNC_BN = False  # batch statistics over all processes
_C.TRAIN.FSDP = (
    False  # spread weights, gradients and optimizer over the processes; files as without
)

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
_C.TEST.CROP_RATIO = (
    0.875  # size / side that is cropped from, 224 / 256; images beyond 32 pixels only
)
_C.TEST.CROP_MODE = (
    "center"  # center: cover that side | squash: both sides to it | border: fit into it
)
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

for _entry in registry.entries():
    _C.MODEL[_entry.node] = CfgNode(
        {name.upper(): copy.deepcopy(field.default) for name, field in _entry.fields.items()}
    )

for _head in head_entries():
    _C.MODEL.HEAD[_head.node] = CfgNode(
        {name.upper(): copy.deepcopy(field.default) for name, field in _head.fields.items()}
    )

# Types beyond that of the default, and those of list elements where the default does not show them.
# Architecture nodes get theirs from the constructors' annotations.
_TYPES: dict[str, tuple[type, ...]] = {
    "DATA.IMG_SIZE": (int, list),
    "MODEL.NUM_CLASSES": (int, type(None)),
    "TRAIN.WARMUP_EPOCHS": (int, float),
    "TRAIN.WEIGHT_DECAY_END": (float, type(None)),
    "TRAIN.BCE_THRESHOLD": (float, type(None)),
    "AUG.CUTMIX_MINMAX": (list, type(None)),
}
_ELEMENTS: dict[str, tuple[type, ...]] = {
    "DATA.LISTS.TRAIN": (str,),
    "DATA.LISTS.VAL": (str,),
    "DATA.DOMAINNET.DOMAINS": (str,),
    "DATA.IMG_SIZE": (int,),
    "TRAIN.FREEZE": (str,),
    "TRAIN.LR_MULTIPLIERS": (str,),
    "TRAIN.NO_WEIGHT_DECAY": (str,),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": (int, float),
    "AUG.CUTMIX_MINMAX": (float,),
    "INFO_SIZE": (int,),
    "THROUGHPUT_SIZE": (int,),
}
for _entry in [*registry.entries(), *head_entries()]:
    for _name, _field in _entry.fields.items():
        _TYPES[_entry.keys[_name]] = _field.types
        _ELEMENTS[_entry.keys[_name]] = _field.elements

_CHOICES: dict[str, tuple[str, ...]] = {
    "TASK": ("classification", "detection", "segmentation"),
    "MODEL.HEAD.TYPE": tuple(entry.name for entry in head_entries()),
    "TEST.DETECTION.EVALUATOR": ("auto", "pycocotools", "faster"),
    "TEST.SEGMENTATION.MODE": ("whole", "slide"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.CACHE_MODE": ("no", "full", "part"),
    "DATA.INAT.CATEGORY": (
        "kingdom",
        "phylum",
        "class",
        "order",
        "supercategory",
        "family",
        "genus",
        "name",
    ),
    "DATA.ON_ERROR": ("raise", "skip"),
    "DATA.DECODER": ("pil", "cv2", "simplejpeg"),
    "TRAIN.LOSS": ("cross_entropy", "bce"),
    "TRAIN.DISTILLATION.TYPE": ("none", "soft", "hard"),
    "TRAIN.LR_SCALING": ("linear", "base", "none"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step", "multistep", "poly"),
    "AUG.CROP": ("resized", "simple"),
    "AUG.REMODE": ("pixel", "const", "rand"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "TEST.CROP_MODE": ("center", "squash", "border"),
    "TEST.TTA": ("none", "flip", "five", "ten"),
    "TEST.ATTACK": ("none", "fgsm", "pgd"),
    "AMP_DTYPE": ("auto", "bf16", "fp16"),
    "COMPILE_MODE": COMPILE_MODES,
    "AMP_OPT_LEVEL": ("", "O0", "O1", "O2"),
}

# Keywords of architectures that count blocks.
_BLOCKS = ("depth", "depths")

# The interval of a number, or of each number of a list; a round bracket leaves its end out.
_RANGES: dict[str, str] = {
    "DATA.BATCH_SIZE": "[1, inf)",
    "DATA.IMG_SIZE": "[1, inf)",
    "DATA.NUM_WORKERS": "[0, inf)",
    "DATA.DECODE_MIN_SIDE": "[0, inf)",
    "DATA.SIZE_DIVISOR": "[1, inf)",
    "DATA.MEAN": "[0, 1]",
    "DATA.STD": "(0, inf)",
    "DATA.SYNTHETIC.TRAIN_SIZE": "[1, inf)",
    "DATA.SYNTHETIC.VAL_SIZE": "[1, inf)",
    "DATA.SYNTHETIC.NUM_CLASSES": "[1, inf)",
    "MODEL.NUM_CLASSES": "[0, inf)",
    "MODEL.IN_CHANS": "[1, inf)",
    "MODEL.DROP_RATE": "[0, 1)",
    "MODEL.DROP_PATH_RATE": "[0, 1)",
    "MODEL.LABEL_SMOOTHING": "[0, 1)",
    "TRAIN.START_EPOCH": "[0, inf)",
    "TRAIN.EPOCHS": "[0, inf)",
    "TRAIN.MAX_STEPS": "[0, inf)",
    "TRAIN.WARMUP_EPOCHS": "[0, inf)",
    "TRAIN.WARMUP_STEPS": "[0, inf)",
    "TRAIN.WEIGHT_DECAY": "[0, inf)",
    "TRAIN.WEIGHT_DECAY_END": "[0, inf)",
    "TRAIN.BASE_LR": "[0, inf)",
    "TRAIN.WARMUP_LR": "[0, inf)",
    "TRAIN.MIN_LR": "[0, inf)",
    "TRAIN.CLIP_GRAD": "[0, inf)",
    "TRAIN.ACCUMULATION_STEPS": "[0, inf)",
    "TRAIN.LAYER_DECAY": "(0, 1]",
    "TRAIN.BCE_THRESHOLD": "[0, 1)",
    "TRAIN.DISTILLATION.TEACHER_SIZE": "[0, inf)",
    "TRAIN.DISTILLATION.ALPHA": "[0, 1]",
    "TRAIN.DISTILLATION.TAU": "(0, inf)",
    "TRAIN.TOKEN_LABELS.TEACHER_SIZE": "[0, inf)",
    "TRAIN.TOKEN_LABELS.WEIGHT": "[0, inf)",
    "TRAIN.TOKEN_LABELS.MIX_ALPHA": "[0, inf)",
    "TRAIN.FREEZE_DEPTH": "[0, inf)",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": "[1, inf)",
    "TRAIN.LR_SCHEDULER.DECAY_RATE": "(0, 1]",
    "TRAIN.LR_SCHEDULER.GAMMA": "(0, 1]",
    "TRAIN.LR_SCHEDULER.MULTISTEPS": "[0, inf)",
    "TRAIN.LR_SCHEDULER.POWER": "(0, inf)",
    "TRAIN.OPTIMIZER.EPS": "[0, inf)",
    "TRAIN.OPTIMIZER.BETAS": "[0, 1)",
    "TRAIN.OPTIMIZER.MOMENTUM": "[0, 1)",
    "TRAIN.EMA.DECAY": "[0, 1)",
    "AUG.COLOR_JITTER": "[0, inf)",
    "AUG.REPROB": "[0, 1]",
    "AUG.RECOUNT": "[1, inf)",
    "AUG.HFLIP": "[0, 1]",
    "AUG.VFLIP": "[0, 1]",
    "AUG.SCALE": "(0, 1]",
    "AUG.RATIO": "(0, inf)",
    "AUG.DETECTION.SHORT_SIDES": "[1, inf)",
    "AUG.DETECTION.LONG_SIDE": "[1, inf)",
    "AUG.DETECTION.CROP_SHORT_SIDES": "[1, inf)",
    "AUG.DETECTION.CROP_SIDES": "[1, inf)",
    "AUG.SEGMENTATION.RESIZE": "[1, inf)",
    "AUG.SEGMENTATION.RATIOS": "(0, inf)",
    "AUG.SEGMENTATION.CROP": "[1, inf)",
    "AUG.SEGMENTATION.MAX_CLASS_SHARE": "(0, 1]",
    "AUG.MIXUP": "[0, inf)",
    "AUG.CUTMIX": "[0, inf)",
    "AUG.CUTMIX_MINMAX": "[0, 1]",
    "AUG.MIXUP_PROB": "[0, 1]",
    "AUG.MIXUP_SWITCH_PROB": "[0, 1]",
    "TEST.CROP_RATIO": "(0, 1]",
    "TEST.ATTACK_EPS": "[0, 255]",
    "TEST.ATTACK_STEPS": "[1, inf)",
    "TEST.ATTACK_STEP_SIZE": "[0, 255]",
    "TEST.PICTURES": "[0, inf)",
    "TEST.DETECTION.SHORT_SIDE": "[1, inf)",
    "TEST.DETECTION.LONG_SIDE": "[1, inf)",
    "TEST.SEGMENTATION.RESIZE": "[1, inf)",
    "TEST.SEGMENTATION.CROP": "[1, inf)",
    "TEST.SEGMENTATION.STRIDE": "[1, inf)",
    "TEST.SEGMENTATION.SCALES": "(0, inf)",
    "INFO_SIZE": "[1, inf)",
    "THROUGHPUT_SIZE": "[1, inf)",
    "EVAL_FREQ": "[1, inf)",
    "SAVE_FREQ": "[1, inf)",
    "SAVE_KEEP": "[0, inf)",
    "SAVE_STEPS": "[0, inf)",
    "PRINT_FREQ": "[1, inf)",
    "SEED": "[0, inf)",
    "PLAN.WORLD_SIZE": "[0, inf)",
    "PLAN.TRAIN_SIZE": "[0, inf)",
}
_NOT_EMPTY = (
    "AUG.DETECTION.SHORT_SIDES",
    "AUG.DETECTION.CROP_SHORT_SIDES",
    "TEST.SEGMENTATION.SCALES",
    *(
        _entry.keys[_name]
        for _entry in head_entries()
        for _name, _field in _entry.fields.items()
        if list in _field.types
    ),
)
# Keys that a dense task would silently leave out: they keep their defaults there,
_CLASSIFICATION_ONLY = (
    "DATA.ZIP_MODE",
    "DATA.ON_DEVICE",
    "DATA.ON_ERROR",  # an image that is skipped would be missing in the scores
    "DATA.DECODE_MIN_SIDE",
    "TRAIN.LOSS",
    "TRAIN.DISTILLATION.TYPE",
    "TRAIN.TOKEN_LABELS.ENABLE",
    "AUG.VFLIP",
    "AUG.CUTMIX_MINMAX",
    "AUG.REPEATED_AUG",
    "TEST.SETS",
    "TEST.TTA",
    "TEST.ATTACK",
    "TEST.PREDICTIONS",
)
# or, where the default is a recipe for classification, must be off.
_OFF_IN_DENSE_TASKS = {
    "MODEL.LABEL_SMOOTHING": 0.0,
    "AUG.COLOR_JITTER": 0.0,
    "AUG.AUTO_AUGMENT": "none",
    "AUG.REPROB": 0.0,
    "AUG.MIXUP": 0.0,
    "AUG.CUTMIX": 0.0,
}
# Lists that are an interval, and lists that are a pair.
_INTERVALS = (
    "AUG.SCALE",
    "AUG.RATIO",
    "AUG.CUTMIX_MINMAX",
    "AUG.DETECTION.CROP_SIDES",
    "AUG.SEGMENTATION.RATIOS",
)
_PAIRS = {
    "AUG.SEGMENTATION.RESIZE": "[long side, short side]",
    "AUG.SEGMENTATION.CROP": "[height, width]",
    "TEST.SEGMENTATION.RESIZE": "[long side, short side]",
    "TEST.SEGMENTATION.CROP": "[height, width]",
    "TEST.SEGMENTATION.STRIDE": "[height, width]",
}
# Blocks of a stage, or of the whole model: none is no stage. All other ranges are the constructors' own.
for _entry in registry.entries():
    _RANGES |= {_entry.keys[_name]: "[1, inf)" for _name in _entry.fields if _name in _BLOCKS}

# The same for numbers among the keywords of heads, by patterns of their names that do not overlap.
_HEAD_RANGES = {
    "*channels": "[1, inf)",
    "*convs": "[0, inf)",
    "fc_dim": "[1, inf)",
    "dropout": "[0, 1]",
    "pool_scales": "[1, inf)",
    "anchor_*": "(0, inf)",
    "scales_per_octave": "[1, inf)",
    "*_iou": "[0, 1]",
    "*_threshold": "[0, 1]",
    "*_fraction": "[0, 1]",
    "*_weight": "[0, inf)",
    "*_batch": "[1, inf)",
    "*candidates*": "[1, inf)",
    "*_proposals": "[1, inf)",
    "roi_size": "[1, inf)",
    "roi_sampling": "[0, inf)",
    "focal_alpha": "[0, 1]",
    "focal_gamma": "[0, inf)",
    "prior": "(0, 1)",
    "detections_per_image": "[1, inf)",
    "soft_nms_sigma": "(0, inf)",
    "soft_nms_min_score": "[0, 1]",
}
_RANGES |= {
    _entry.keys[_name]: _interval
    for _entry in head_entries()
    for _name, _field in _entry.fields.items()
    for _pattern, _interval in _HEAD_RANGES.items()
    if fnmatchcase(_name, _pattern) and {int, float} & {*_field.types, *_field.elements}
}

# Keys of Swin's and DFvT's files that have another home here.
_ALIASES = {f"MODEL.{entry.node}.IN_CHANS": "MODEL.IN_CHANS" for entry in registry.entries()}

# Keys of Swin's files that are accepted and do nothing: their default there, and why.
_NO_SIMMIM = "SimMIM pre-training is not part of MixLab"
_NO_MOE = "mixture-of-experts models are not part of MixLab"
_IN_ORDER = "evaluation is always in order and exact"
_INERT: dict[str, tuple[Any, str]] = {
    "DATA.MASK_PATCH_SIZE": (32, _NO_SIMMIM),
    "DATA.MASK_RATIO": (0.6, _NO_SIMMIM),
    "MODEL.SIMMIM.NORM_TARGET.ENABLE": (False, _NO_SIMMIM),
    "MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE": (47, _NO_SIMMIM),
    "MODEL.SWIN_MOE.PATCH_SIZE": (4, _NO_MOE),
    "MODEL.SWIN_MOE.IN_CHANS": (3, _NO_MOE),
    "MODEL.SWIN_MOE.EMBED_DIM": (96, _NO_MOE),
    "MODEL.SWIN_MOE.DEPTHS": ([2, 2, 6, 2], _NO_MOE),
    "MODEL.SWIN_MOE.NUM_HEADS": ([3, 6, 12, 24], _NO_MOE),
    "MODEL.SWIN_MOE.WINDOW_SIZE": (7, _NO_MOE),
    "MODEL.SWIN_MOE.MLP_RATIO": (4.0, _NO_MOE),
    "MODEL.SWIN_MOE.QKV_BIAS": (True, _NO_MOE),
    "MODEL.SWIN_MOE.QK_SCALE": (None, _NO_MOE),
    "MODEL.SWIN_MOE.APE": (False, _NO_MOE),
    "MODEL.SWIN_MOE.PATCH_NORM": (True, _NO_MOE),
    "MODEL.SWIN_MOE.MLP_FC2_BIAS": (True, _NO_MOE),
    "MODEL.SWIN_MOE.INIT_STD": (0.02, _NO_MOE),
    "MODEL.SWIN_MOE.PRETRAINED_WINDOW_SIZES": ([0, 0, 0, 0], _NO_MOE),
    "MODEL.SWIN_MOE.MOE_BLOCKS": ([[-1], [-1], [-1], [-1]], _NO_MOE),
    "MODEL.SWIN_MOE.NUM_LOCAL_EXPERTS": (1, _NO_MOE),
    "MODEL.SWIN_MOE.TOP_VALUE": (1, _NO_MOE),
    "MODEL.SWIN_MOE.CAPACITY_FACTOR": (1.25, _NO_MOE),
    "MODEL.SWIN_MOE.COSINE_ROUTER": (False, _NO_MOE),
    "MODEL.SWIN_MOE.NORMALIZE_GATE": (False, _NO_MOE),
    "MODEL.SWIN_MOE.USE_BPR": (True, _NO_MOE),
    "MODEL.SWIN_MOE.IS_GSHARD_LOSS": (False, _NO_MOE),
    "MODEL.SWIN_MOE.GATE_NOISE": (1.0, _NO_MOE),
    "MODEL.SWIN_MOE.COSINE_ROUTER_DIM": (256, _NO_MOE),
    "MODEL.SWIN_MOE.COSINE_ROUTER_INIT_T": (0.5, _NO_MOE),
    "MODEL.SWIN_MOE.MOE_DROP": (0.0, _NO_MOE),
    "MODEL.SWIN_MOE.AUX_LOSS_WEIGHT": (0.01, _NO_MOE),
    "TRAIN.MOE.SAVE_MASTER": (False, _NO_MOE),
    "TEST.SEQUENTIAL": (False, _IN_ORDER),
    "TEST.SHUFFLE": (False, _IN_ORDER),
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
    """Check ranges and combinations; ValueError names the key, the value and the fix.

    What only a mode needs is checked by `main.check`, so that a model can be built, timed and counted
    without the rest of a recipe: data, transforms, optimizer, an even batch for mixup.
    """
    for key in _RANGES:
        _check_range(key, _get(config, key))
    registry.find(config.MODEL.TYPE)
    betas = config.TRAIN.OPTIMIZER.BETAS
    if len(betas) not in (2, 3):
        raise ValueError(
            f"TRAIN.OPTIMIZER.BETAS={betas!r} must have two entries (three for timm's Adan)"
        )
    for key in _INTERVALS:
        limits = _get(config, key)
        if limits is not None and (len(limits) != 2 or limits[0] > limits[1]):
            raise ValueError(f"{key}={limits!r} must be [smallest, largest]")
    for key, meaning in _PAIRS.items():
        if len(_get(config, key)) != 2:
            raise ValueError(f"{key}={_get(config, key)!r} must be {meaning}")
    for key in _NOT_EMPTY:
        if not _get(config, key):
            raise ValueError(f"{key}=[] must have at least one entry")
    if config.TASK != "classification":
        find_head(config.MODEL.HEAD.TYPE, config.TASK)
        for key in _CLASSIFICATION_ONLY:
            if _get(config, key) != _get(_C, key):
                raise ValueError(
                    f"{key}={_get(config, key)!r} is for classification: with TASK '{config.TASK}' leave it "
                    f"{_get(_C, key)!r}"
                )
        for key, off in _OFF_IN_DENSE_TASKS.items():
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
    value = _of_type(key, value, source)
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
    base = content.pop("BASE", None) or []
    parents = [base] if isinstance(base, str) else base
    if not isinstance(parents, list) or not all(isinstance(p, str | None) for p in parents):
        raise ValueError(f"BASE={base!r} in {path} must be a YAML file, or a list of them")
    for parent in parents:
        if parent:
            _merge_file(config, path.parent / parent, (*chain, path.resolve()))
    for key, value in _leaves(content):
        _set(config, key, value, str(path))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[Any]:
    """Full keys of a CfgNode, or (full key, value) pairs of a plain dict of YAML."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key if isinstance(tree, CfgNode) else (key, value)


def _within(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _check_range(key: str, value: Any) -> None:
    """ValueError if a number of `value` is out of the key's interval, or an image size is no size."""
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    if key in _RANGES and not all(_within(number, _RANGES[key]) for number in numbers):
        raise ValueError(f"{key}={value!r} must be within {_RANGES[key]}")
    if key == "DATA.IMG_SIZE" or (key in ("INFO_SIZE", "THROUGHPUT_SIZE") and value):
        to_pair(value, key)


def _get(config: CfgNode, key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node[name]
    return node


def _set(config: CfgNode, key: str, value: Any, source: str) -> None:
    """Set one key after checking that it exists and that the value has its type."""
    if key in _INERT:
        default, reason = _INERT[key]
        if (_decoded(value) if isinstance(value, str) else value) != default:
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
            f"did you mean one of {nearest(key, [*all_keys(), *_INERT])[:3]}?"
        )
    if isinstance(node[name], CfgNode):
        keys = list(node[name])
        raise ValueError(f"{key} = {value!r} in {source}: {key} is a section, its keys are {keys}")
    node[name] = _typed(key, value, source)


def _spelling(key: str) -> str:
    """Node names of architectures match without regard to case, as MODEL.TYPE does."""
    parts = key.split(".")
    if len(parts) == 3 and parts[0] == "MODEL":
        nodes = {entry.node.lower(): entry.node for entry in registry.entries()}
        parts[1] = nodes.get(parts[1].lower(), parts[1])
    return ".".join(parts)


def _typed(key: str, value: Any, source: str) -> Any:
    """What a file or a command line says -> one of the key's types, in the spelling of its choice."""
    allowed = _allowed(key)
    if isinstance(value, str) and str not in allowed:
        value = _decoded(value)
    elif value is None and type(None) not in allowed and str in allowed:
        value = ""  # an empty entry of a YAML file
    elif value is False and "no" in _CHOICES.get(key, ()):
        value = "no"  # YAML 1.1 reads a bare no as False
    elif type(value) in (int, float) and allowed == (str,):
        value = str(value)  # TAG: 1
    value = _of_type(key, value, source)
    return _chosen(key, value, source) if key in _CHOICES else value


def _of_type(key: str, value: Any, source: str) -> Any:
    """`value` in one of the key's types, tuples as lists, or ValueError."""
    allowed = _allowed(key)
    if isinstance(value, tuple):
        value = list(value)
    value = _converted(value, allowed)
    if type(value) not in allowed:
        quotes = "; put it in quotes" if allowed == (str,) else ""
        raise ValueError(
            f"{key}={value!r} in {source} must be {_names(allowed)}, "
            f"not {type(value).__name__}{quotes}"
        )
    if isinstance(value, list):
        kinds = _ELEMENTS.get(key) or tuple({type(element) for element in _get(_C, key)})
        value = [_converted(element, kinds) for element in value]
        if not all(type(element) in kinds for element in value):
            raise ValueError(f"{key}={value!r} in {source} must be a list of {_names(kinds)}")
    return value


def _allowed(key: str) -> tuple[type, ...]:
    return _TYPES.get(key) or (type(_get(_C, key)),)


def _converted(value: Any, allowed: tuple[type, ...]) -> Any:
    """Numbers of NumPy become Python's; whole ones may stand where fractions are asked for."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is int and int not in allowed and float in allowed:
        return float(value)
    return value


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)


def _chosen(key: str, value: str, source: str) -> str:
    """The choice that `value` spells, case aside, or ValueError with the nearest one."""
    choices = _CHOICES[key]
    spelling = {choice.lower(): choice for choice in choices}
    if value.lower() not in spelling:
        close = nearest(value, choices, 1)
        hint = f"; did you mean {close[0]!r}?" if len(close) == 1 else ""
        raise ValueError(f"{key}={value!r} must be one of {list(choices)}, in {source}{hint}")
    return spelling[value.lower()]


def _decoded(text: str) -> Any:
    """The value that `text` spells: a Python literal (1e-3 is text in YAML 1.1), or YAML, or itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # which the check of its type names
