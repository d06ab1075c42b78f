"""Time models side by side: images/s, latency, memory, and ratios to a baseline that ran in between.

    python benchmarks/run.py                                            # MixLab's families, about 20 minutes
    python benchmarks/run.py --models dfvt_small dhvt_tiny_imagenet_patch16 --mode train
    python benchmarks/run.py --models dfvt_small swin_tiny_patch4_window7_224=timm-swin-t

All models and baselines are in one process. Each round runs every one of them once, A B A B, so that a slow
moment of the machine meets both sides of a ratio; a ratio is the median over the rounds. See README.md here.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Before torch is imported: its profiler announces every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.literal import literal  # noqa: E402  found through the line above
from config import load_config  # noqa: E402
from models import create_model, variant_file  # noqa: E402
from models.layers.grained import GrainedQueries, Router  # noqa: E402
from models.layers.tokens import to_pair  # noqa: E402
from utils.amp import Amp  # noqa: E402
from utils.checkpoint import git_revision  # noqa: E402
from utils.complexity import count  # noqa: E402

# One of each family, and MixLab's Swin-T beside timm's.
MODELS = (
    "dilateformer_tiny",
    "dfvt_small",
    "dhvt_tiny_imagenet_patch16",
    "evit_small_r07_fuse",
    "dfformer_s18",
    "cdfformer_s18",
    "gfformer_s18",
    "deit_dge_s124_small_patch16_256@0.5=deit_small_patch16_256",
    "swin_tiny_patch4_window7_224=timm-swin-t",
)
TIMM_SWIN = "timm-swin-t"
MODES = ("inference", "train")

# A turn lasts at least this long; short passes are repeated in it.
TURN_S = 0.1
MIN_ROUNDS = 3

MEMORY_KINDS = {
    "cpu": "largest sum of tensors that one pass allocated and not yet freed (torch.profiler); weights, "
    "images and what was there before are not in it",
    "cuda": "torch.cuda.max_memory_allocated of one pass less what was allocated before it",
}

Pass = Callable[[], None]


@dataclass
class Contestant:
    """A model in the race, with what was measured: seconds of each round by mode."""

    name: str
    model: nn.Module
    size: tuple[int, int]
    baseline: "Contestant | None" = None
    is_baseline: bool = False
    compiled: bool = False
    difference: float | None = None
    passes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    memory_mib: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all contestants have in common."""

    device: torch.device
    amp: Amp
    batch_size: int
    channels_last: bool

    def images(self, contestant: Contestant, batch_size: int | None = None) -> Tensor:
        """Random images (B, 3, H, W) of the contestant's size, the same at each call."""
        shape = (batch_size or self.batch_size, 3, *contestant.size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def clock(self, run: Pass, passes: int = 1) -> float:
        """Seconds per pass."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(passes):
            run()
        self.synchronize()
        return (time.perf_counter() - start) / passes


# -- who takes part ------------------------------------------------------------------------------


def enter(
    entries: Sequence[str],
    baseline: str,
    setting: Setting,
    compile_models: bool = False,
    compile_baselines: bool = False,
) -> list[Contestant]:
    """The contestants in the order of their turns, each model before its baseline.

    Args:
        entries: `model` or `model=baseline`; `model@0.5` asks half of the queries that a grained model can.
        baseline: of entries that name none: "literal", "self", "timm-swin-t" or a model.

    Raises:
        ValueError: an unknown name, or no literal form.
    """
    order: list[Contestant] = []
    shared: dict[str, Contestant] = {}
    for entry in entries:
        name, _, own = entry.partition("=")
        model = _build(name, setting)
        against = own or baseline
        if against in ("literal", "self"):
            twin = copy.deepcopy(model.model)
            twin = literal(twin) if against == "literal" else twin
            rival = Contestant(f"{name} ({against})", twin, model.size, is_baseline=True)
            model.difference = _difference(model, rival, setting)
        else:
            rival = shared.get(against) or _build(against, setting)
            rival.is_baseline = True
        model.baseline = rival
        order.append(model)
        if against not in shared:
            order.append(rival)
        if against not in ("literal", "self"):
            shared[against] = rival
    for contestant in order:
        # A model against itself must be the same on both sides.
        twin_of_compiled = compile_models and contestant.name.endswith(" (self)")
        wanted = compile_baselines if contestant.is_baseline else compile_models
        if wanted or twin_of_compiled:
            contestant.model.compile()
            contestant.compiled = True
    return order


def _build(name: str, setting: Setting) -> Contestant:
    torch.manual_seed(0)
    if name == TIMM_SWIN:
        # By timm's own name this is timm's model: MixLab's is registered there with a prefix.
        model, size = timm.create_model("swin_tiny_patch4_window7_224"), (224, 224)
    else:
        variant, _, share = name.partition("@")
        size = to_pair(load_config(variant_file(variant)).DATA.IMG_SIZE)
        model = create_model(variant)
        if share:
            fix_routing(model, float(share))
    layout = torch.channels_last if setting.channels_last else torch.preserve_format
    return Contestant(name, model.to(setting.device, memory_format=layout), size)


class FixedRouter(Router):
    """A router that computes its logits and then decides by a draw: finest or coarsest patches.

    Fresh weights ask nearly all queries and trained ones do not exist here; what is timed is the cost of a
    given share. The draw is the same at each call and differs between the images of a batch.

    Args:
        prob: of the finest granularity, per region.
    """

    prob: float
    finest: int
    coarsest: int

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)  # (..., S)
        draw = torch.rand(logits.shape[:-1], generator=torch.Generator().manual_seed(0))
        choice = torch.where(draw < self.prob, self.finest, self.coarsest).to(x.device)
        return logits * 0 + nn.functional.one_hot(choice, logits.shape[-1])


def fix_routing(model: nn.Module, share: float) -> None:
    """Let every router of `model` ask about `share` of the finest queries, by a fixed draw.

    Raises:
        ValueError: the model has no routers, or cannot ask so few or so many queries.
    """
    grained = [module for module in model.modules() if isinstance(module, GrainedQueries)]
    if not grained:
        raise ValueError(f"@{share:g} is for models with grained queries (dge), and this has none")
    for queries in grained:
        steps, region = queries.steps, queries.region
        most, least = ((region // step) ** 2 / region**2 for step in (min(steps), max(steps)))
        if not least <= share <= most:
            raise ValueError(f"@{share:g} must be between {least:g} and {most:g} of the queries")
        router = queries.router
        router.__class__ = FixedRouter
        router.prob = (share - least) / (most - least)
        router.finest, router.coarsest = steps.index(min(steps)), steps.index(max(steps))


@torch.no_grad()
def _difference(a: Contestant, b: Contestant, setting: Setting) -> float:
    """Largest difference of the logits of two images, relative to the largest logit."""
    images = setting.images(a, 2)
    first, second = a.model.eval()(images), b.model.eval()(images)
    return float((first - second).abs().max() / first.abs().max())


# -- measuring -----------------------------------------------------------------------------------


def make_pass(
    contestant: Contestant, mode: str, setting: Setting, batch_size: int | None = None
) -> Pass:
    """One forward pass without gradients, or forward, mean of squared logits and backward."""
    images = setting.images(contestant, batch_size)
    model, amp = contestant.model, setting.amp

    def inference() -> None:
        with torch.inference_mode(), amp.autocast():
            model(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with amp.autocast():
            loss = model(images).float().square().mean()
        loss.backward()

    return inference if mode == "inference" else train


def race(
    contestants: Sequence[Contestant],
    modes: Sequence[str],
    setting: Setting,
    rounds: int,
    warmup: int,
    latency_passes: int,
    minutes: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Warm up, estimate, and run the rounds; figures are left in the contestants.

    Args:
        minutes: fewer rounds are run, at least `MIN_ROUNDS`, if this would be exceeded.

    Returns:
        The number of rounds.
    """
    started = time.perf_counter()
    passes: dict[tuple[int, str], Pass] = {}
    round_s = 0.0
    for mode in modes:
        for i, contestant in enumerate(contestants):
            contestant.model.train(mode == "train")
            run = passes[i, mode] = make_pass(contestant, mode, setting)
            for _ in range(warmup):
                run()
            second = setting.clock(run)
            contestant.passes[mode] = max(1, math.ceil(TURN_S / second))
            contestant.model.zero_grad(set_to_none=True)  # gradients count as the step's own
            contestant.memory_mib[mode] = peak_memory(run, setting.device)
            contestant.model.zero_grad(set_to_none=True)
            contestant.seconds[mode] = []
            round_s += second * contestant.passes[mode]
            say(f"{contestant.name}, {mode}: {second:.3g} s per pass of {setting.batch_size}")
    latency_s = _time_latencies(contestants, setting, 1, keep=False) * latency_passes
    spent = time.perf_counter() - started
    if minutes is not None:
        affordable = int((60 * minutes - spent - latency_s) / round_s)
        if affordable < rounds:
            rounds = max(MIN_ROUNDS, affordable)
            say(f"--minutes {minutes:g} leaves time for {rounds} rounds")
    left = rounds * round_s + latency_s
    say(f"estimated: {left / 60:.1f} minutes for {rounds} rounds, {round_s:.1f} s each")

    for mode in modes:
        for contestant in contestants:
            contestant.model.train(mode == "train")
        for _ in range(rounds):
            for i, contestant in enumerate(contestants):
                seconds = setting.clock(passes[i, mode], contestant.passes[mode])
                contestant.seconds[mode].append(seconds)
                contestant.model.zero_grad(set_to_none=True)
    _time_latencies(contestants, setting, latency_passes)
    return rounds


def _time_latencies(
    contestants: Sequence[Contestant], setting: Setting, count: int, keep: bool = True
) -> float:
    """Time `count` passes of one image, in turns; returns the seconds of one turn of all."""
    runs = []
    for contestant in contestants:
        contestant.model.eval()
        runs.append(make_pass(contestant, "inference", setting, batch_size=1))
        runs[-1]()
    total = 0.0
    for _ in range(count):
        for contestant, run in zip(contestants, runs, strict=True):
            second = setting.clock(run)
            total += second
            if keep:
                contestant.latencies.append(second)
    return total / max(count, 1)


def peak_memory(run: Pass, device: torch.device) -> float:
    """MiB that one pass held at most, beyond what was allocated before; see `MEMORY_KINDS`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


# -- reporting -----------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def figures(contestant: Contestant, mode: str, batch_size: int) -> dict[str, Any]:
    """One row of the result: speed, memory, and the ratio to the baseline with its spread."""
    seconds = contestant.seconds[mode]
    row: dict[str, Any] = dict(
        model=contestant.name,
        mode=mode,
        compiled=contestant.compiled,
        img_per_s=batch_size / statistics.median(seconds),
        img_per_s_min=batch_size / max(seconds),
        img_per_s_max=batch_size / min(seconds),
        passes_per_turn=contestant.passes[mode],
        peak_memory_mib=contestant.memory_mib[mode],
        seconds_per_pass=seconds,
    )
    rival = contestant.baseline
    if rival is not None:
        ratios = [b / a for a, b in zip(seconds, rival.seconds[mode], strict=True)]
        row |= dict(
            baseline=rival.name,
            baseline_compiled=rival.compiled,
            ratio=statistics.median(ratios),
            ratio_quartiles=[quantile(ratios, 0.25), quantile(ratios, 0.75)],
            ratio_range=[min(ratios), max(ratios)],
            memory_ratio=contestant.memory_mib[mode] / rival.memory_mib[mode],
        )
        if contestant.difference is not None:
            row["max_logit_difference"] = contestant.difference
    if contestant.latencies:
        row |= dict(
            latency_ms_p50=1000 * quantile(contestant.latencies, 0.5),
            latency_ms_p95=1000 * quantile(contestant.latencies, 0.95),
        )
    return row


def costs(contestant: Contestant) -> dict[str, Any]:
    """Parameters and multiply-adds of one image; Fourier transforms apart."""
    total = count(contestant.model, (3, *contestant.size))
    return dict(
        params_m=total.params_m,
        gmacs=total.gmacs,
        fft_gmacs=total.fft_gmacs,
        image_size=list(contestant.size),
    )


def fingerprint(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the models."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = dict(
        cpu=_cpu_name(),
        cores=cores,
        threads=torch.get_num_threads(),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        commit=git_revision(),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        info |= dict(gpu=gpu.name, gpu_memory_gib=gpu.total_memory / 2**30, cuda=torch.version.cuda)
    return info


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def to_markdown(result: dict[str, Any]) -> str:
    """The table of a result, with its conditions above it."""
    machine, run = result["machine"], result["run"]
    lines = [
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {machine['threads']} threads; "
        f"torch {machine['torch']}; {run['dtype']}, batch {run['batch_size']}, "
        f"{'channels last' if run['channels_last'] else 'default layout'}; {run['rounds']} rounds; "
        f"commit {(machine['commit'] or 'unknown')[:12]}",
        "",
        "| model | mode | images/s | against | ratio (quartiles) | latency ms, p50 / p95 | memory MiB |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ratio, against = "", ""
        if "ratio" in row:
            low, high = row["ratio_quartiles"]
            ratio = f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})"
            against = row["baseline"] + _compiled(row["baseline_compiled"])
        latency = ""
        if "latency_ms_p50" in row and row["mode"] == "inference":
            latency = f"{row['latency_ms_p50']:.1f} / {row['latency_ms_p95']:.1f}"
        lines.append(
            f"| {row['model']}{_compiled(row['compiled'])} | {row['mode']} | {row['img_per_s']:.1f} | "
            f"{against} | {ratio} | {latency} | {row['peak_memory_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _compiled(flag: bool) -> str:
    return ", compiled" if flag else ""


def draw(result: dict[str, Any], picture: Path) -> None:
    """Images/s against multiply-adds, a panel per mode; nobody on the line is outrun by a larger model."""
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    figure = Figure(figsize=(6.5 * len(modes), 4.8), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        rows = {row["model"]: row for row in result["rows"] if row["mode"] == mode}
        points = {}
        for name, row in rows.items():
            cost = result["costs"][name]
            points[name] = (cost["gmacs"] + cost["fft_gmacs"], row["img_per_s"])
        for name, (gmacs, speed) in points.items():
            rival = rows[name].get("baseline")
            if rival is None:
                axes.plot(gmacs, speed, "o", mfc="white", mec="#888888")
                continue
            axes.plot(*zip(points[rival], (gmacs, speed), strict=True), color="#cccccc", zorder=1)
            axes.plot(gmacs, speed, "o", color="#3b6fb6")
            axes.annotate(name, (gmacs, speed), (4, 4), textcoords="offset points", fontsize=7)
        front = [p for n, p in sorted(points.items(), key=lambda n: n[1]) if _leads(p, points)]
        axes.plot(*zip(*front, strict=True), "--", color="#d1662a", linewidth=1, zorder=0)
        axes.set(xscale="log", yscale="log", title=mode)
        axes.set(xlabel="GMACs per image, Fourier transforms included", ylabel="images/s")
        axes.margins(x=0.2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.tick_params(which="both", labelsize=7)
        axes.grid(color="#e4e4e4", which="both", linewidth=0.5)
    figure.suptitle("MixLab (blue) and baselines (white); dashed: fastest of its size or larger")
    figure.savefig(picture, dpi=130)


def _leads(point: tuple[float, float], points: dict[str, tuple[float, float]]) -> bool:
    return not any(g >= point[0] and s > point[1] for g, s in points.values())


def write(result: dict[str, Any], folder: Path) -> Path:
    """The result as .json, .md and .png; the name says device, precision and how it was run."""
    folder.mkdir(parents=True, exist_ok=True)
    run = result["run"]
    parts = [run["device"], run["dtype"], "compiled" if run["compile"] else "eager"]
    path = folder / "_".join(parts + ["channels_last"] * run["channels_last"])
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(to_markdown(result))
    draw(result, path.with_suffix(".png"))
    return path.with_suffix(".json")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL[=BASELINE]", help=" ")
    parser.add_argument(
        "--baseline", default="literal", help=f"literal, self, {TIMM_SWIN} or a model's name"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help=" ")
    parser.add_argument("--batch-size", type=int, default=8, help=" ")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help=" ")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help=" "
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--compile-baseline", action="store_true", help="and the baselines")
    parser.add_argument("--channels-last", action="store_true", help="weights and images so")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contestant")
    parser.add_argument("--warmup", type=int, default=2, help="passes before the first round")
    parser.add_argument("--latency-passes", type=int, default=30, help="passes of one image")
    parser.add_argument("--minutes", type=float, help="run fewer rounds to end in about this time")
    parser.add_argument("--output", default=ROOT / "benchmarks" / "results", type=Path, help=" ")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = make_parser()
    args = parser.parse_args(argv)
    for key in ("batch_size", "rounds", "latency_passes"):
        if getattr(args, key) < 1:
            parser.error(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    device = torch.device(args.device)
    setting = Setting(device, Amp(device, args.dtype), args.batch_size, args.channels_last)
    machine = fingerprint(device)
    try:
        contestants = enter(
            args.models, args.baseline, setting, args.compile, args.compile_baseline
        )
    except ValueError as error:
        parser.error(str(error))
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
    result = dict(
        machine=machine,
        run=dict(
            device=device.type,
            dtype=setting.amp.name,
            batch_size=args.batch_size,
            channels_last=args.channels_last,
            compile=args.compile,
            compile_baseline=args.compile_baseline,
            rounds=rounds,
            warmup=args.warmup,
            latency_passes=args.latency_passes,
            peak_memory_kind=MEMORY_KINDS["cuda" if device.type == "cuda" else "cpu"],
            minutes=(time.perf_counter() - started) / 60,
            load_average_after=os.getloadavg() if hasattr(os, "getloadavg") else None,
        ),
        costs=counted,
        rows=[figures(c, mode, args.batch_size) for mode in modes for c in contestants],
    )
    path = write(result, args.output)
    print(to_markdown(result))
    print(f"written: {path} and the .md and .png beside it")
    return result


if __name__ == "__main__":
    main()
