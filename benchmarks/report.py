"""What a run found: rows, costs, the fingerprint of the machine; as JSON, table and picture."""

import copy
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.contestants import Contestant
from models.layers.grained import set_dense_evaluation
from utils.complexity import Complexity, count

# Okabe and Ito's, which colour-blind readers tell apart, without those that are pale on white.
_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"]


def quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def figures(contestant: Contestant, mode: str, batch_size: int) -> dict[str, Any]:
    """One row of the result: speed, memory, the ratio to the baseline with its spread."""
    row: dict[str, Any] = dict(
        model=contestant.name,
        mode=mode,
        compiled=contestant.compiled,
        passes_per_turn=contestant.passes[mode],
        peak_memory_mib=contestant.memory_mib[mode],
        seconds_per_pass=contestant.seconds[mode],
        latencies_s=contestant.latencies,
    )
    if mode == "train" and contestant.recomputing_memory_mib is not None:
        row["recomputing_memory_mib"] = contestant.recomputing_memory_mib
    rival = contestant.baseline
    if rival is not None:
        row |= dict(
            baseline=rival.name,
            baseline_compiled=rival.compiled,
            baseline_seconds_per_pass=rival.seconds[mode],
        )
        memory, of_rival = contestant.memory_mib[mode], rival.memory_mib[mode]
        if memory is not None and of_rival is not None:
            row["memory_ratio"] = memory / of_rival
        if contestant.difference is not None:
            row["max_logit_difference"] = contestant.difference
    return row | _statistics(row, batch_size)


