"""Translate a command line of DeiT's program, or of one built on it, into ours.

    python tools/translate_flags.py -- python -m torch.distributed.launch --nproc_per_node 8 main.py \
        --model deit_small_patch16_shrink_base --base_keep_rate 0.7 --fuse_token --shrink_epochs 100 \
        --batch-size 128 --data-set IMNET --data-path /data/imagenet --output_dir output

Prints the line, a YAML file that says the same (--yaml FILE writes it), and which of the given flags have
no counterpart, and why. Flags that were not given have that program's defaults, as they would there; what
equals the variant's own file is left out. For the programs of DeiT (with DeiT III's flags, and with its
run_with_submitit.py), DilateFormer, DHVT, EViT and VTPACK; Swin's and DFvT's need no translation.
"""

import argparse
import ast
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import load_config  # noqa: E402  found through the line above
from models import list_models, registry, variant_file  # noqa: E402
from optimizer import DEFAULT_EPS, OWN_OPTIMIZERS  # noqa: E402
from utils.arguments import FLAGS as OWN_FLAGS  # noqa: E402
from utils.spelling import nearest  # noqa: E402

Settings = dict[str, Any]  # config key -> value


class Flag(NamedTuple):
    """One flag of the seeds.

    Attributes:
        kind: type of its argument, [type] of several, or bool, which takes none.
        default: the programs'; None is off, or left to the recipe.
        target: the config key, or what makes settings of the value and of all values.
        opposite: it has a --no- form.
    """

    kind: Any
    default: Any
    target: str | Callable[[Any, argparse.Namespace], Settings]
    opposite: bool = False


def _average(keep: bool, _: argparse.Namespace) -> Settings:
    return {"TRAIN.EMA.ENABLE": keep} | ({"TRAIN.EMA.EVALUATE": False} if keep else {})


def _data_set(name: str, values: argparse.Namespace) -> Settings:
    formats = dict(IMNET="imagenet", CIFAR="cifar100", INAT="inat2018", INAT19="inat2019")
    if name in _DOMAINS:
        settings: Settings = {"DATA.DATASET": "domainnet", "DATA.DOMAINNET.DOMAINS": [name]}
        # There it is the folder of the domain, here that of all of them.
        if values.data_path and Path(values.data_path).name == name:
            settings["DATA.DATA_PATH"] = str(Path(values.data_path).parent)
        return settings
    known = {**formats, "CIFAR-10": "cifar10"}
    if name not in known:
        raise ValueError(f"--data-set {name} must be one of {[*known, *_DOMAINS]}")
    return {"DATA.DATASET": known[name]}


def _binary(*_: Any) -> Settings:
    """Every class that is mixed in becomes 1; with smoothing all classes would, so there is none."""
    return {"TRAIN.LOSS": "bce", "TRAIN.BCE_THRESHOLD": 0.0, "MODEL.LABEL_SMOOTHING": 0.0}


def _three_augment(*_: Any) -> Settings:
    """It takes the place of all other augmentation, and erases nothing."""
    return {"AUG.AUTO_AUGMENT": "3a", "AUG.REPROB": 0.0, "DATA.INTERPOLATION": "bicubic"}


def _simple_crop(_: bool, values: argparse.Namespace) -> Settings:
    """Only --ThreeAugment looks at it."""
    return {"AUG.CROP": "simple"} if values.ThreeAugment else {}


def _optimizer(name: str, _: argparse.Namespace) -> Settings:
    apex = dict(fusedadam="fused_adam", fusedlamb="fused_lamb")
    return {"TRAIN.OPTIMIZER.NAME": apex.get(name, name)}


def _decay_epochs(epochs: float, _: argparse.Namespace) -> Settings:
    return {"TRAIN.LR_SCHEDULER.DECAY_EPOCHS": int(epochs) if epochs.is_integer() else epochs}


def _lmdb(_: bool, values: argparse.Namespace) -> Settings:
    """Only the data set of ImageNet looks at it."""
    return {"DATA.DATASET": "lmdb"} if values.data_set == "IMNET" else {}


