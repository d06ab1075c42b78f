"""Pictures of a run, from its metrics.jsonl and its evaluation."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Two hues that stay apart for colour-blind readers and in grey; greys for everything else.
_TRAIN, _EVAL, _INK, _GRID = "#3b6fb6", "#d1662a", "#333333", "#e4e4e4"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl by step; of two of one kind and step, the later line counts.

    A line that a crash cut off is skipped. "NaN" and "Infinity" become floats.

    Raises:
        ValueError: there is no such file, or no record in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a run writes it into its output folder")
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            key = (record["kind"], record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        records[key] = {name: _number(value) for name, value in record.items()}
    if not records:
        raise ValueError(f"{path} has no record with 'kind' and 'step'")
    return sorted(records.values(), key=lambda record: record["step"])


def plot_training(
    metrics_file: str | Path, picture: str | Path, metric: str = "acc1", title: str = ""
) -> None:
    """Draw loss, evaluation metric and learning rate over the steps of a run.

    Args:
        metrics_file: the run's metrics.jsonl.
        picture: file to write; its suffix is the format (.png, .svg, .pdf).
        metric: evaluation key to draw; keys that start with it, such as acc1_ema, are drawn too.
    """
    records = read_metrics(metrics_file)
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, score, rate = figure.subplots(1, 3, sharex=True)

    _curve(loss, train, "loss", _TRAIN, "training", smooth=True)
    _curve(loss, evals, "loss", _EVAL, "evaluation", marker="o")
    _dress(loss, "loss")

    keys = sorted({key for r in evals for key in r if key.startswith(metric)})
    for key, style in zip(keys, ("-", "--", ":", "-."), strict=False):
        best = max((r[key] for r in evals if _is_finite(r.get(key))), default=math.nan)
        label = f"{key} (best {best:.2f})"
        _curve(score, evals, key, _EVAL, label, marker="o", linestyle=style)
    _dress(score, {"acc1": "top-1 accuracy (%)"}.get(metric, metric))

    _curve(rate, train, "lr", _TRAIN, "learning rate")
    rate.yaxis.set_major_formatter("{x:g}")
    rate.set_ylim(bottom=0)
    _dress(rate, "learning rate")
    if title:
        figure.suptitle(title, color=_INK, fontsize=12)
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def plot_confusion(counts: np.ndarray, classes: Sequence[str], picture: str | Path) -> None:
    """Draw how often each class (row) was taken for each (column), as a share of the row's images.

    Args:
        counts: (classes, classes) numbers of images; a class without any has an empty row.
        classes: names, written beside the axes where there are at most 40.
        picture: file to write; its suffix is the format.
    """
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(classes) <= 40
    side = 3 + 0.25 * len(classes) if named else 10
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the class's images (%)", shrink=0.8)
    axes.set_xlabel("prediction", color=_INK)
    axes.set_ylabel("label", color=_INK)
    axes.tick_params(colors=_INK, labelsize=8)
    if named:
        places = range(len(classes))
        axes.set_xticks(places, classes, rotation=90)
        axes.set_yticks(places, classes)
    if len(classes) <= 12:
        for row, column in np.ndindex(*shares.shape):
            share = shares[row, column]
            if share < 0.5:
                continue
            ink = "white" if share > 50 else _INK
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=8)
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def plot_schedule(
    curve: Sequence[tuple[int, float, float]], picture: str | Path, points: int = 4000
) -> None:
    """Draw learning rate and weight decay over the steps of a run.

    Args:
        curve: (step, learning rate, weight decay).
        picture: file to write; its suffix is the format.
        points: of a longer curve, about so many are drawn.
    """
    shown = [*curve[:: max(len(curve) // points, 1)], curve[-1]]
    records = [dict(step=step, lr=lr, decay=decay) for step, lr, decay in shown]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("lr", "decay"), ("learning rate", "weight decay"), strict=True
    ):
        _curve(axes, records, key, _TRAIN, title)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(bottom=0)
        _dress(axes, title)
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def _curve(
    axes: Axes,
    records: list[dict[str, Any]],
    key: str,
    color: str,
    label: str,
    smooth: bool = False,
    marker: str | None = None,
    linestyle: str = "-",
) -> None:
    """Draw the finite values of `key`."""
    points = [(r["step"], r[key]) for r in records if _is_finite(r.get(key))]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    marker = marker if len(points) <= 60 else None
    if smooth and len(points) > 50:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = _smoothed(values, len(points) // 50)
    axes.plot(
        steps,
        values,
        linestyle,
        color=color,
        label=label,
        linewidth=1.6,
        marker=marker,
        markersize=3,
    )


def _smoothed(values: tuple[float, ...], memory: int) -> list[float]:
    """Exponential moving average over about `memory` values, without a start-up bias."""
    decay, total, weight, smooth = 1 - 1 / max(memory, 1), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        smooth.append(total / weight)
    return smooth


def _dress(axes: Axes, title: str) -> None:
    """Quiet axes: the curves are what is to be seen."""
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.set_xlabel("step", color=_INK)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    if axes.get_legend_handles_labels()[1] not in ([], [title]):
        axes.legend(frameon=False, fontsize=9)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
