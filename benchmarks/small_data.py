"""What schedules, budgets and teachers do, on scikit-learn's digits: minutes on one core each.

    python benchmarks/small_data.py evit           # EViT fine-tuned from a DeiT that is trained here
    python benchmarks/small_data.py dge            # a budget of 0.5, and no budget
    python benchmarks/small_data.py distillation   # a student with and without a teacher, three seeds

Every run is one of `main.py --cfg configs/demo.yaml` with other keys; the JSON has the command of each. 1,437
images to train on and 360 held out: one image is 0.28 points. The figures say that the parts work together;
they are no claim about ImageNet. Results: benchmarks/results/digits_*.json and .png.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main as program  # noqa: E402  found through the line above
from tools import keep_rates  # noqa: E402
from utils.fingerprint import fingerprint  # noqa: E402
from utils.plotting import read_metrics  # noqa: E402

DEMO = "configs/demo.yaml"
# No shifts: four of the 8x8 pixels per token leave no room for them, and transformers underfit.
WHOLE = ("AUG.SCALE", "[1.0, 1.0]")
RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


class Lab:
    """Runs of main.py in one temporary folder; remembers their commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, []

    def run(self, tag: str, *opts: Any, flags: Sequence[str] = ()) -> Path:
        """Train with some keys changed -> the run's output folder."""
        words = [*flags, "--tag", tag, "--opts", *(str(word) for word in opts)]
        self.commands.append(f"python main.py --cfg {DEMO} {shlex.join(words)}")
        program.main(["--cfg", str(ROOT / DEMO), "--output", str(self.folder), *words])
        return self.folder / "demo_dhvt_digits" / tag


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind ("train" or "eval") of a run's metrics.jsonl."""
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def last(run: Path) -> dict[str, Any]:
    """Scores after the last epoch, so that no epoch is chosen by what it scores."""
    return records(run, "eval")[-1]


def transformer(node: str, depth: int, patch_size: int = 4) -> list[Any]:
    """Keys of a narrow transformer on images of 16x16 pixels, which come from 8x8."""
    keys = dict(PATCH_SIZE=patch_size, EMBED_DIM=48, DEPTH=depth, NUM_HEADS=3)
    own = [word for key, value in keys.items() for word in (f"MODEL.{node}.{key}", value)]
    return ["MODEL.TYPE", node.lower(), "PRINT_FREQ", 1, *own]


def evit(lab: Lab) -> dict[str, Any]:
    """DeiT, then EViT with a keep rate that falls to 0.7, both scored at many keep rates."""
    start, length = 2, 4  # epochs
    deit = lab.run("deit", *transformer("DEIT", 6), "TRAIN.EPOCHS", 40, *WHOLE)
    keys = [
        *transformer("EVIT", 6),
        *WHOLE,
        *("MODEL.EVIT.DROP_LOC", "[1, 2, 4]", "MODEL.EVIT.KEEP_RATE", 0.7),
        *("MODEL.EVIT.SHRINK_START_EPOCH", start, "MODEL.EVIT.SHRINK_EPOCHS", length),
    ]
    weights = {"deit": deit / "checkpoints" / "last.pth"}
    tuned = lab.run(
        "evit", *keys, "TRAIN.EPOCHS", 10, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 5e-4,
        flags=["--pretrained", str(weights["deit"])],
    )  # fmt: skip
    weights["evit"] = tuned / "checkpoints" / "last.pth"
    found = {
        name: keep_rates.main(
            [
                *("--cfg", str(ROOT / DEMO), "--resume", str(file)),
                *("--output", str(lab.folder / f"{name}.json")),
                *("--rates", *map(str, RATES), "--opts", *map(str, keys)),
            ]
        )
        for name, file in weights.items()
    }
    # Without the speeds: models of this size are all overhead.
    keep = ("keep_rate", "acc1", "acc5", "loss", "images", "gmacs")
    tables = {name: [{key: r[key] for key in keep} for r in table] for name, table in found.items()}
    steps = records(tuned, "train")
    per_epoch = sum(record["epoch"] == 0 for record in steps)
    differences = []
    for record in steps:
        step = record["step"] - 1  # the rate is set before the step is counted
        along = min(max((step / per_epoch - start) / length, 0.0), 1.0)
        rate = 0.7 + 0.3 * 0.5 * (1 + math.cos(math.pi * along))
        differences.append(abs(record["keep_rate"] - rate))
    return dict(
        scores_before=last(deit)["acc1"],
        keep_rate_per_step=[record["keep_rate"] for record in steps],
        largest_difference_from_formula=max(differences),
        not_tuned=tables["deit"],
        tuned_at_0_7=tables["evit"],
    )


def draw_evit(result: dict[str, Any], axes: Sequence[Any]) -> None:
    axes[0].plot(result["keep_rate_per_step"])
    axes[0].set(xlabel="step of fine-tuning", ylabel="keep rate", title="EViT: keep rate")
    for key, label in (("not_tuned", "DeiT's weights"), ("tuned_at_0_7", "fine-tuned to 0.7")):
        table = result[key]
        axes[1].plot([r["keep_rate"] for r in table], [r["acc1"] for r in table], "o-", label=label)
    axes[1].set(xlabel="keep rate at evaluation", ylabel="top-1 (%)", title="digits, 360 images")
    axes[1].legend(frameon=False)


