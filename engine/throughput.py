"""Speed and memory of a forward pass, measured the same way for every model."""

import logging
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.amp import Amp
from utils.meters import peak_memory_mib

_LOG = logging.getLogger(__name__)

# Share of a time budget that the batches get; single images have the rest.
BATCH_SHARE = 0.75


def measure_throughput(
    model: nn.Module,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    device: torch.device,
    amp: Amp,
    in_chans: int = 3,
    channels_last: bool = False,
    warmup: int = 50,
    iterations: int = 30,
    repeats: int = 3,
    budget_s: float | None = None,
) -> dict[str, float | int | str | bool]:
    """Time forward passes on random images that are on the device already.

    Swin's protocol: 50 warm-up passes, then the mean over 30 passes with one synchronisation at the end,
    here repeated and reported with its spread. Latency is that of one image (batch 1), synchronised after
    every pass, over `iterations * repeats` passes.

    Args:
        model: bare or compiled, on its device; its mode is restored afterwards.
        image_size: pixels, one side or (height, width).
        budget_s: seconds that everything may take, roughly; None is 20 on a CPU and unlimited elsewhere.
            Numbers of passes are lowered to fit, with a warning, and reported as run. The first pass at
            each batch size, which may compile the model, is not counted; at least one warm-up and one
            timed pass are run, so a very slow model exceeds it.

    Returns:
        img_per_s (median of the repeats), img_per_s_min, img_per_s_max, img_per_s_spread ((max - min) /
        median); latency_ms_p50, latency_ms_p95 (batch 1); batch_size, height, width, dtype, device,
        channels_last; peak_memory_mib with peak_memory_kind: 'allocated' (tensors on the GPU, at
        batch_size, weights included, but not what a CUDA graph keeps to itself) or 'process' (resident
        memory, interpreter included); warmup, iterations, repeats, latency_passes.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if budget_s is None and device.type == "cpu":
        budget_s = 20.0
    images = torch.rand(batch_size, in_chans, height, width, device=device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def forward(x: Tensor) -> None:
        with torch.inference_mode(), amp.autocast():
            model(x)

    def batch() -> None:
        forward(images)

    def single() -> None:
        forward(images[:1])

    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        share = None if budget_s is None else BATCH_SHARE * budget_s
        plan = _plan(batch, device, (warmup, iterations, repeats), share)
        # Before the memory is counted: kernels that are chosen by a measurement need some for that.
        _time_loops(batch, device, warmup=plan[0], iterations=0, repeats=0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = _time_loops(batch, device, 0, *plan[1:])
        memory = peak_memory_mib(device)
        share = None if budget_s is None else (1 - BATCH_SHARE) * budget_s
        single_plan = _plan(single, device, (warmup, iterations, repeats), share)
        latencies = _time_each(single, device, single_plan[0], single_plan[1] * single_plan[2])
    finally:
        for part, training in modes:
            part.training = training

    if {plan, single_plan} != {(warmup, iterations, repeats)}:
        _LOG.warning(
            "timing %d warm-up and %d x %d timed passes (%d and %d x %d of one image) instead of %d and "
            "%d x %d, to end in about %.0f s",
            plan[0], plan[2], plan[1], single_plan[0], single_plan[2], single_plan[1],
            warmup, repeats, iterations, budget_s,
        )  # fmt: skip
    speeds = sorted(plan[1] * batch_size / s for s in seconds)
    median = statistics.median(speeds)
    return dict(
        img_per_s=median,
        img_per_s_min=speeds[0],
        img_per_s_max=speeds[-1],
        img_per_s_spread=(speeds[-1] - speeds[0]) / median,
        latency_ms_p50=1000 * _quantile(latencies, 0.5),
        latency_ms_p95=1000 * _quantile(latencies, 0.95),
        batch_size=batch_size,
        height=height,
        width=width,
        dtype=amp.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        channels_last=channels_last,
        peak_memory_mib=memory,
        peak_memory_kind="allocated" if device.type == "cuda" else "process",
        warmup=plan[0],
        iterations=plan[1],
        repeats=plan[2],
        latency_passes=len(latencies),
    )


def _plan(
    run: Callable[[], None],
    device: torch.device,
    wanted: tuple[int, int, int],
    budget_s: float | None,
) -> tuple[int, int, int]:
    """(warm-up, iterations, repeats) that fit into the budget, judged by the second pass."""
    if budget_s is None:
        return wanted
    run()  # compiles, measures ways, makes tables
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    affordable = int(budget_s / (time.perf_counter() - start)) - 1
    warmup, iterations, repeats = wanted
    if affordable >= warmup + iterations * repeats:
        return wanted
    repeats = max(1, min(repeats, affordable // 2))
    warmup = max(1, min(warmup, affordable // 4))
    return warmup, max(1, min(iterations, (affordable - warmup) // repeats)), repeats


def _time_loops(
    run: Callable[[], None], device: torch.device, warmup: int, iterations: int, repeats: int
) -> list[float]:
    """Seconds of `iterations` passes, synchronised once, for each repeat."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(iterations):
            run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def _time_each(
    run: Callable[[], None], device: torch.device, warmup: int, count: int
) -> list[float]:
    """Seconds of each of `count` passes, synchronised after each."""
    for _ in range(warmup):
        run()
    return [
        second
        for _ in range(count)
        for second in _time_loops(run, device, 0, iterations=1, repeats=1)
    ]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _quantile(values: list[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))
