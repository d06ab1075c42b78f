"""Train one experiment at every point of a grid of config values, and compare the runs.

    python tools/sweep.py --cfg FILE --grid TRAIN.BASE_LR=1e-4,5e-4 --grid MODEL.DROP_PATH_RATE=0,0.1
    python tools/sweep.py --cfg FILE --grid "AUG.CUTMIX_MINMAX=None,[0.2,0.8]" -- --data-path /data/flowers

What follows `--` are other flags of main.py, the same for all points. All points are checked before the first
one starts. They run one after another, each in a process of its own, with a TAG that is made of its values.
The same command again leaves out what is finished, and continues what is not.

Prints a table, the best score first, and writes it as `sweep.csv` and `sweep.json` into OUTPUT/MODEL.NAME.
Minutes are those of all processes of a point that this program saw end. The exit status is 1 if one failed.
"""

import argparse
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import MODE_KEYS, dump, load_config, output_dir  # noqa: E402  found through the line above
from modes.build import build_placed, known_classes  # noqa: E402
from tasks import build_task  # noqa: E402
from utils.arguments import parse_args  # noqa: E402
from utils.checkpoint_files import load_file  # noqa: E402
from utils.plotting import read_metrics  # noqa: E402
from utils.tables import write_rows  # noqa: E402
from utils.yaml_files import differing  # noqa: E402

# Keys that change what a run takes, not what comes of it.
NEUTRAL = (
    "OUTPUT",
    "DATA.DATA_PATH",
    "DATA.NUM_WORKERS",
    "DATA.PIN_MEMORY",
    "PRINT_FREQ",
    "SAVE_FREQ",
    "SAVE_KEEP",
    "SAVE_STEPS",
)

# Of the output of a point that failed.
LINES = 20


@dataclass
class Point:
    """One run of the grid.

    Attributes:
        values: text of its values by config key, as they were given.
        arguments: of main.py.
        metric: key of the score, higher is better.
        params: of the model.
    """

    values: dict[str, str]
    arguments: list[str]
    config: Any
    metric: str
    params: int

    @property
    def folder(self) -> Path:
        return output_dir(self.config)

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "main.py"), *self.arguments]

    def best(self) -> float | None:
        """Score of the best checkpoint, once the run is finished; None before.

        `eval.json` is the last thing that counts in a run. One by `--eval` has no epoch.
        """
        results, last = self.folder / "eval.json", self.folder / "checkpoints" / "last.pth"
        if not results.is_file() or not last.is_file():
            return None
        if results.stat().st_mtime < last.stat().st_mtime:
            return None  # of a shorter run, which was continued
        try:
            content = json.loads(results.read_text())
        except ValueError:
            return None  # cut off, so the run was
        return content[self.metric] if "epoch" in content else None

    def last(self) -> float | None:
        """Score after the last epoch; None if there is none, or it is no number."""
        try:
            records = read_metrics(self.folder / "metrics.jsonl")
        except ValueError:
            return None  # it failed before it noted anything
        scores = [r[self.metric] for r in records if r["kind"] == "eval" and "epoch" in r]
        return scores[-1] if scores and math.isfinite(scores[-1]) else None


def split_values(text: str) -> list[str]:
    """`a,[b,c]` -> `a` and `[b,c]`: at the commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def parse_grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """`KEY=VALUE,VALUE` texts -> values by key.

    Raises:
        ValueError: another form, a key or a value that is there twice, or TAG, which tells the points apart.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not key or not equals:
            raise ValueError(
                f"--grid {text} must be KEY=VALUE,VALUE, as in TRAIN.BASE_LR=1e-4,5e-4"
            )
        if key.lower() in map(str.lower, grid):
            raise ValueError(f"--grid {key} is given twice: give all of its values at once")
        if key in ("TAG", *MODE_KEYS):
            raise ValueError(
                f"--grid {key}: points are trained, each with a TAG made of its values; choose other keys"
            )
        grid[key] = split_values(values)
        if len(set(grid[key])) < len(grid[key]):
            raise ValueError(f"--grid {text} has a value twice")
    return grid


