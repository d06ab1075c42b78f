"""The tables of README.md: models, with their counts (tests/golden/complexity.json), and recorded speed.

    python tools/tables.py                    # print the table as the stored counts give it
    python tools/tables.py --update           # count every variant, store, write the table into README.md
    python tools/tables.py --update NAME ...  # count these only, for instance a new one
    python tools/tables.py --speed            # write the recorded benchmarks into README.md

Counts are of one image at the variant's own size (`utils/complexity.py`), and need no weights.
"""

import argparse
import inspect
import json
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import load_config  # noqa: E402  found through the line above
from models import build_model, list_models, registry, variant_file  # noqa: E402
from models.layers.tokens import to_pair  # noqa: E402
from utils.complexity import count  # noqa: E402

COUNTS = ROOT / "tests" / "golden" / "complexity.json"
README = ROOT / "README.md"
START, END = "<!-- models -->", "<!-- /models -->"
SPEED_START, SPEED_END = "<!-- speed -->", "<!-- /speed -->"
RESULTS = ROOT / "benchmarks" / "results"

RESOLVERS = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}

NOTE = """GMACs are multiply-adds of one image at the input size, in matrix products and convolutions; Fourier
transforms are left out, as in the papers. Grained queries (dge) are counted with all of them asked, which is
where training starts.
"""


def count_variant(name: str) -> dict[str, Any]:
    """Counts of one image: params, macs, fft_flops, activations, input_size [height, width]."""
    config = load_config(variant_file(name))
    height, width = to_pair(config.DATA.IMG_SIZE)
    image = (config.MODEL.IN_CHANS, height, width)
    with torch.device("meta"):
        model = build_model(config)
    try:
        root = count(model, image).modules[0]
    except (NotImplementedError, RuntimeError):
        # Shapes depend on numbers (DGE): fresh weights, whose routers choose the finest grain.
        torch.manual_seed(0)
        root = count(build_model(config), image).modules[0]
    return dict(
        params=root.params,
        macs=round(root.macs),
        fft_flops=round(root.fft_flops),
        activations=root.activations,
        input_size=[height, width],
    )


def read_counts() -> dict[str, dict[str, Any]]:
    """The stored counts, by variant."""
    return json.loads(COUNTS.read_text()) if COUNTS.exists() else {}


def write_counts(counts: dict[str, dict[str, Any]]) -> None:
    """Store the counts, one line per variant."""
    lines = [f"{json.dumps(name)}: {json.dumps(counts[name])}" for name in sorted(counts)]
    COUNTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def family(name: str) -> str:
    """The folder of a variant's YAML file."""
    return variant_file(name).parent.name


def to_markdown(counts: dict[str, dict[str, Any]]) -> str:
    """One foldable table per family, with the markers around them."""
    parts = [START, NOTE]
    names = sorted(counts, key=lambda name: (family(name), counts[name]["params"], name))
    for folder, group in groupby(names, family):
        variants = list(group)
        types = {name: load_config(variant_file(name)).MODEL.TYPE.lower() for name in variants}
        parts += [
            f"<details><summary><b>{folder}</b>: {_span(variants, counts)}</summary>",
            "",
            *dict.fromkeys(_source(kind) for kind in sorted(set(types.values()))),
            "",
            "| model | `MODEL.TYPE` | params M | GMACs | input |",
            "|---|---|---:|---:|---:|",
        ]
        for name in variants:
            entry = counts[name]
            height, width = entry["input_size"]
            gmacs = entry["macs"] / 1e9
            parts.append(
                f"| {name} | {types[name]} | {entry['params'] / 1e6:.2f} | "
                f"{gmacs:.{2 if gmacs >= 1 else 3}f} | {height}x{width} |"
            )
        parts += ["", "</details>"]
    return "\n".join([*parts, END])


def _span(names: list[str], counts: dict[str, dict[str, Any]]) -> str:
    """Number of variants and the range of their parameters."""
    params = [counts[name]["params"] / 1e6 for name in names]
    span = f"{min(params):.1f}" if len(names) == 1 else f"{min(params):.1f} to {max(params):.1f}"
    return f"{len(names)} variant{'s' * (len(names) > 1)}, {span} M parameters"