def pooled(rows: Sequence[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """The rows of one model from several processes as one, over the rounds of all of them."""
    row = dict(rows[0])
    for key in ("seconds_per_pass", "baseline_seconds_per_pass", "latencies_s"):
        if key in row:
            row[key] = [value for part in rows for value in part[key]]
    for key in ("peak_memory_mib", "recomputing_memory_mib", "memory_ratio"):
        values = [part[key] for part in rows if part.get(key) is not None]
        if values:
            row[key] = max(values)
    return row | _statistics(row, batch_size)


def _statistics(row: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Medians and spreads of a row's clock times."""
    seconds = row["seconds_per_pass"]
    found = dict(
        img_per_s=batch_size / statistics.median(seconds),
        img_per_s_min=batch_size / max(seconds),
        img_per_s_max=batch_size / min(seconds),
    )
    if "baseline_seconds_per_pass" in row:
        ratios = [b / a for a, b in zip(seconds, row["baseline_seconds_per_pass"], strict=True)]
        found |= dict(
            ratio=statistics.median(ratios),
            ratio_quartiles=[quantile(ratios, 0.25), quantile(ratios, 0.75)],
            ratio_range=[min(ratios), max(ratios)],
        )
    if row["latencies_s"]:
        found |= dict(
            latency_ms_p50=1000 * quantile(row["latencies_s"], 0.5),
            latency_ms_p95=1000 * quantile(row["latencies_s"], 0.95),
        )
    return found


def costs(contestant: Contestant) -> dict[str, Any]:
    """Parameters, and the work of one image in inference and in the forward pass of a training step."""
    size = (3, *contestant.size)
    total = count(contestant.model, size)
    # Grained queries are asked at all granularities in training, whatever their routers say.
    in_training = copy.deepcopy(contestant.model)
    set_dense_evaluation(in_training, True)
    return dict(
        params_m=total.params_m,
        image_size=list(contestant.size),
        inference=_work(total),
        train=_work(count(in_training, size)),
    )


def _work(total: Complexity) -> dict[str, float]:
    """Multiply-adds and outputs of layers, in billions and in millions of values."""
    return dict(
        gmacs=total.gmacs,
        fft_gmacs=total.fft_gmacs,
        layer_outputs_m=total.layer_outputs / 1e6,
    )


def bounds(
    cost: dict[str, Any], peaks: dict[str, float], mode: str, batch_size: int, bytes_per_value: int
) -> dict[str, float]:
    """Images/s that arithmetic and memory traffic allow at the machine's measured peaks.

    Arithmetic is two operations per multiply-add. Traffic is each output of a convolution or linear layer
    written once and read once, all between them fused, and the weights once per batch. A training step is
    three such passes. Both are models: caches can beat the second.
    """
    passes, work = 3 if mode == "train" else 1, cost[mode]
    flops = 2e9 * (work["gmacs"] + work["fft_gmacs"])
    values = 2e6 * work["layer_outputs_m"] + 1e6 * cost["params_m"] / batch_size
    return dict(
        bound_arithmetic=peaks["tflop_per_s"] * 1e12 / (passes * flops),
        bound_bytes=peaks["gb_per_s"] * 1e9 / (passes * values * bytes_per_value),
    )


def to_markdown(result: dict[str, Any]) -> str:
    """The table of a result, with its conditions above it."""
    machine, run = result["machine"], result["run"]
    lines = [
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {machine['threads']} threads; "
        f"torch {machine['torch']}; {run['dtype']}, batch {run['batch_size']}, "
        f"{'channels last' if run['channels_last'] else 'default layout'}; {run['rounds']} rounds"
        f"{_in_processes(run['processes'])}; "
        f"commit {(machine['commit'] or 'unknown')[:12]}",
        "",
        f"Peaks of this machine: {machine['tflop_per_s']:.3g} TFLOP/s in a product, "
        f"{machine['gb_per_s']:.4g} GB/s in a copy.",
        "",
        "| model | mode | images/s | of the bound | against | ratio (quartiles) | latency ms, p50 / p95 | "
        "memory MiB (recomputing) |",
        "|---|---|---:|---:|---|---:|---:|---:|",
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
        memory = "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
        if "recomputing_memory_mib" in row:
            memory += f" ({row['recomputing_memory_mib']:.0f})"
        bound = min(row["bound_arithmetic"], row["bound_bytes"])
        lines.append(
            f"| {row['model']}{_compiled(row['compiled'])} | {row['mode']} | {row['img_per_s']:.1f} | "
            f"{row['img_per_s'] / bound:.0%} of {bound:.4g} | {against} | {ratio} | "
            f"{latency} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def _in_processes(count: int) -> str:
    return f" in each of {count} processes per model and baseline" if count else ""


def _compiled(flag: bool) -> str:
    return ", compiled" if flag else ""


def draw(result: dict[str, Any], picture: Path) -> None:
    """Images/s against multiply-adds, a panel per mode; nobody on the line is outrun by a larger model."""
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    figure = Figure(figsize=(6.5 * len(modes), 4.8), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        rows: dict[str, dict[str, Any]] = {}
        for row in result["rows"]:
            # A model may be there a second time, as what another is compared with.
            if row["mode"] == mode and (row["model"] not in rows or "baseline" in row):
                rows[row["model"]] = row
        shapes, colours = itertools.cycle("osD^vPX*"), itertools.cycle(_COLOURS)
        points = {}
        for name, row in rows.items():
            work = result["costs"][name][mode]
            points[name] = (work["gmacs"] + work["fft_gmacs"], row["img_per_s"])
        # The legend in the order of the picture, from above.
        for name in sorted(points, key=lambda name: -points[name][1]):
            rival = rows[name].get("baseline")
            if rival is None:
                axes.plot(*points[name], "o", mfc="white", mec="#888888")
                continue
            axes.plot(*zip(points[rival], points[name], strict=True), color="#cccccc", zorder=1)
            axes.plot(*points[name], next(shapes), color=next(colours), label=name)
        axes.legend(fontsize=7, frameon=False)
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
    figure.suptitle("MixLab and baselines (white); dashed: fastest of its size or larger")
    figure.savefig(picture, dpi=130)


def _leads(point: tuple[float, float], points: dict[str, tuple[float, float]]) -> bool:
    return not any(g >= point[0] and s > point[1] for g, s in points.values())


def file_name(result: dict[str, Any]) -> str:
    """Device, precision, how it was run, what, if it was one mode alone, and whether models were alone."""
    run, modes = result["run"], {row["mode"] for row in result["rows"]}
    parts = [run["device"], run["dtype"], "compiled" if run["compile"] else "eager"]
    parts += ["channels_last"] * run["channels_last"] + [*modes] * (len(modes) == 1)
    return "_".join(parts + ["alone"] * bool(run["processes"]))


def machine_folder(machine: dict[str, Any]) -> str:
    """A name for what was measured on one kind of machine: its GPU's, or else its processor's."""
    name = machine.get("gpu", machine["cpu"]).lower()
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "unknown"


def write(result: dict[str, Any], folder: Path) -> Path:
    """The result as .json, .md and .png, in a folder of its machine."""
    folder = folder / machine_folder(result["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(result)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(to_markdown(result))
    draw(result, path.with_suffix(".png"))
    return path.with_suffix(".json")