def _distillation(kind: str, values: argparse.Namespace) -> Settings:
    if kind == "none":
        return {}
    section = "TRAIN.DISTILLATION"
    return {
        f"{section}.TYPE": kind,
        f"{section}.TEACHER": f"timm:{values.teacher_model}",
        f"{section}.TEACHER_WEIGHTS": values.teacher_path,
        f"{section}.ALPHA": values.distillation_alpha,
        f"{section}.TAU": values.distillation_tau,
    }


def _layers(text: str, _: argparse.Namespace) -> Settings:
    try:
        return {"MODEL.EVIT.DROP_LOC": list(ast.literal_eval(text))}
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"--drop_loc {text!r} must be layers in brackets: '(3, 6, 9)'") from error


def _with_type(*_: Any) -> Settings:
    """Nothing: `_distillation` reads it."""
    return {}


_DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")

FLAGS: dict[str, Flag] = {
    "--batch-size": Flag(int, 64, "DATA.BATCH_SIZE"),
    "--epochs": Flag(int, 300, "TRAIN.EPOCHS"),
    "--input-size": Flag(int, 224, "DATA.IMG_SIZE"),
    "--drop": Flag(float, 0.0, "MODEL.DROP_RATE"),
    "--drop-path": Flag(float, 0.1, "MODEL.DROP_PATH_RATE"),
    # On by default, and then never looked at: the recipe says whether it is kept.
    "--model-ema": Flag(bool, None, _average, opposite=True),
    "--model-ema-decay": Flag(float, None, "TRAIN.EMA.DECAY"),
    "--opt": Flag(str, "adamw", _optimizer),
    "--opt-eps": Flag(float, DEFAULT_EPS, "TRAIN.OPTIMIZER.EPS"),
    "--opt-betas": Flag([float], None, "TRAIN.OPTIMIZER.BETAS"),
    "--clip-grad": Flag(float, 0.0, "TRAIN.CLIP_GRAD"),
    "--momentum": Flag(float, 0.9, "TRAIN.OPTIMIZER.MOMENTUM"),
    "--weight-decay": Flag(float, 0.05, "TRAIN.WEIGHT_DECAY"),
    "--sched": Flag(str, "cosine", "TRAIN.LR_SCHEDULER.NAME"),
    "--lr": Flag(float, 5e-4, "TRAIN.BASE_LR"),
    "--unscale-lr": Flag(bool, None, lambda *_: {"TRAIN.LR_SCALING": "none"}),
    "--warmup-lr": Flag(float, 1e-6, "TRAIN.WARMUP_LR"),
    "--min-lr": Flag(float, 1e-5, "TRAIN.MIN_LR"),
    "--decay-epochs": Flag(float, 30.0, _decay_epochs),
    "--warmup-epochs": Flag(int, 5, "TRAIN.WARMUP_EPOCHS"),
    "--decay-rate": Flag(float, 0.1, "TRAIN.LR_SCHEDULER.DECAY_RATE"),
    "--color-jitter": Flag(float, 0.4, "AUG.COLOR_JITTER"),
    "--aa": Flag(str, "rand-m9-mstd0.5-inc1", "AUG.AUTO_AUGMENT"),
    "--smoothing": Flag(float, 0.1, "MODEL.LABEL_SMOOTHING"),
    "--bce-loss": Flag(bool, None, _binary),  # behind --smoothing
    "--train-interpolation": Flag(str, "bicubic", "DATA.INTERPOLATION"),
    "--repeated-aug": Flag(bool, True, "AUG.REPEATED_AUG", opposite=True),
    "--reprob": Flag(float, 0.25, "AUG.REPROB"),
    "--remode": Flag(str, "pixel", "AUG.REMODE"),
    "--recount": Flag(int, 1, "AUG.RECOUNT"),
    # Behind what it takes the place of.
    "--ThreeAugment": Flag(bool, None, _three_augment),
    "--src": Flag(bool, None, _simple_crop),
    "--mixup": Flag(float, 0.8, "AUG.MIXUP"),
    "--cutmix": Flag(float, 1.0, "AUG.CUTMIX"),
    "--cutmix-minmax": Flag([float], None, "AUG.CUTMIX_MINMAX"),
    "--mixup-prob": Flag(float, 1.0, "AUG.MIXUP_PROB"),
    "--mixup-switch-prob": Flag(float, 0.5, "AUG.MIXUP_SWITCH_PROB"),
    "--mixup-mode": Flag(str, "batch", "AUG.MIXUP_MODE"),
    "--distillation-type": Flag(str, "none", _distillation),
    "--teacher-model": Flag(str, "regnety_160", _with_type),
    "--teacher-path": Flag(str, "", _with_type),
    "--distillation-alpha": Flag(float, 0.5, _with_type),
    "--distillation-tau": Flag(float, 1.0, _with_type),
    "--finetune": Flag(str, None, "MODEL.PRETRAINED"),
    "--pretrain": Flag(str, None, "MODEL.PRETRAINED"),
    "--data-path": Flag(str, None, "DATA.DATA_PATH"),
    "--data-set": Flag(str, "IMNET", _data_set),
    "--use-lmdb": Flag(bool, None, _lmdb),
    "--inat-category": Flag(str, None, "DATA.INAT.CATEGORY"),
    "--output_dir": Flag(str, None, "OUTPUT"),
    "--device": Flag(str, None, "DEVICE"),
    "--seed": Flag(int, 0, "SEED"),
    "--resume": Flag(str, None, "MODEL.RESUME"),
    "--start_epoch": Flag(int, None, "TRAIN.START_EPOCH"),
    "--eval": Flag(bool, None, "EVAL_MODE"),
    "--eval-crop-ratio": Flag(float, None, "TEST.CROP_RATIO"),
    "--only_test_speed": Flag(bool, None, "THROUGHPUT_MODE"),
    "--num_workers": Flag(int, None, "DATA.NUM_WORKERS"),
    "--pin-mem": Flag(bool, None, "DATA.PIN_MEMORY", opposite=True),
    "--eval-epochs": Flag(int, None, "EVAL_FREQ"),
    "--checkpoint-epochs": Flag(int, None, "SAVE_FREQ"),
}