def _source(architecture: str) -> str:
    """Where an architecture is, what it is, and its papers, from its module's docstring."""
    module = inspect.getmodule(registry.find(architecture).cls)
    text = inspect.getdoc(module) or ""
    papers = dict.fromkeys(
        re.findall(r"(arXiv|doi):(\d{4}\.\d{4,5}|10\.\d{4,9}/[\w./()-]+\w)", text)
    )
    links = ", ".join(f"[{kind}:{paper}]({RESOLVERS[kind]}{paper})" for kind, paper in papers)
    path = Path(inspect.getsourcefile(module)).relative_to(ROOT)
    return f"- `{path}`: {text.splitlines()[0]} {links}".rstrip()


def speed_block() -> str:
    """The ratios of all results of benchmarks/run.py below benchmarks/results, a column for each of them."""
    paths = sorted(RESULTS.rglob("*.json"))
    races = [
        (path, result) for path in paths if "costs" in (result := json.loads(path.read_text()))
    ]
    parts = [SPEED_START]
    for compiled in (False, True):
        for mode in ("inference", "train"):
            parts += _ratios(mode, compiled, races)
    for path in sorted(RESULTS.rglob("throughput_*.md")):
        parts += [path.read_text().strip(), ""]
    return "\n".join([*parts, SPEED_END])


def _ratios(mode: str, compiled: bool, races: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Lines of one table, or none: a row for each model that has a baseline, a column for each race."""
    columns = []
    for path, result in races:
        rows = {
            (row["model"], row["baseline"]): row
            for row in result["rows"]
            if row["mode"] == mode and row["compiled"] == compiled and "ratio" in row
        }
        if rows:
            columns.append((_race_label(path, result), rows))
    if not columns:
        return []
    title = dict(inference="Inference", train="Training step")[mode]
    lines = [
        f"**{title}{', compiled' * compiled}**: the median ratio, and images/s of MixLab's.",
        "",
        f"| model | against | {' | '.join(label for label, _ in columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for pair in dict.fromkeys(pair for _, rows in columns for pair in rows):
        cells = [
            f"**{rows[pair]['ratio']:.2f}** ({rows[pair]['img_per_s']:.1f})" if pair in rows else ""
            for _, rows in columns
        ]
        lines.append(f"| {pair[0]} | {pair[1]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _race_label(path: Path, result: dict[str, Any]) -> str:
    """Where a race ran and how, linked to its full table."""
    machine, run = result["machine"], result["run"]
    load = machine.get("load_average")
    parts = [
        machine.get("gpu", machine["cpu"]),
        f"{machine['tflop_per_s']:.2f} TFLOP/s",
        f"batch {run['batch_size']}",
        *([run["dtype"]] if run["dtype"] != "float32" else []),
        *(["channels last"] if run["channels_last"] else []),
        "alone" if run["processes"] else "all in one process",
        *(["baselines compiled"] if run["compile_baseline"] else []),
        *([f"**busy: load {load[0]:.1f}**"] if load and load[0] > machine["threads"] else []),
        f"torch {machine['torch'].partition('+')[0]}",
        f"commit {(machine['commit'] or 'unknown')[:7]}",
    ]
    return f"[{', '.join(parts)}]({path.with_suffix('.md').relative_to(ROOT).as_posix()})"


def insert(text: str, block: str, start: str = START, end: str = END) -> str:
    """`text` with `block` in the place of what is between its markers; ValueError if it has none."""
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{README.name} needs one line '{start}' and, after it, one line '{end}'")
    return text[: text.index(start)] + block + text[text.index(end) + len(end) :]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="count, store, and write README.md")
    parser.add_argument(
        "--speed", action="store_true", help="write the speed tables into README.md"
    )
    parser.add_argument("names", nargs="*", help="variants to count; all of them if none is named")
    options = parser.parse_args(args)
    if options.names and not options.update:
        parser.error(f"{options.names}: names are for --update")
    counts = {name: entry for name, entry in read_counts().items() if name in list_models()}
    if options.speed:
        block = speed_block()
        README.write_text(insert(README.read_text(), block, SPEED_START, SPEED_END))
    elif options.update:
        insert(README.read_text(), "")  # minutes of counting must not end in this error
        for name in options.names or list_models():
            counts[name] = count_variant(name)
            print(f"{name}: {counts[name]}", flush=True)
        write_counts(counts)
        README.write_text(insert(README.read_text(), to_markdown(counts)))
    else:
        print(to_markdown(counts))


if __name__ == "__main__":
    main()
