"""Which values the keys of `config.py` take: types, choices and ranges, and old keys that do nothing.

`config.py` adds what the constructors of architectures and heads say about their own keywords.
"""

import ast
from typing import Any

import numpy as np
import yaml

from .spelling import nearest
from .wrappers import COMPILE_MODES

# Types beyond that of the default, and those of list elements where the default does not show them.
TYPES: dict[str, tuple[type, ...]] = {
    "DATA.IMG_SIZE": (int, list),
    "MODEL.NUM_CLASSES": (int, type(None)),
    "TRAIN.WARMUP_EPOCHS": (int, float),
    "TRAIN.WEIGHT_DECAY_END": (float, type(None)),
    "TRAIN.BCE_THRESHOLD": (float, type(None)),
    "TRAIN.CLIP_GRAD": (float, type(None)),
    "AUG.CUTMIX_MINMAX": (list, type(None)),
}
ELEMENTS: dict[str, tuple[type, ...]] = {
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

CHOICES: dict[str, tuple[str, ...]] = {
    "TASK": ("classification", "detection", "segmentation"),
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

# The interval of a number, or of each number of a list; a round bracket leaves its end out.
RANGES: dict[str, str] = {
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
    "SEED": "[0, 4611686018427387904]",  # 2**62: each process adds its rank
    "PLAN.WORLD_SIZE": "[0, inf)",
    "PLAN.TRAIN_SIZE": "[0, inf)",
}
NOT_EMPTY = [
    "AUG.DETECTION.SHORT_SIDES",
    "AUG.DETECTION.CROP_SHORT_SIDES",
    "TEST.SEGMENTATION.SCALES",
]
# Keys that a dense task would silently leave out: they keep their defaults there,
CLASSIFICATION_ONLY = (
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
OFF_IN_DENSE_TASKS = {
    "MODEL.LABEL_SMOOTHING": 0.0,
    "AUG.COLOR_JITTER": 0.0,
    "AUG.AUTO_AUGMENT": "none",
    "AUG.REPROB": 0.0,
    "AUG.MIXUP": 0.0,
    "AUG.CUTMIX": 0.0,
}
# Lists that are an interval, and lists that are a pair.
INTERVALS = (
    "AUG.SCALE",
    "AUG.RATIO",
    "AUG.CUTMIX_MINMAX",
    "AUG.DETECTION.CROP_SIDES",
    "AUG.SEGMENTATION.RATIOS",
)
PAIRS = {
    "AUG.SEGMENTATION.RESIZE": "[long side, short side]",
    "AUG.SEGMENTATION.CROP": "[height, width]",
    "TEST.SEGMENTATION.RESIZE": "[long side, short side]",
    "TEST.SEGMENTATION.CROP": "[height, width]",
    "TEST.SEGMENTATION.STRIDE": "[height, width]",
}

# The intervals of numbers among the keywords of heads, by patterns of their names that do not overlap.
HEAD_RANGES = {
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

# Keys of Swin's files that are accepted and do nothing: their default there, and why.
_NO_SIMMIM = "SimMIM pre-training is not part of MixLab"
_NO_MOE = "mixture-of-experts models are not part of MixLab"
_IN_ORDER = "evaluation is always in order and exact"
INERT: dict[str, tuple[Any, str]] = {
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


def typed(key: str, value: Any, default: Any, source: str) -> Any:
    """What a file or a command line says -> one of the key's types, in the spelling of its choice.

    Args:
        default: the key's own, whose type is the allowed one where TYPES does not name others.
        source: where the value comes from, in words, for the error.

    Raises:
        ValueError: another type, or none of the choices.
    """
    allowed = _allowed(key, default)
    if isinstance(value, str) and str not in allowed:
        value = decoded(value)
    elif value is None and type(None) not in allowed and str in allowed:
        value = ""  # an empty entry of a YAML file
    elif value is False and "no" in CHOICES.get(key, ()):
        value = "no"  # YAML 1.1 reads a bare no as False
    elif type(value) in (int, float) and allowed == (str,):
        value = str(value)  # TAG: 1
    value = of_type(key, value, default, source)
    return _chosen(key, value, source) if key in CHOICES else value


def of_type(key: str, value: Any, default: Any, source: str) -> Any:
    """`value` in one of the key's types, tuples as lists, or ValueError; text is not decoded."""
    allowed = _allowed(key, default)
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
        kinds = ELEMENTS.get(key) or tuple({type(element) for element in default})
        value = [_converted(element, kinds) for element in value]
        if not all(type(element) in kinds for element in value):
            raise ValueError(f"{key}={value!r} in {source} must be a list of {_names(kinds)}")
    return value


def check_range(key: str, value: Any) -> None:
    """ValueError if `value`, or a number of it, is out of the key's interval."""
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    if key in RANGES and not all(_within(number, RANGES[key]) for number in numbers):
        raise ValueError(f"{key}={value!r} must be within {RANGES[key]}")


def decoded(text: str) -> Any:
    """The value that `text` spells: a Python literal (1e-3 is text in YAML 1.1), or YAML, or itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # which the check of its type names


def _within(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def _allowed(key: str, default: Any) -> tuple[type, ...]:
    return TYPES.get(key) or (type(default),)


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
    choices = CHOICES[key]
    spelling = {choice.lower(): choice for choice in choices}
    if value.lower() not in spelling:
        close = nearest(value, choices, 1)
        hint = f"; did you mean {close[0]!r}?" if len(close) == 1 else ""
        raise ValueError(f"{key}={value!r} must be one of {list(choices)}, in {source}{hint}")
    return spelling[value.lower()]