# What only models of one kind have; their defaults hold for these, and others refuse the flags.
EVIT_FLAGS: dict[str, Flag] = {
    "--base_keep_rate": Flag(float, 0.7, "MODEL.EVIT.KEEP_RATE"),
    "--drop_loc": Flag(str, "(3, 6, 9)", _layers),
    "--fuse_token": Flag(bool, False, "MODEL.EVIT.FUSE_TOKEN"),
    "--shrink_start_epoch": Flag(int, 10, "MODEL.EVIT.SHRINK_START_EPOCH"),
    "--shrink_epochs": Flag(int, 0, "MODEL.EVIT.SHRINK_EPOCHS"),
}
DGE_FLAGS: dict[str, Flag] = {
    # Without it, nothing pulls at the budget.
    "--dge-enable": Flag(bool, False, lambda on, _: {} if on else {"{node}.BUDGET_WEIGHT": 0.0}),
    "--dge-budget": Flag(float, 1.0, "{node}.BUDGET"),
    "--dge-lr-scale": Flag(
        float,
        1.0,
        lambda weight, values: {"{node}.BUDGET_WEIGHT": weight} if values.dge_enable else {},
    ),
}

SUBMIT = "run_with_submitit.py"
_JOB = "tools/submit.py has --nodes and --gpus, and runs the line as a Slurm job"
# flag -> how many words it takes, and why nothing comes of it.
WITHOUT: dict[str, tuple[str | None, str]] = {
    "--model-ema-force-cpu": (None, "the average is kept on the model's device"),
    "--lr-noise": ("+", "the learning rate has no noise"),
    "--lr-noise-pct": ("?", "the learning rate has no noise"),
    "--lr-noise-std": ("?", "the learning rate has no noise"),
    "--cooldown-epochs": ("?", "those programs stop after --epochs, before the cool-down"),
    "--patience-epochs": ("?", "of a schedule that waits for a plateau, which is not offered"),
    "--linear-warmup": (None, "the warm-up always rises with every step"),
    "--no-linear-warmup": (None, "the warm-up always rises with every step"),
    "--resplit": (None, "batches are not split into clean and augmented halves"),
    "--dist-eval": (None, "evaluation is always shared by all processes, and exact"),
    "--world_size": ("?", "the launcher says how many processes there are"),
    "--dist_url": ("?", "the launcher says where the processes meet"),
    "--distributed": (None, "the launcher says how many processes there are"),
    "--train-mode": (None, "training is always in train mode, with drop path"),
    "--no-train-mode": (None, "training is always in train mode, with drop path"),
    "--attn-only": (None, "name what is not trained in TRAIN.FREEZE"),
    "--cosub": (None, "training with two sub-models is not offered"),
    "--ngpus": ("?", _JOB),
    "--nodes": ("?", _JOB),
    "--timeout": ("?", "tools/submit.py --time says how long a job takes"),
    "--job_dir": ("?", "tools/submit.py --folder is for its logs, --output for the run"),
    "--partition": ("?", "tools/submit.py --partition is the same"),
    "--comment": ("?", "tools/submit.py --comment is the same"),
    "--use_volta32": (None, "tools/submit.py --constraint volta32gb is the same"),
    "--no-tensorboard": (None, "a run writes curves where TensorBoard is installed"),
    "--test_speed": (None, "a run ends with throughput.json; --throughput times alone"),
    "--visualize_mask": (
        None,
        "`python tools/predict.py IMAGE ... --draw FOLDER` draws the kept patches",
    ),
    "--n_visualization": ("?", "`python tools/predict.py` draws the images that it is given"),
}

