"""What a run says: log lines on the console and in a file, and metrics that programs read.

`create_logger` sets up logging once per process. Every module then uses `logging.getLogger(__name__)`
and reaches the same console and file.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from termcolor import colored
from tqdm import tqdm

_LOG = logging.getLogger(__name__)

# Swin's line format, which readers of its logs parse.
_DATE = "%Y-%m-%d %H:%M:%S"
_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _ConsoleHandler(logging.Handler):
    """Writes lines to standard output, above a tqdm progress bar if one is running."""

    def __init__(self, name: str):
        super().__init__()
        self.run_name = name

    def emit(self, record: logging.LogRecord) -> None:
        place = f"({record.filename} {record.lineno})"
        stamp = logging.Formatter(datefmt=_DATE).formatTime(record, _DATE)
        level = colored(record.levelname, _COLORS.get(record.levelno))
        head = f"{colored(f'[{stamp} {self.run_name}]', 'green')} {colored(place, 'yellow')}"
        text = f"{head}: {level} {logging.Formatter('%(message)s').format(record)}"
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):
            self.handleError(record)  # a closed pipe must not stop a training run


def create_logger(
    output_dir: str | Path | None, rank: int = 0, name: str = "mixlab"
) -> logging.Logger:
    """Send all log lines of this process to the console (rank 0) and `log_rank{rank}.txt`.

    A second call replaces the first one's console and file; handlers of others stay. What `kept_warnings`
    has kept comes first.

    Args:
        output_dir: folder of the log file, created if needed; None writes no file.
        name: stands in every line, as in Swin, where it is the model's name.
    """
    # The root logger: modules of all rooms have no other common ancestor.
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "is_mixlab", False)]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_ConsoleHandler(name)] if rank == 0 else []
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"log_rank{rank}.txt", encoding="utf-8")
        shown = name.replace("%", "%%")
        line = f"[%(asctime)s {shown}] (%(filename)s %(lineno)d): %(levelname)s %(message)s"
        file.setFormatter(logging.Formatter(line, _DATE))
        handlers.append(file)
    for handler in handlers:
        handler.is_mixlab = True
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    for record in _KEPT:
        for handler in handlers:
            handler.handle(record)
    _KEPT.clear()
    return logging.getLogger(name)


# Warnings of `kept_warnings`, for the next `create_logger`.
_KEPT: list[logging.LogRecord] = []


class _Keeper(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def kept_warnings() -> Iterator[None]:
    """Keep the warnings of a block for the log that the next `create_logger` begins.

    Handlers of others get them as ever. Where the block fails, and there are none, they are printed.
    """
    root, keeper = logging.getLogger(), _Keeper()
    root.addHandler(keeper)
    try:
        yield
    except BaseException:
        root.removeHandler(keeper)
        if not root.handlers and logging.lastResort is not None:
            for record in keeper.records:
                logging.lastResort.handle(record)
        raise
    root.removeHandler(keeper)
    _KEPT[:] = keeper.records


@contextmanager
def muted(level: int = logging.WARNING) -> Iterator[None]:
    """Keep messages up to `level` to themselves; whatever was disabled before stays so."""
    before = logging.root.manager.disable
    logging.disable(max(level, before))
    try:
        yield
    finally:
        logging.disable(before)


class MetricsWriter:
    """Appends one JSON object per `write` to `metrics.jsonl`, and its numbers to TensorBoard.

    JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and
    "-Infinity", which `float` reads. Only rank 0 writes.

    Args:
        output_dir: folder of `metrics.jsonl` and `tensorboard/`, created if needed.
        resume_step: the step that training continues from, None for a fresh run. Lines of later steps, of a
            fresh run all, move to `metrics.replaced.jsonl`: they will be made again.
        position: epoch and batch that the run which wrote the lines would have continued with. Lines of the
            same step from there on, of an accumulation or a score that was not saved, move too.
        tensorboard: False writes no TensorBoard files.
    """

    def __init__(
        self,
        output_dir: str | Path,
        rank: int = 0,
        resume_step: int | None = None,
        tensorboard: bool = True,
        position: tuple[int, int] = (0, 0),
    ):
        self._file = self._board = None
        if rank != 0:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        last_step = -1 if resume_step is None else resume_step
        of_last_step = _keep_until(path, last_step, position)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            # It hides whole steps; what stays of the last one is drawn again.
            self._board = _tensorboard(folder / "tensorboard", max(last_step, 0))
            for record in of_last_step:
                self._draw(record.pop("kind"), record.pop("step"), record)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Record `values` (numbers, text, one-element tensors) of `kind` train or eval at `step`."""
        if self._file is None:
            return
        plain = {key: v.item() if hasattr(v, "item") else v for key, v in values.items()}
        record = {"kind": kind, "step": step} | plain
        line = json.dumps({key: _valid(value) for key, value in record.items()}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        self._draw(kind, step, plain)

    def _draw(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        """Finish the files; further writes are ignored."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        self._file = self._board = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _valid(value: Any) -> Any:
    """`value` with what JSON cannot say spelt as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _keep_until(path: Path, last_step: int, position: tuple[int, int]) -> list[dict[str, Any]]:
    """Move lines to another file, as `MetricsWriter` says, and one that a crash cut off.

    Returns:
        The records of `last_step` that stay.
    """
    if not path.exists():
        return []
    kept, replaced, of_last_step = [], [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            belongs = record["step"] <= last_step
            if record["step"] == last_step and "epoch" in record:
                # The score of an epoch comes after its last batch.
                place = (record["epoch"], record.get("batch", math.inf))
                belongs = place < position
        except (ValueError, KeyError, TypeError):
            belongs = False
        (kept if belongs else replaced).append(line + "\n")
        if belongs and record["step"] == last_step and "kind" in record:
            of_last_step.append(record)
    if not replaced:
        return of_last_step
    with path.with_name("metrics.replaced.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(replaced)
    fresh = path.with_name("metrics.jsonl.tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, path)
    return of_last_step


def _tensorboard(folder: Path, purge_step: int) -> Any:
    """A SummaryWriter that hides earlier scalars from `purge_step` on; None, with a warning, without one."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        _LOG.warning("no TensorBoard files (%s): pip install tensorboard", error)
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)
