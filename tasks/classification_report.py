"""What an evaluation writes beside its figures: predictions per image, accuracy per class, confusions."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils.plotting import plot_confusion
from utils.tables import write_rows

from .classification_metrics import Predictions, SetEvaluator

FORMATS = (".csv", ".parquet")

# Of a report.
TABLES = ("per_class.csv", "confusion.csv")


def check_predictions_file(name: str, report: bool = False) -> None:
    """ValueError unless predictions can be written to a file of this name, with `report` beside a report."""
    suffix = Path(name).suffix
    if Path(name).name != name:
        raise ValueError(
            f"TEST.PREDICTIONS='{name}' must be a file's name without folders: it lies in the run's folder"
        )
    if report and name in TABLES:
        raise ValueError(
            f"TEST.PREDICTIONS='{name}' is a file that TEST.REPORT writes: give it another name"
        )
    if suffix not in FORMATS:
        raise ValueError(f"TEST.PREDICTIONS='{name}' must end in one of {list(FORMATS)}")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"TEST.PREDICTIONS='{name}' needs the package pyarrow: pip install pyarrow, or name a .csv file"
        )


def write_predictions(
    path: Path,
    predictions: Predictions,
    describe: Callable[[int], str],
    classes: Sequence[str],
    accepted: Tensor | None = None,
) -> None:
    """One row per image, in the order of the set; the suffix of `path` is the format.

    Columns: `sample` (its file, if it has one), `label`, `class`, and for each of the best five predictions
    `top<k>` (label), `top<k>_class`, `top<k>_prob`. Where several labels are right (`accepted`), `label` and
    `class` are what the file's folder says, and `accepted` lists the right ones, separated by blanks.
    """
    labels, top = predictions.labels, predictions.classes
    columns: dict[str, list[Any]] = dict(
        sample=[describe(index) for index in predictions.indices.tolist()],
        label=labels.tolist(),
    )
    columns["class"] = [classes[label] for label in labels.tolist()]
    if accepted is not None:
        rows = accepted[predictions.indices].tolist()
        columns["accepted"] = [" ".join(str(label) for label in row if label >= 0) for row in rows]
    for rank in range(top.shape[1]):
        chosen = top[:, rank].tolist()
        columns[f"top{rank + 1}"] = chosen
        columns[f"top{rank + 1}_class"] = [classes[label] for label in chosen]
        columns[f"top{rank + 1}_prob"] = (
            predictions.probabilities[:, rank].astype(np.float64).round(6).tolist()
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
    else:
        write_rows(path, list(columns), zip(*columns.values(), strict=True))


def write_report(folder: Path, name: str, evaluator: SetEvaluator, classes: Sequence[str]) -> None:
    """`per_class<name>.csv`, `confusion<name>.csv` and `confusion<name>.png`; nothing where labels are lists.

    Rows of the confusion are labels, columns predictions, cells numbers of images.
    """
    if evaluator.confusion is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = [classes[label] for label in evaluator.classes]
    counts = evaluator.confusion.tolist()
    accuracies = evaluator.class_accuracies().tolist()
    write_rows(
        folder / f"per_class{name}.csv",
        ["label", "class", "images", "acc1"],
        (
            [label, own, sum(row), "" if not sum(row) else f"{accuracy:.4f}"]
            for label, own, row, accuracy in zip(
                evaluator.classes, names, counts, accuracies, strict=True
            )
        ),
    )
    write_rows(
        folder / f"confusion{name}.csv",
        ["class", *names],
        ([own, *row] for own, row in zip(names, counts, strict=True)),
    )
    plot_confusion(evaluator.confusion.numpy(), names, folder / f"confusion{name}.png")
