"""What a training run would do, told before it starts: parameter groups, batches, steps, rates, switches."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .plotting import plot_schedule


@dataclass(frozen=True)
class Group:
    """One parameter group of an optimizer; `layers` are the first and the last depth of its parameters."""

    lr_scale: float
    weight_decay: float  # at the first step
    layers: tuple[int, int]
    tensors: int
    params: int


@dataclass(frozen=True)
class Plan:
    """A run as it would be trained.

    Attributes:
        facts: sections of plain values: data, batch, steps, lr, ... (see `main.make_plan`).
        groups: the optimizer's, which hold every trainable parameter once.
        num_steps, steps_per_epoch: optimizer steps.
        lr_at, weight_decay_at: their values at a step, of a group with factor 1.
    """

    facts: dict[str, Any]
    groups: list[Group]
    num_steps: int
    steps_per_epoch: int
    lr_at: Callable[[int], float]
    weight_decay_at: Callable[[int], float]

    @property
    def params(self) -> int:
        """Parameters of all groups together."""
        return sum(group.params for group in self.groups)

    def curve(self) -> Iterator[tuple[int, int, float, float]]:
        """(step, epoch, learning rate, weight decay) of every step."""
        for step in range(self.num_steps):
            epoch = step // self.steps_per_epoch
            yield step, epoch, self.lr_at(step), self.weight_decay_at(step)

    def to_dict(self) -> dict[str, Any]:
        """What plan.json holds."""
        return self.facts | dict(groups=[asdict(group) for group in self.groups])

    def to_text(self) -> str:
        """The same for a reader: one line per section, and the groups as a table."""
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {_section(value)}" for name, value in self.facts.items()]
        rows = [("group", "lr factor", "weight decay", "layers", "tensors", "parameters")]
        rows += [_row(number, group) for number, group in enumerate(self.groups)]
        rows.append(
            ("sum", "", "", "", str(sum(g.tensors for g in self.groups)), f"{self.params:,}")
        )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(
            [*lines, "", *table, "The sum is the model's number of trainable parameters."]
        )

    def write(self, folder: Path) -> list[Path]:
        """plan.json, plan_lr.csv (a line per step) and plan_lr.png in `folder` -> their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        facts, table, picture = (folder / f"plan{end}" for end in (".json", "_lr.csv", "_lr.png"))
        facts.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        curve = list(self.curve())
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "epoch", "lr", "weight_decay"))
            writer.writerows(curve)
        plot_schedule([(step, lr, decay) for step, _, lr, decay in curve], picture)
        return [facts, table, picture]


def summarise_groups(
    groups: Sequence[Mapping[str, Any]], layer_id: Callable[[str], int]
) -> list[Group]:
    """Groups of an optimizer that was built from named parameters.

    Args:
        groups: with `params`, `param_names`, `lr_scale` and `weight_decay`.
        layer_id: name of a parameter -> its depth.
    """
    found = []
    for group in groups:
        depths = [layer_id(name) for name in group["param_names"]]
        found.append(
            Group(
                lr_scale=group["lr_scale"],
                weight_decay=group["weight_decay"],
                layers=(min(depths), max(depths)),
                tensors=len(depths),
                params=sum(parameter.numel() for parameter in group["params"]),
            )
        )
    return found


def _row(number: int, group: Group) -> tuple[str, ...]:
    first, last = group.layers
    return (
        str(number),
        f"{group.lr_scale:.4g}",
        f"{group.weight_decay:.4g}",
        str(first) if first == last else f"{first} to {last}",
        str(group.tensors),
        f"{group.params:,}",
    )


def _section(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(entry)}" for name, entry in value.items())
    return _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
