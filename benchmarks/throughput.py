"""`main.py --throughput` of several models, each with and without torch.compile, as one table.

    python benchmarks/throughput.py --models dfvt_small dilateformer_tiny --batch-size 8

Every run is a process of its own, as a user's. `benchmarks/run.py` compares models; this records what the
program itself reports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import machine_folder  # noqa: E402  found through the line above
from benchmarks.run import MODELS  # noqa: E402
from models import variant_file  # noqa: E402
from utils.distributed import own_device  # noqa: E402
from utils.fingerprint import fingerprint  # noqa: E402

# The families' variants, without baselines and shares of queries.
FAMILIES = tuple(dict.fromkeys(name.partition("=")[0].partition("@")[0] for name in MODELS))


def throughput(name: str, batch_size: int, compiled: bool, opts: Sequence[str]) -> dict[str, Any]:
    """What `main.py --throughput` writes for a variant; CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as output:
        options = ["COMPILE", str(compiled), *opts]
        command = [sys.executable, str(ROOT / "main.py"), "--cfg", str(variant_file(name))]
        command += ["--throughput", "--batch-size", str(batch_size), "--output", output]
        subprocess.run([*command, "--opts", *options], check=True, stdout=subprocess.DEVNULL)
        (found,) = Path(output).rglob("throughput.json")
        speed = json.loads(found.read_text())
    return {
        key: value for key, value in speed.items() if key != "machine"
    }  # said once for all rows


def to_markdown(rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> str:
    """One line per model and compile mode."""
    device = machine.get("gpu", machine["cpu"])
    lines = [
        f"`main.py --throughput`: {device}, {machine['threads']} threads; torch {machine['torch']}; "
        f"{rows[0]['dtype']}, batch {rows[0]['batch_size']}; commit {machine['commit']}",
        "",
        "| model | compile | images/s | latency ms, p50 / p95 | passes timed, of one image | memory MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {'on' if row['compile'] else 'off'} | {row['img_per_s']:.1f} | "
            f"{row['latency_ms_p50']:.1f} / {row['latency_ms_p95']:.1f} | "
            f"{row['iterations'] * row['repeats']}, {row['latency_passes']} | {row['peak_memory_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=FAMILIES, metavar="MODEL")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("output", "benchmarks"))
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size} must be at least 1")
    try:
        device = own_device(args.device)
        for name in args.models:
            variant_file(name)
    except ValueError as error:
        parser.error(str(error))
    machine = fingerprint(device)
    folder = args.output / machine_folder(machine)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for compiled in (False, True):
            row = throughput(name, args.batch_size, compiled, ["DEVICE", args.device])
            print(f"{name}, compile {compiled}: {row['img_per_s']:.1f} images/s", flush=True)
            rows.append(row)
        # After each model, so that one that fails costs nothing but its own row.
        path = folder / f"throughput_{args.device}_{rows[0]['dtype']}"
        path.with_suffix(".json").write_text(json.dumps(dict(machine=machine, rows=rows), indent=1))
        path.with_suffix(".md").write_text(to_markdown(rows, machine))
    return rows


if __name__ == "__main__":
    main()
