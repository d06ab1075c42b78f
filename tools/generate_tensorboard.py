"""Turn the log of a run into TensorBoard curves and a picture: ours, Swin's, DeiT's, timm's.

    python tools/generate_tensorboard.py output/dhvt_tiny/default
    python tools/generate_tensorboard.py run_log.txt --output curves --png curves.png

Reads, by what is in the lines: our metrics.jsonl; log_rank*.txt of Swin, DFvT and ours
("Train: [e/E][i/N] ...", " * Acc@1 ..."); log.txt of the DeiT family (JSON lines), also mixed with what it
prints ("Epoch: [e] [i/N] ..."); timm's summary.csv. Lines that are cut off or damaged are counted and
skipped. Steps are optimizer steps, or batches, or, where a log knows neither, epochs.
"""

import argparse
import csv
import io
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.files import check_output  # noqa: E402  found through the line above
from utils.plotting import plot_training  # noqa: E402

# What a folder is searched for, the most exact first.
LOGS = ("metrics.jsonl", "log_rank0.txt", "run_log.txt", "log.txt", "summary.csv")

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
_SWIN = re.compile(r"Train: \[(\d+)/\d+\]\[(\d+)/(\d+)\]\s+(.*)")
_DEIT = re.compile(r"Epoch: \[(\d+)\]\s+\[\s*(\d+)/(\d+)\]\s+(.*)")
# "lr 0.1", "loss 6.9 (7.0)", "loss: 6.9 (7.0)", "mem 7000MB"; not "eta 0:10:00".
_VALUE = re.compile(rf"(\w+):? +({_NUMBER})(?![\w:.])(?: +\({_NUMBER}\))?")
_MEMORY = re.compile(r"\b(?:max )?mem:? +(\d+)(?:MB)?\b")
_SCORE = re.compile(rf"\* Acc@1 +({_NUMBER}) +Acc@5 +({_NUMBER})(?: +loss +({_NUMBER}))?")
# Of dense tasks: "* AP 30.100 mask AP 25.000 (10 images)", "* mIoU 40.10 aAcc 80.00 (9 images)"
_NAMED = rf"((?:mask )?AP\w*|mIoU|mAcc|aAcc) +({_NUMBER}) +"
_DENSE_SCORE = re.compile(rf"\* ((?:{_NAMED})+)\(\d+ images")
# How whole lines end: Swin's with the memory, DeiT's with the times (and the memory of a GPU).
_END = re.compile(r"\bmem \d+MB|\bdata: [\d.]+")
# A line that begins as one of these must be whole.
_STARTS = re.compile(r"Train: \[|Epoch: \[(?!.*Total time)|\* (?:Acc@1|AP|mIoU|aAcc)")
_SKIPPED = {"eta", "n_parameters", "epoch", "kind", "step", "mem"}
# What pictures show, of the first task that has one.
_METRICS = ("acc1", "AP", "mIoU")
_TIMM = {"eval_top1": "acc1", "eval_top5": "acc5"}


@dataclass
class Log:
    """Curves of a log.

    Attributes:
        values: (kind, step) -> numbers by name; kind is train or eval. What comes later counts.
        damaged: lines that were skipped.
        found: how many lines of which form were read.
    """

    values: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    damaged: int = 0
    found: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        """Count numbers of one kind and step in."""
        self.values.setdefault((kind, step), {}).update(numbers)

    def records(self) -> list[dict[str, Any]]:
        """One dict per kind and step, as in metrics.jsonl, by step."""
        ordered = sorted(self.values.items(), key=lambda item: (item[0][1], item[0][0]))
        return [dict(kind=kind, step=step, **numbers) for (kind, step), numbers in ordered]


def read_log(path: str | Path) -> Log:
    """Read a log, or the best one in a folder.

    Raises:
        ValueError: there is none, or nothing in it is understood.
    """
    path = find_log(Path(path))
    text = path.read_text(encoding="utf-8", errors="replace")
    first = text.lstrip().split("\n", 1)[0]
    log = _read_csv(text) if re.match(r"epoch,\w+", first) else _read_lines(text.splitlines())
    if not log.values:
        raise ValueError(
            f"{path} has no line of a log that is known (metrics.jsonl, Swin's, DeiT's, timm's "
            f"summary.csv), and {log.damaged} damaged ones"
        )
    return log


def find_log(path: Path) -> Path:
    """The log that `path` is, or that a folder has; ValueError if there is none."""
    if path.is_file():
        return path
    found = [path / name for name in LOGS if (path / name).is_file()]
    if not found:
        what = f"has none of {list(LOGS)}" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}")
    return found[0]