def tag_of(values: Mapping[str, str], tag: str = "default") -> str:
    """TAG of a point: `BASE_LR=1e-4,DROP_PATH_RATE=0`, after the experiment's own one if it has one."""
    names = [key.rpartition(".")[2] for key in values]
    short = len(set(names)) == len(names)
    parts = []
    for key, name in zip(values, names, strict=True):
        # Brackets, quotes, slashes and spaces are trouble in the name of a folder.
        value = re.sub(r"[^\w.+-]+", "-", values[key].strip("[](){}'\" "))
        parts.append(f"{name if short else key}={value}")
    return ",".join([*([tag] if tag != "default" else []), *parts])


def make_points(
    cfg: str, grid: Mapping[str, Sequence[str]], rest: Sequence[str] = (), output: str | None = None
) -> list[Point]:
    """One point for each combination of values, the last key changing fastest.

    Args:
        rest: other arguments of main.py.
        output: root of the output folders, instead of the config's.

    Raises:
        ValueError: a point cannot be configured or its model not be built, it would not be trained or could
            not be continued, two would have one folder, or what is there is of other settings.
        FileNotFoundError: there is no such config file.
    """
    given = ["--cfg", cfg, *rest, *(["--output", output] if output else [])]
    points: dict[Path, Point] = {}
    tag = None
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        arguments = [*given, "--opts", *itertools.chain(*values.items())]
        _, own, flags = parse_args(arguments)
        if both := sorted(set(flags) & set(grid)):
            raise ValueError(f"{both} are set by --grid and by flags after --: give one of them")
        if tag is None:  # the same for all points
            tag = load_config(own.cfg, own.opts, flags).TAG
        point = _make_point(values, [*arguments, "--tag", tag_of(values, tag)])
        if point.folder in points:
            raise ValueError(
                f"{points[point.folder].values} and {values} would have one folder, {point.folder}: leave "
                "one of them out"
            )
        points[point.folder] = point
    return list(points.values())


def _make_point(values: dict[str, str], arguments: list[str]) -> Point:
    _, own, flags = parse_args(arguments)
    config = load_config(own.cfg, own.opts, flags)
    if asked := [key for key in MODE_KEYS if config[key]]:
        raise ValueError(f"{asked[0]}: points of a grid are trained; leave its flag out")
    if not config.TRAIN.AUTO_RESUME:
        raise ValueError(
            "TRAIN.AUTO_RESUME=False: a point that was interrupted would start over; leave it True"
        )
    best = output_dir(config) / "checkpoints" / "best.pth"
    # The data of a run that is there may be gone.
    classes = len(load_file(best, mapped=True)["classes"]) if best.is_file() else None
    classes = classes or known_classes(config)
    with torch.device("meta"):
        model = build_placed(config, classes, torch.device("meta"))
    # As many as a model has that knows no data; nothing is asked but the metric.
    task = build_task(config, classes or config.MODEL.NUM_CLASSES or 1000)
    params = sum(parameter.numel() for parameter in model.parameters())
    point = Point(values, arguments, config, task.metric, params)
    _check_folder(point)
    return point


def _check_folder(point: Point) -> None:
    """ValueError if the folder has a run of other settings, which would be taken for this one."""
    saved = point.folder / "config.yaml"
    if not saved.is_file() or not (point.folder / "checkpoints" / "last.pth").is_file():
        return
    settings = differing(saved.read_text(encoding="utf-8"), dump(point.config))
    found = [
        f"{key} ({there!r} there, {here!r} here)"
        for key, (there, here) in settings.items()
        if key not in NEUTRAL
    ]
    if found:
        raise ValueError(
            f"{point.folder} has a run of other settings: {', '.join(found[:5])}. Give these ones "
            "another place: --output DIR, or --tag NAME after --"
        )


