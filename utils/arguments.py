"""The command line of `main.py`: every named flag sets one config key, and one not given sets nothing."""

import argparse
from collections.abc import Sequence
from typing import Any

from .spelling import nearest

# name, config key, how its argument is read (a type, a list of choices, or "=value" without one), help
FLAGS: tuple[tuple[str, str, Any, str], ...] = (
    ("--batch-size", "DATA.BATCH_SIZE", int, "images per process and forward pass"),
    ("--data-path", "DATA.DATA_PATH", str, "root folder of the dataset"),
    ("--zip", "DATA.ZIP_MODE", True, "read {train,val}.zip instead of folders"),
    (
        "--cache-mode",
        "DATA.CACHE_MODE",
        ("no", "full", "part"),
        "how much of a zip is kept in memory",
    ),
    ("--pretrained", "MODEL.PRETRAINED", str, "weights to start from"),
    ("--resume", "MODEL.RESUME", str, "checkpoint to continue, or to evaluate"),
    ("--accumulation-steps", "TRAIN.ACCUMULATION_STEPS", int, "forward passes per optimizer step"),
    ("--use-checkpoint", "TRAIN.USE_CHECKPOINT", True, "recompute activations to save memory"),
    ("--disable_amp", "AMP_ENABLE", False, "train and evaluate in float32"),
    ("--disable-amp", "AMP_ENABLE", False, "the same, as SimMIM's programs spell it"),
    ("--enable-amp", "AMP_ENABLE", True, "mixed precision, which is the default"),
    ("--amp-opt-level", "AMP_OPT_LEVEL", ("O0", "O1", "O2"), "O0: no AMP; O1, O2: NVIDIA Apex"),
    ("--output", "OUTPUT", str, "root of the output folders"),
    ("--tag", "TAG", str, "name of this experiment's output folder"),
    ("--eval", "EVAL_MODE", True, "evaluate --resume (or --pretrained) and stop"),
    ("--throughput", "THROUGHPUT_MODE", True, "time the model and stop"),
    ("--info", "INFO_MODE", True, "count parameters and GMACs and stop"),
    ("--plan", "PLAN_MODE", True, "show what training would do and stop"),
    ("--optim", "TRAIN.OPTIMIZER.NAME", str, "optimizer"),
    ("--attack-type", "TEST.ATTACK", ("fgsm", "pgd"), "--eval: score adversarial images too"),
    ("--adv-eps", "TEST.ATTACK_EPS", float, "largest change of a pixel, in 1/255"),
    ("--adv-steps", "TEST.ATTACK_STEPS", int, "steps of pgd"),
    ("--adv-step-size", "TEST.ATTACK_STEP_SIZE", float, "change of a pixel per step, in 1/255"),
    ("--fused_window_process", "FUSED_WINDOW_PROCESS", True, "accepted, has no effect"),
    ("--fused_layernorm", "FUSED_LAYERNORM", True, "accepted, has no effect"),
)


class _Parser(argparse.ArgumentParser):
    """Errors on unknown arguments with the nearest right spelling."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            close = nearest(unknown[0].split("=")[0], known)[:3]
            self.error(f"unknown argument {unknown[0]}; did you mean one of {close}?")
        return found


def add_opts(parser: argparse.ArgumentParser) -> None:
    """`--opts KEY VALUE ...`, which may be given again."""
    parser.add_argument(
        "--opts",
        metavar="KEY VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="any config keys; may be given again",
    )


def parse_args(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace, dict[str, Any]]:
    """Command line -> the parser, main.py's own arguments, and the flags that were given, by config key.

    Own arguments are cfg, opts and local_rank. Exits with status 2 and the nearest right spelling at an
    unknown flag.
    """
    parser = _Parser(
        prog="main.py", description="Train, evaluate, time or count a model.", allow_abbrev=False
    )
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    add_opts(parser)
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=None, help="passed by older launchers"
    )
    for name, key, kind, text in FLAGS:
        options: dict[str, Any] = dict(dest=key, default=argparse.SUPPRESS, help=f"{text} ({key})")
        if isinstance(kind, bool):
            options |= dict(action="store_const", const=kind)
        elif isinstance(kind, tuple):
            options |= dict(choices=kind)
        else:
            options |= dict(type=kind, metavar=key.rpartition(".")[2])
        parser.add_argument(name, **options)
    args = vars(parser.parse_args(argv))
    own = argparse.Namespace(**{name: args.pop(name) for name in ("cfg", "opts", "local_rank")})
    return parser, own, args