# EViT's names of models -> ours; keep rate and fusion are flags there, and in our names.
MODELS = {
    "deit_small_patch16_shrink_base": "evit_small",
    "deit_base_patch16_shrink_base": "evit_base",
}
# Architectures of the programs that are built on DeiT's.
_TYPES = ("deit", "dilateformer", "dhvt", "evit", "pvt", "dpvt", "deit_dge", "pvt_dge")


def translate(words: Sequence[str]) -> tuple[Path, Settings, list[str], list[str]]:
    """A command line -> the variant's file, the settings that differ from it, remarks, and what starts it.

    Args:
        words: a launcher and a program (all up to the first word that ends in .py, if there is one) may come
            first; the launcher stays, and starts main.py.

    Raises:
        ValueError: an unknown flag, model or value; says which is near.
    """
    program = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    launch, own = words[: program + 1], words[program + 1 :]
    parser = _Parser(add_help=False)
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--dr", type=float, dest=_place("--decay-rate"))
    for name, flag in (FLAGS | EVIT_FLAGS | DGE_FLAGS).items():
        _add(parser, name, flag)
    for name, (count, _) in WITHOUT.items():
        parser.add_argument(
            name, **(dict(nargs=count) if count else dict(action="store_true")), default=None
        )
    values, unknown = parser.parse_known_args(list(own))
    path = _file_of(values)  # first: where the whole program is another one, it says so
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"unknown flag {unknown[0]}; near it are {nearest(unknown[0], known)[:3]}")
    plain = load_config(path)
    settings = _settings(values, plain.MODEL.TYPE.lower())
    if settings["DATA.DATASET"] != plain.DATA.DATASET and plain.MODEL.NUM_CLASSES is not None:
        settings["MODEL.NUM_CLASSES"] = None  # those of the data, as there
    config = load_config(path, [word for item in settings.items() for word in item])
    settings = {key: _at(config, key) for key in settings}
    differing = {key: value for key, value in settings.items() if value != _at(plain, key)}
    remarks = [
        f"{name}: {why}" for name, (_, why) in WITHOUT.items() if _given(values, name) is not None
    ]
    name = settings["TRAIN.OPTIMIZER.NAME"]
    if name not in OWN_OPTIMIZERS and settings["TRAIN.OPTIMIZER.EPS"] == DEFAULT_EPS:
        remarks.append(
            f"--opt-eps: with {DEFAULT_EPS}, which those programs have, {name} has its own here"
        )
    if launch and launch[-1].endswith(SUBMIT):
        nodes, gpus = values.nodes or 2, values.ngpus or 8  # its defaults
        job = f"python tools/submit.py --nodes {nodes} --gpus {gpus} --"
        remarks.append(f"{SUBMIT}: `{job}` in place of `python main.py` starts as many processes")
    return path, differing, remarks, [*(launch[:-1] or ["python"]), "main.py"]


