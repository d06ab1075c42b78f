"""The race: rounds in which every contestant has one turn, latencies, memory, and what the machine can do."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.contestants import Contestant, Pass, Setting, make_pass, recomputing
from models.layers.linear import linear
from utils.wrappers import CUDA_GRAPH_MODES

# A turn lasts at least this long; short passes are repeated in it.
TURN_S = 0.1
MIN_ROUNDS = 3

MEMORY_KINDS = {
    "cpu": "largest sum of tensors that one pass allocated and not yet freed (torch.profiler); weights, "
    "images and what was there before are not in it",
    "cuda": "torch.cuda.max_memory_allocated of one pass less what was allocated before it",
}


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
            run = passes[i, mode] = make_pass(contestant, mode, setting)
            for _ in range(warmup):
                run()
            second = setting.clock(run)
            contestant.passes[mode] = max(1, math.ceil(TURN_S / second))
            contestant.memory_mib[mode] = _memory_of(contestant, run, setting)
            if mode == "train" and (lean := recomputing(contestant)) is not None:
                lean_run = make_pass(lean, mode, setting)
                lean_run()  # what is kept from then on, such as tables, is not the step's
                contestant.recomputing_memory_mib = _memory_of(lean, lean_run, setting)
            contestant.seconds[mode] = []
            round_s += second * contestant.passes[mode]
            say(f"{contestant.name}, {mode}: {second:.3g} s per pass of {setting.batch_size}")
    latency_s = _time_latencies(contestants, setting, 1, keep=False) * latency_passes
    spent = time.perf_counter() - started
    if minutes is not None:
        affordable = int((60 * minutes - spent - latency_s) / round_s)
        if affordable < rounds:
            rounds = min(rounds, max(MIN_ROUNDS, affordable))
            say(f"--minutes {minutes:g} leaves time for {rounds} rounds")
    left = rounds * round_s + latency_s
    say(f"estimated: {left / 60:.1f} minutes for {rounds} rounds, {round_s:.1f} s each")

    for mode in modes:
        for contestant in contestants:
            contestant.prepared(mode)
        for _ in range(rounds):
            for i, contestant in enumerate(contestants):
                seconds = setting.clock(passes[i, mode], contestant.passes[mode])
                contestant.seconds[mode].append(seconds)
                contestant.model.zero_grad(set_to_none=True)
    _time_latencies(contestants, setting, latency_passes)
    return rounds


def _memory_of(contestant: Contestant, run: Pass, setting: Setting) -> float | None:
    """`peak_memory` of a pass; the gradients of a step count as its own.

    None of a CUDA graph, which has what it needs since it was recorded and allocates nothing.
    """
    if setting.device.type == "cuda" and contestant.compile_mode in CUDA_GRAPH_MODES:
        return None
    contestant.model.zero_grad(set_to_none=True)
    memory = peak_memory(run, setting.device)
    contestant.model.zero_grad(set_to_none=True)
    return memory


def _time_latencies(
    contestants: Sequence[Contestant], setting: Setting, count: int, keep: bool = True
) -> float:
    """Time `count` passes of one image, in turns; returns the seconds of one turn of all."""
    runs = []
    for contestant in contestants:
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


def measure_peaks(setting: Setting) -> dict[str, float]:
    """What the machine reaches on a large matrix product and on a copy: `tflop_per_s`, `gb_per_s`."""
    dtype = setting.amp.dtype
    side = 8192 if setting.device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=setting.device, dtype=dtype) for _ in range(2))
    # Ones, because zeros that nobody wrote are one page of memory, read again and again.
    source = torch.ones(2**28 if setting.device.type == "cuda" else 2**26, device=setting.device)
    target = torch.empty_like(source)
    runs = (lambda: linear(a, b), lambda: target.copy_(source))
    with torch.inference_mode():
        for run in runs:
            run()
        product_s, copy_s = (min(setting.clock(run) for _ in range(10)) for run in runs)
    moved = 2 * source.numel() * source.element_size()
    return dict(tflop_per_s=2 * side**3 / product_s / 1e12, gb_per_s=moved / copy_s / 1e9)


def peak_memory(run: Pass, device: torch.device) -> float:
    """MiB that one pass held at most, beyond what was allocated before; see `MEMORY_KINDS`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        run()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    sizes: dict[int, int] = {}
    for event in sorted(changes, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            sizes[address] = size
        else:
            # What was there before is not the pass's, and the profiler may know a wrong size of it: that of
            # an earlier block at the same address.
            size = -sizes.pop(address, 0)
        held += size
        peak = max(peak, held)
    return peak / 2**20