def _read_lines(lines: Iterable[str]) -> Log:
    """JSON lines and printed ones, in any mixture."""
    log = Log()
    batches = 0  # of an epoch, as far as the lines say
    after = 0  # step after the last training line, which a score without a number belongs to
    epochs: list[
        dict[str, Any]
    ] = []  # JSON lines of whole epochs, whose step follows from `batches`
    for line in lines:
        text = line.strip()
        if text.startswith("{"):
            try:
                record = {key: _float(value) for key, value in json.loads(text).items()}
                if "kind" in record:
                    log.add(record["kind"], int(record["step"]), _numbers(record))
                    log.found["metrics"] += 1
                elif "epoch" in record:
                    epochs.append(record)
                    log.found["epochs"] += 1
            except (ValueError, KeyError, TypeError, AttributeError):
                log.damaged += 1
            continue
        match = _SWIN.search(text) or _DEIT.search(text)
        score = _SCORE.search(text)
        if match:
            epoch, index, count = map(int, match.groups()[:3])
            numbers = _pairs(match[4])
            if "loss" not in numbers or not _END.search(match[4]):
                log.damaged += 1
                continue
            batches = count
            after = epoch * count + min(index + 1, count)
            log.add("train", after, {"epoch": epoch, **numbers})
            log.found["batches"] += 1
        elif score:
            numbers = dict(zip(("acc1", "acc5", "loss"), score.groups(), strict=True))
            log.add("eval", after, {k: float(v) for k, v in numbers.items() if v is not None})
            log.found["scores"] += 1
        elif dense := _DENSE_SCORE.search(text):
            named = re.findall(_NAMED, dense[1])
            scores = {name.replace(" ", "_"): float(value) for name, value in named}
            log.add("eval", after, scores)
            log.found["scores"] += 1
        elif _STARTS.search(text):
            log.damaged += 1
    for record in epochs:
        epoch = int(record["epoch"])
        step = (epoch + 1) * batches if batches else epoch
        for prefix, kind in (("train_", "train"), ("test_", "eval")):
            numbers = {
                key.removeprefix(prefix): value
                for key, value in _numbers(record).items()
                if key.startswith(prefix)
            }
            if numbers:
                log.add(kind, step, {"epoch": epoch, **numbers})
    return log


def _read_csv(text: str) -> Log:
    """timm's summary.csv: a row per epoch."""
    log = Log()
    rows = list(csv.reader(io.StringIO(text)))
    header = rows[0]
    for row in rows[1:]:
        try:
            values = dict(zip(header, map(float, row), strict=True))
            epoch = int(values["epoch"])
        except (ValueError, KeyError):
            log.damaged += bool(row)
            continue
        for name, value in values.items():
            if name != "epoch":
                prefix, _, rest = name.partition("_")
                kind = "eval" if prefix == "eval" else "train"
                short = rest if prefix in ("train", "eval") else name
                log.add(kind, epoch, {"epoch": epoch, _TIMM.get(name, short): value})
        log.found["rows"] += 1
    return log


def _pairs(text: str) -> dict[str, float]:
    """Numbers of a printed line by name; those in brackets are means over the epoch and left out."""
    numbers = {name: float(value) for name, value in _VALUE.findall(text) if name not in _SKIPPED}
    memory = _MEMORY.search(text)
    return numbers | ({"mem_mib": float(memory[1])} if memory else {})


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in record.items()
        if key not in _SKIPPED - {"epoch"} and type(value) in (int, float)
    }


def _float(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def write_tensorboard(log: Log, folder: str | Path) -> None:
    """Write the curves as TensorBoard scalars `kind/name`, as a run of ours does.

    Raises:
        ValueError: the folder has curves already, with which these would be mixed; or no TensorBoard.
    """
    folder = Path(folder)
    if any(folder.glob("events.out.tfevents.*")):
        raise ValueError(f"{folder} has curves already: remove it, or give another --output")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"TensorBoard is missing ({error}): pip install tensorboard") from error
    with SummaryWriter(str(folder)) as writer:
        for (kind, step), numbers in sorted(log.values.items(), key=lambda item: item[0][1]):
            for name, value in numbers.items():
                writer.add_scalar(f"{kind}/{name}", value, step)


def write_picture(log: Log, picture: str | Path, title: str = "") -> None:
    """Draw loss, accuracy and learning rate, as a run of ours does."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in log.records()))
        names = {
            name for (kind, _), numbers in log.values.items() if kind == "eval" for name in numbers
        }
        metric = next((name for name in _METRICS if name in names), _METRICS[0])
        plot_training(file, picture, metric, title)


def main(args: Sequence[str] | None = None) -> None:
    """Command line -> files; exits with status 2 at a mistake."""
    parser = argparse.ArgumentParser(
        prog="generate_tensorboard.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("log", help="a log, or a folder that has one")
    parser.add_argument("--output", help="folder for TensorBoard; beside the log if not given")
    parser.add_argument("--png", help="a picture to draw as well (.png, .svg, .pdf)")
    options = parser.parse_args(args)
    try:
        path = find_log(Path(options.log))
        log = read_log(path)
        folder = Path(options.output or path.parent / f"tensorboard_{path.stem}")
        check_output(folder, "--output", is_folder=True)
        if options.png:
            check_output(Path(options.png), "--png")
        write_tensorboard(log, folder)
        if options.png:
            write_picture(log, options.png, path.parent.resolve().name)
    except ValueError as error:
        parser.error(str(error))
    lines = ", ".join(f"{count} {form}" for form, count in log.found.items())
    print(f"{path}: {lines}; {log.damaged} damaged lines skipped")
    print(f"written: {folder}" + (f", {options.png}" if options.png else ""))


if __name__ == "__main__":
    main()