def _settings(values: argparse.Namespace, kind: str) -> Settings:
    """Settings of all flags, given or not, for an architecture."""
    flags = dict(FLAGS)
    if kind == "dilateformer":
        flags["--warmup-epochs"] = flags["--warmup-epochs"]._replace(default=10)
    if values.ThreeAugment:  # DeiT III's program has a default of its own
        flags["--color-jitter"] = flags["--color-jitter"]._replace(default=0.3)
    for family, own in (("evit", EVIT_FLAGS), ("_dge", DGE_FLAGS)):
        if kind.endswith(family):
            flags |= own
        elif given := [name for name in own if _given(values, name) is not None]:
            raise ValueError(f"{given[0]} is not a flag of --model {values.model}")
    node = f"MODEL.{registry.find(kind).node}"
    for name, flag in flags.items():
        if _given(values, name) is None:
            setattr(values, _place(name), flag.default)
    settings: Settings = {}
    for name, flag in flags.items():
        value = _given(values, name)
        if value is None:
            continue
        made = flag.target(value, values) if callable(flag.target) else {flag.target: value}
        settings |= {key.format(node=node): content for key, content in made.items()}
    return settings


class _Parser(argparse.ArgumentParser):
    """Leaves errors to the caller."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def _add(parser: argparse.ArgumentParser, name: str, flag: Flag) -> None:
    if flag.kind is bool:
        parser.add_argument(name, action="store_const", const=True)
        if flag.opposite:
            opposite = f"--no-{name.removeprefix('--')}"
            parser.add_argument(opposite, action="store_const", const=False, dest=_place(name))
    elif isinstance(flag.kind, list):
        parser.add_argument(name, type=flag.kind[0], nargs="+")
    else:
        parser.add_argument(name, type=flag.kind)


def _place(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _given(values: argparse.Namespace, name: str) -> Any:
    return getattr(values, _place(name))


def _file_of(values: argparse.Namespace) -> Path:
    """The YAML file of a seed's model; ValueError if it has none, or its program has other flags."""
    model = name = values.model
    if model in MODELS:
        rates = (values.base_keep_rate, EVIT_FLAGS["--base_keep_rate"].default)
        rest = "fuse" if values.fuse_token else "drop"
        names = [f"{MODELS[model]}_r{10 * rate:02g}_{rest}" for rate in rates if rate]
        name = next(name for name in names if name in list_models())
    if name not in list_models():
        close = nearest(model, [*MODELS, *list_models()])[:3]
        raise ValueError(f"--model {model}: there is no such variant; near it are {close}")
    path = variant_file(name)
    kind = load_config(path).MODEL.TYPE.lower()
    if kind not in _TYPES:
        raise ValueError(
            f"--model {model}: its program is not built on DeiT's, so that its flags and their defaults "
            f"are others; start from {path.relative_to(ROOT)}"
        )
    return path


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


def to_command(path: Path, settings: Settings, start: Sequence[str]) -> str:
    """Our command line; keys that have a flag of their own are given by it."""
    words = [*start, "--cfg", str(path.relative_to(ROOT))]
    rest = dict(settings)
    for flag, key, kind, _ in OWN_FLAGS:
        if key in rest and (not isinstance(kind, bool) or rest[key] is kind):
            words += [flag] if isinstance(kind, bool) else [flag, str(rest[key])]
            del rest[key]
    if rest:
        words += ["--opts", *(str(word) for item in rest.items() for word in item)]
    return shlex.join(words)


def to_yaml(path: Path, settings: Settings, target: Path) -> str:
    """The text of a YAML file at `target` that says the same."""
    parent = Path(os.path.relpath(path, target.resolve().parent))
    tree: Settings = {"BASE": [parent.as_posix()]}
    for key, value in settings.items():
        *nodes, name = key.split(".")
        branch = tree
        for node in nodes:
            branch = branch.setdefault(node, {})
        branch[name] = value
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line -> ours, on standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yaml", metavar="FILE", help="write the settings as an experiment's file")
    parser.add_argument("words", nargs="+", metavar="WORD", help="the command line, after --")
    args = parser.parse_args(argv)
    try:
        path, settings, remarks, start = translate(args.words)
        target = Path(args.yaml or ROOT / "configs" / path.parent.name / "experiment.yaml")
        text = to_yaml(path, settings, target)
        if args.yaml:
            target.write_text(text)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(to_command(path, settings, start), text, sep="\n\n")
    for remark in remarks:
        print(f"# without counterpart: {remark}")


if __name__ == "__main__":
    main()