def run_points(points: Sequence[Point], folder: Path) -> list[dict[str, Any]]:
    """Run what is not finished -> one record per point, the best first; both files are kept up to date.

    A record has `values`, `metric`, `best`, `last` (None without a score), `params`, `minutes` (None if
    unknown), `status` (skipped, finished or failed) and `folder`.

    Args:
        folder: of sweep.csv and sweep.json; minutes of an earlier sweep are read from the latter.
    """
    earlier = _earlier_minutes(folder / "sweep.json")
    records = []
    for number, point in enumerate(points, 1):
        label = f"[{number}/{len(points)}] {point.config.TAG}"
        minutes = earlier.get(str(point.folder))
        if point.best() is not None:
            status = "skipped"
            print(f"{label}: skipped, {point.folder} is finished", flush=True)
        else:
            print(f"{label}: runs, see {point.folder / 'log_rank0.txt'}", flush=True)
            start = time.perf_counter()
            status = _run(point, label)
            minutes = (minutes or 0.0) + (time.perf_counter() - start) / 60
        records.append(
            dict(
                values=point.values,
                metric=point.metric,
                best=point.best(),
                last=point.last(),
                params=point.params,
                minutes=minutes,
                status=status,
                folder=str(point.folder),
            )
        )
        records.sort(key=lambda r: -math.inf if r["best"] is None else r["best"], reverse=True)
        write_results(records, folder)
    return records


def _run(point: Point, label: str) -> str:
    """`finished`, or `failed` with the end of the output on standard output."""
    done = subprocess.run(
        point.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        print(f"{label}: finished", flush=True)
        return "finished"
    end = "\n".join(f"  {line}" for line in done.stdout.splitlines()[-LINES:])
    print(f"{label}: failed with status {done.returncode}; its output ends with\n{end}", flush=True)
    return "failed"


def _earlier_minutes(path: Path) -> dict[str, float]:
    """By folder, what an earlier sweep has noted."""
    if not path.is_file():
        return {}
    try:
        return {record["folder"]: record["minutes"] for record in json.loads(path.read_text())}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a sweep's ({error}): move it away") from error


def write_results(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The records as sweep.json, and as sweep.csv with a column for each key of the grid."""
    keys = list(records[0]["values"])
    rest = [name for name in records[0] if name != "values"]
    rows = [[*r["values"].values(), *(r[name] for name in rest)] for r in records]
    write_rows(folder / "sweep.csv", [*keys, *rest], rows)
    (folder / "sweep.json").write_text(json.dumps(records, indent=2) + "\n")


def to_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as a table in Markdown."""
    keys, metric = list(records[0]["values"]), records[0]["metric"]
    header = [*keys, f"best {metric}", f"last {metric}", "params M", "minutes", "status"]
    rows = [
        [
            *r["values"].values(),
            *("-" if r[name] is None else f"{r[name]:.2f}" for name in ("best", "last")),
            f"{r['params'] / 1e6:.3f}",
            "-" if r["minutes"] is None else f"{r['minutes']:.1f}",
            r["status"],
        ]
        for r in records
    ]
    rule = ["---"] * len(keys) + ["---:"] * 4 + ["---"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Command line -> the records, the best first; exits with 1 if a point failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description=__doc__.splitlines()[0],
        usage="sweep.py --cfg FILE --grid KEY=VALUE,VALUE [options] [-- arguments of main.py]",
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    parser.add_argument(
        "--grid",
        metavar="KEY=VALUE,VALUE",
        required=True,
        action="append",
        help="a config key and its values; may be given again, for all combinations",
    )
    parser.add_argument("--output", metavar="DIR", help="root of the output folders")
    parser.add_argument("--dry-run", action="store_true", help="check, print the commands and stop")
    args = parser.parse_args(argv[:split])
    rest = argv[split + 1 :]
    try:
        if any(word.partition("=")[0] == "--cfg" for word in rest):
            raise ValueError("--cfg comes before --")
        points = make_points(args.cfg, parse_grid(args.grid), rest, args.output)
        if args.dry_run:
            for point in points:
                finished = "# finished: " if point.best() is not None else ""
                print(f"{finished}{shlex.join(point.command)}")
            return []
        folder = Path(os.path.commonpath([point.folder.parent for point in points]))
        records = run_points(points, folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(to_table(records))
    print(f"written: {folder / 'sweep.csv'}, {folder / 'sweep.json'}")
    if any(record["status"] == "failed" for record in records):
        sys.exit(1)
    return records


if __name__ == "__main__":
    main()
