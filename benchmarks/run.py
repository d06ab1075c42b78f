"""Time models side by side: images/s, latency, memory, and ratios to a baseline that ran in between.

    python benchmarks/run.py                                            # MixLab's families, about 20 minutes
    python benchmarks/run.py --models dfvt_small dhvt_tiny_imagenet_patch16 --mode train
    python benchmarks/run.py --models dfvt_small swin_tiny_patch4_window7_224=timm-swin-t

All models and baselines are in one process, or with --processes 3 each model and its baseline in three of
their own, one after the other. Each round runs every one of them once, A B A B, so that a slow moment of the
machine meets both sides of a ratio; a ratio is the median over all rounds. See README.md here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Before torch is imported: its profiler announces every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.contestants import TIMM_SWIN, Contestant, Setting, enter  # noqa: E402  found through the line above
from benchmarks.measure import MEMORY_KINDS, measure_peaks, race  # noqa: E402
from benchmarks.report import bounds, costs, figures, pooled, to_markdown, write  # noqa: E402
from utils.amp import Amp  # noqa: E402
from utils.distributed import own_device  # noqa: E402
from utils.fingerprint import fingerprint, load_average  # noqa: E402
from utils.seeding import set_deterministic  # noqa: E402
from utils.wrappers import COMPILE_MODES  # noqa: E402

# One of each family, and MixLab's Swin-T beside timm's.
MODELS = (
    "dilateformer_tiny",
    "dfvt_small",
    "dhvt_tiny_imagenet_patch16",
    "evit_small_r07_fuse",
    "dfformer_s18",
    "cdfformer_s18",
    "gfformer_s18",
    "deit_dge_s124_small_patch16_256@0.5=literal:deit_small_patch16_256",
    "swin_tiny_patch4_window7_224=timm-swin-t",
)
MODES = ("inference", "train")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL[=BASELINE]", help=" ")
    parser.add_argument(
        "--baseline",
        default="literal",
        help=f"literal, self, {TIMM_SWIN}, a model's name, or literal:NAME",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="so many for each model and its baseline alone, whose rounds are pooled; 0: one for all",
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help=" ")
    parser.add_argument("--batch-size", type=int, default=8, help=" ")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help=" ")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help=" "
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument(
        "--compile-mode",
        choices=COMPILE_MODES,
        default="default",
        help="reduce-overhead: CUDA graphs",
    )
    parser.add_argument("--compile-baseline", action="store_true", help="and the baselines")
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="weights and images of MixLab's models so; literal forms and timm's keep the default",
    )
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contestant")
    parser.add_argument("--warmup", type=int, default=2, help="passes before the first round")
    parser.add_argument("--latency-passes", type=int, default=30, help="passes of one image")
    parser.add_argument(
        "--minutes",
        type=float,
        help="run fewer rounds to end in about this time, all modes and models",
    )
    parser.add_argument("--output", default=Path("output", "benchmarks"), type=Path, help=" ")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    args = parser.parse_args(argv)
    for key, least in dict(batch_size=1, rounds=1, latency_passes=1, processes=0).items():
        if getattr(args, key) < least:
            parser.error(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least {least}")
    load = load_average()  # before we are the load
    try:
        contestants = enter(args.models, args.baseline, _setting(args), *_compile_modes(args))
    except ValueError as error:
        parser.error(str(error))
    if args.processes:
        del contestants  # there to find out early what cannot be run
        result = measure_apart(argv, args)
        result["machine"]["load_average"] = load
    else:
        result = measure(contestants, args)
    path = write(result, args.output)
    print(to_markdown(result))
    print(f"written: {path} and the .md and .png beside it")
    return result


def measure(contestants: Sequence[Contestant], args: argparse.Namespace) -> dict[str, Any]:
    """The result of a race of all contestants in this process."""
    setting = _setting(args)
    machine = fingerprint(setting.device)
    counted = {contestant.name: costs(contestant) for contestant in contestants}
    modes = list(dict.fromkeys(args.mode))
    started = time.perf_counter()
    rounds = race(
        contestants,
        modes,
        setting,
        args.rounds,
        args.warmup,
        args.latency_passes,
        args.minutes,
        say=lambda text: print(text, flush=True),
    )
    # After the race: what is allocated for it and freed changes how the system serves later requests.
    machine |= measure_peaks(setting)
    result = dict(
        machine=machine,
        run=dict(
            device=setting.device.type,
            dtype=setting.amp.name,
            batch_size=args.batch_size,
            channels_last=args.channels_last,
            compile=args.compile,
            compile_mode=args.compile_mode,
            compile_baseline=args.compile_baseline,
            processes=0,
            rounds=rounds,
            warmup=args.warmup,
            latency_passes=args.latency_passes,
            peak_memory_kind=MEMORY_KINDS["cuda" if setting.device.type == "cuda" else "cpu"],
            minutes=(time.perf_counter() - started) / 60,
            load_average_after=load_average(),
        ),
        costs=counted,
        rows=[figures(c, mode, args.batch_size) for mode in modes for c in contestants],
    )
    return _with_bounds(result, setting)


def measure_apart(argv: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Races of one model and its baseline each, in processes of their own; the result of all.

    A race that fails is said, and the others go on; RuntimeError if none is left.
    """
    started, parts, left = time.perf_counter(), [], len(args.models) * args.processes
    for entry in args.models:
        own: list[dict[str, Any]] = []
        for _ in range(args.processes):
            minutes = args.minutes
            if minutes is not None:
                minutes = max(0.0, (minutes - (time.perf_counter() - started) / 60) / left)
            left -= 1
            if (part := _race_alone(argv, entry, minutes)) is None:
                print(f"{entry}: failed, and is left out", flush=True)
                break
            own.append(part)
        else:
            parts += own
    if not parts:
        raise RuntimeError(f"none of {list(args.models)} could be timed; see the errors above")
    machine, run = dict(parts[0]["machine"]), dict(parts[0]["run"])
    for peak in ("tflop_per_s", "gb_per_s"):
        machine[peak] = max(part["machine"][peak] for part in parts)
    run |= dict(
        processes=args.processes,
        rounds=min(part["run"]["rounds"] for part in parts),
        minutes=(time.perf_counter() - started) / 60,
        load_average_after=parts[-1]["run"]["load_average_after"],
    )
    rows = []
    for start in range(0, len(parts), args.processes):
        same = zip(*(part["rows"] for part in parts[start : start + args.processes]), strict=True)
        rows += [pooled(group, args.batch_size) for group in same]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    result = dict(
        machine=machine,
        run=run,
        costs={name: cost for part in parts for name, cost in part["costs"].items()},
        rows=[row for mode in modes for row in rows if row["mode"] == mode],
    )
    return _with_bounds(result, _setting(args))