def dge(lab: Lab) -> dict[str, Any]:
    """DeiT with grained queries, once with a budget of 0.5 and once without."""
    result = {}
    for name, weight in (("budget", 1.0), ("no_budget", 0.0)):
        run = lab.run(
            name, *transformer("DEIT_DGE", 3, patch_size=2), "MODEL.DEIT_DGE.BUDGET", 0.5,
            "MODEL.DEIT_DGE.BUDGET_WEIGHT", weight, "TRAIN.EPOCHS", 20,
        )  # fmt: skip
        steps, scores = records(run, "train"), records(run, "eval")
        keys = ("step", "acc1", "dge_ratio_mean", "dge_ratio_p5", "dge_ratio_p95")
        result[name] = dict(
            ratio_per_step=[round(record["dge_ratio"], 5) for record in steps],
            static_gmacs=steps[-1]["dge_static_gmacs"],
            mean_ratio_of_last_100_steps=statistics.mean(r["dge_ratio"] for r in steps[-100:]),
            evaluations=[{key: record[key] for key in keys} for record in scores],
        )
    return result


def draw_dge(result: dict[str, Any], axes: Sequence[Any]) -> None:
    for name, label in (("budget", "budget 0.5"), ("no_budget", "no budget")):
        axes[0].plot(result[name]["ratio_per_step"], label=label, linewidth=0.8)
        table = result[name]["evaluations"]
        steps = [r["step"] for r in table]
        axes[1].plot(steps, [r["dge_ratio_mean"] for r in table], label=label)
        axes[1].fill_between(
            steps,
            [r["dge_ratio_p5"] for r in table],
            [r["dge_ratio_p95"] for r in table],
            alpha=0.2,
        )
    for panel, title in zip(axes, ("training batches", "held out: mean, 5 % to 95 %"), strict=True):
        panel.axhline(0.5, color="#333333", linewidth=0.8, linestyle=":")
        panel.set(xlabel="step", ylabel="dynamic / static", title=f"DGE: {title}")
        panel.legend(frameon=False)


def distillation(lab: Lab, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """A two-headed student: its heads learn the labels both, or one of them a DHVT's decisions."""
    mixing = [
        "AUG.MIXUP",
        0.8,
        "AUG.CUTMIX",
        1.0,
    ]  # a teacher of images that are never wrong is no teacher
    teacher = lab.run("teacher", "PRINT_FREQ", 1)
    taught = [
        *("TRAIN.DISTILLATION.TYPE", "hard", "TRAIN.DISTILLATION.TEACHER", teacher / "config.yaml"),
        *("TRAIN.DISTILLATION.TEACHER_WEIGHTS", teacher / "checkpoints" / "last.pth"),
    ]
    student = [*transformer("DEIT", 4), "MODEL.DEIT.DISTILLED", True, "TRAIN.EPOCHS", 40]
    student += [*mixing, *WHOLE]
    scores: dict[str, list[float]] = {"without": [], "with": []}
    for seed in seeds:
        for name, more in (("without", []), ("with", taught)):
            run = lab.run(f"{name}_{seed}", *student, "SEED", seed, *more)
            scores[name].append(last(run)["acc1"])
    summary = {
        name: dict(
            acc1=values,
            mean=statistics.mean(values),
            standard_deviation=statistics.stdev(values),
        )
        for name, values in scores.items()
    }
    gains = [b - a for a, b in zip(scores["without"], scores["with"], strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return dict(
        teacher_acc1=last(teacher)["acc1"],
        students=summary,
        gain_per_seed=gains,
        mean_gain=statistics.mean(gains),
        standard_error=error,
        beyond_two_standard_errors=statistics.mean(gains) > 2 * error,
    )


def draw_distillation(result: dict[str, Any], axes: Sequence[Any]) -> None:
    names = ["without", "with"]
    for place, name in enumerate(names):
        student = result["students"][name]
        axes[0].errorbar(place, student["mean"], yerr=student["standard_deviation"], fmt="o")
        axes[0].plot([place] * len(student["acc1"]), student["acc1"], "x", color="#888888")
    axes[0].axhline(result["teacher_acc1"], color="#333333", linewidth=0.8, linestyle=":")
    axes[0].set_xticks(range(2), [f"{name} teacher" for name in names])
    axes[0].set(
        ylabel="top-1 (%)", title="two-headed student; dotted: the teacher", xlim=(-0.5, 1.5)
    )
    axes[1].bar(range(len(result["gain_per_seed"])), result["gain_per_seed"])
    axes[1].set(xlabel="seed", ylabel="points gained", title="hard distillation")


STUDIES = {
    "evit": (evit, draw_evit),
    "dge": (dge, draw_dge),
    "distillation": (distillation, draw_distillation),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--output", default=ROOT / "benchmarks" / "results", type=Path, help=" ")
    args = parser.parse_args(argv)
    study, draw = STUDIES[args.study]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        result = study(lab)
        commands = [command.replace(folder, "output") for command in lab.commands]
    seconds = time.perf_counter() - start
    machine = fingerprint(torch.device("cpu"))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    draw(result, panels)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output / f"digits_{args.study}.png", dpi=120)
    content = dict(
        command=f"python benchmarks/small_data.py {args.study}",
        seconds=round(seconds, 1),
        machine=machine,
        runs=commands,
        **result,
    )
    path = args.output / f"digits_{args.study}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