def _race_alone(argv: Sequence[str], entry: str, minutes: float | None) -> dict[str, Any] | None:
    """The result of one entry, in a process of its own; None if that fails."""
    with TemporaryDirectory() as folder:
        own = ["--processes", "0", "--models", entry, "--output", folder]
        if minutes is not None:
            own += ["--minutes", str(minutes)]
        if subprocess.run([sys.executable, __file__, *argv, *own], check=False).returncode:
            return None
        (path,) = Path(folder).rglob("*.json")
        return json.loads(path.read_text())


def _with_bounds(result: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """The result with the `bounds` of each row at the machine's peaks."""
    size = setting.amp.dtype.itemsize
    for row in result["rows"]:
        cost = result["costs"][row["model"]]
        row |= bounds(cost, result["machine"], row["mode"], setting.batch_size, size)
    return result


def _setting(args: argparse.Namespace) -> Setting:
    device = own_device(args.device)
    set_deterministic(False)  # cuDNN's fastest kernels, as `--throughput` has them
    amp = Amp(device, args.dtype)
    amp.set_float32_precision()
    return Setting(device, amp, args.batch_size, args.channels_last)


def _compile_modes(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Modes of torch.compile of the models and of their baselines."""
    mode = args.compile_mode
    return mode if args.compile else None, mode if args.compile_baseline else None


if __name__ == "__main__":
    main()
