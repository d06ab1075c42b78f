"""Average, strip, convert, inspect and compare checkpoints: ours, those of the lineage, and safetensors.

    python tools/checkpoints.py average epoch_297.pth epoch_298.pth epoch_299.pth --output averaged.pth
    python tools/checkpoints.py strip best.pth --output dhvt_tiny.pth --ema --half --hash
    python tools/checkpoints.py convert best.pth best.safetensors
    python tools/checkpoints.py inspect best.pth --keys
    python tools/checkpoints.py diff a.pth b.pth

Nothing in a file is ever run: files load as in `utils/checkpoint_files.py`. What is written loads with
--pretrained, and with --resume for --eval. `--ema` takes the averaged weights of a file that has both kinds.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.pretrained import (  # noqa: E402  found through the line above
    find_weights,
    has_averaged_weights,
    has_both_weights,
    strip_prefixes,
)
from utils.checkpoint_files import load_file, save_checkpoint, save_safetensors  # noqa: E402

SUFFIXES = (".pth", ".pt", ".safetensors")
SHOWN = 8  # names in an error message


def read_weights(path: str | Path, ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a file by name, and the facts that belong to them: config (YAML text) and classes.

    Raises:
        ValueError: there is no such file, it is unsafe or damaged, or it has no (averaged) weights.
    """
    content = load_file(path)
    if ema and not has_averaged_weights(content):
        raise ValueError(f"{path} has no averaged weights: leave --ema out")
    weights, _ = find_weights(content, ema, str(path))
    classes = content.get("classes")
    facts = dict(
        config=config_text(content),
        classes=[str(name) for name in classes] if isinstance(classes, list | tuple) else [],
    )
    return weights, facts


def config_text(content: Mapping[str, Any]) -> str:
    """The configuration in a checkpoint as YAML text: ours, Swin's config, DeiT's args; empty if none."""
    config = content.get("config", content.get("args"))
    if isinstance(config, str):
        return config
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    if not isinstance(config, Mapping):
        return ""
    # Through JSON, which leaves plain dicts and lists; what it does not know (paths) becomes text, and keys
    # of other kinds are left out.
    plain = json.loads(json.dumps(config, default=str, skipkeys=True))
    return yaml.safe_dump(plain, sort_keys=False)


def write_weights(
    path: str | Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write a file of weights and facts, in the format of its suffix.

    Raises:
        ValueError: unknown suffix.
    """
    path = _output(path)
    if path.suffix == ".safetensors":
        save_safetensors(path, weights, facts)
    else:
        # Clones: a view would bring all of its storage along. One per storage: shared names share.
        clones: dict[tuple[Any, ...], Tensor] = {}
        own = {}
        for name, tensor in weights.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            key = place if tensor.numel() else (name,)
            if key not in clones:
                clones[key] = tensor.detach().clone()
            own[name] = clones[key]
        save_checkpoint(path, {"model": own, **facts})


def average(
    paths: Sequence[str | Path], ema: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Mean of the weights of several files; whole numbers and everything else are the last file's.

    Raises:
        ValueError: fewer than two files, or their names, shapes or kinds of numbers differ; names them.
    """
    if len(paths) < 2:
        raise ValueError(f"an average needs two files at least, got {len(paths)}")
    sums: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    # One file at a time: a hundred of them would not fit into memory.
    for path in paths:
        weights, facts = read_weights(path, ema)
        first = first or weights
        _check_same(first, weights, paths[0], path)
        for name, tensor in weights.items():
            if _is_averaged(tensor):
                wide = torch.complex128 if tensor.is_complex() else torch.float64
                sums[name] = sums.get(name, 0) + tensor.to(wide)
    mean = {
        name: (sums[name] / len(paths)).to(tensor.dtype) if name in sums else tensor
        for name, tensor in weights.items()
    }
    return mean, facts


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with half-precision numbers in place of wider ones.

    Raises:
        ValueError: a number is too large for it.
    """
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    lost = [
        name
        for name, tensor in half.items()
        if tensor.is_floating_point() and not (tensor.isfinite() == weights[name].isfinite()).all()
    ]
    if lost:
        raise ValueError(f"--half: beyond 65504, the largest half-precision number: {_short(lost)}")
    return half


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, as plain data: kind, containers, weights, and what is known of the run."""
    path = Path(path)
    content = load_file(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    report: dict[str, Any] = dict(
        file=str(path),
        size_mib=round(path.stat().st_size / 2**20, 3),
        kind=_kind(path, content),
        entries={
            str(key): _describe(value) for key, value in content.items() if not _is_tensor(value)
        },
    )
    for key, ema in (("weights", False), ("averaged_weights", True)):
        if ema and not has_averaged_weights(content):
            continue
        try:
            weights, where = find_weights(content, ema, str(path))
        except ValueError:
            continue
        report[key] = dict(
            where=where.strip(),
            tensors=len(weights),
            numbers=sum(tensor.numel() for tensor in weights.values()),
            dtypes=dict(Counter(_dtype(tensor) for tensor in weights.values())),
            keys={name: [list(tensor.shape), _dtype(tensor)] for name, tensor in weights.items()},
        )
    progress = content.get("progress")
    known = dict(
        epoch=progress.get("epoch") if isinstance(progress, Mapping) else content.get("epoch"),
        step=progress.get("step") if isinstance(progress, Mapping) else None,
        metrics=content.get("metrics"),
        best=content.get("best"),
        max_accuracy=content.get("max_accuracy"),
        arch=content.get("arch"),
        classes=len(content.get("classes") or ()) or None,
        git=content.get("git"),
        versions=content.get("versions"),
        config=config_text(content) or None,
    )
    return report | {key: value for key, value in known.items() if value not in (None, {}, [])}


def compare(
    first: str | Path, second: str | Path, ema: bool = False
) -> tuple[list[str], list[str], list[tuple[str, str]], list[tuple[str, float]]]:
    """How the weights of two files differ; prefixes of wrappers (`module.`) are not compared.

    Returns:
        names that only the first and only the second file has; (name, shapes or dtypes) of tensors that
        cannot be compared; (name, largest absolute difference) of all others, largest first.
    """
    a, b = read_weights(first, ema)[0], read_weights(second, ema)[0]
    a = strip_prefixes(a, b, str(first))
    b = strip_prefixes(b, a, str(second))
    unlike, gaps = [], []
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape != b[name].shape:
            unlike.append((name, f"{list(a[name].shape)} and {list(b[name].shape)}"))
        else:
            if a[name].dtype != b[name].dtype:
                unlike.append((name, f"{_dtype(a[name])} and {_dtype(b[name])}"))
            gaps.append((name, _largest_gap(a[name], b[name])))
    gaps.sort(key=lambda entry: -entry[1])
    return sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys()), unlike, gaps


# -- details -------------------------------------------------------------------------------------


def _output(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {list(SUFFIXES)}: the suffix is the format")
    return path


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_same(
    first: Mapping[str, Tensor], other: Mapping[str, Tensor], path: str | Path, where: str | Path
) -> None:
    if first.keys() != other.keys():
        missing, extra = sorted(first.keys() - other.keys()), sorted(other.keys() - first.keys())
        raise ValueError(
            f"{where} has other tensors than {path}: it lacks {_short(missing)}, and has {_short(extra)}"
        )
    unlike = [
        f"{name} ({_dtype(other[name])} {list(other[name].shape)} instead of {_dtype(tensor)} "
        f"{list(tensor.shape)})"
        for name, tensor in first.items()
        if (tensor.shape, tensor.dtype) != (other[name].shape, other[name].dtype)
    ]
    if unlike:
        raise ValueError(f"{where} does not fit {path}: {_short(unlike)}")


def _short(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more


def _largest_gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where one of two numbers is not finite and the other differs."""
    if torch.equal(a, b) or a.numel() == 0:
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = (a - b).abs().masked_fill(same, 0.0)
    return gap.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def _kind(path: Path, content: Mapping[str, Any]) -> str:
    if "format" in content and "progress" in content:
        return f"MixLab, training checkpoint of format {content['format']}"
    if {"model", "config", "classes"} == content.keys():
        return "MixLab, weights for release"
    if path.suffix == ".safetensors":
        return "safetensors"
    if "state_dict" in content and ("arch" in content or "version" in content):
        return "timm"
    if "max_accuracy" in content or ("lr_scheduler" in content and "config" in content):
        return "Swin"
    if isinstance(content.get("args"), argparse.Namespace):
        return "DeiT family"
    if any(_is_tensor(value) for value in content.values()):
        return "state dict"
    return "dict"


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    if isinstance(value, list | tuple):
        return f"list of {len(value)}"
    text = str(value)
    return f"{type(value).__name__} of {len(text)} characters" if len(text) > 40 else text


# -- command line --------------------------------------------------------------------------------


def _check_output(options: argparse.Namespace, *files: str) -> None:
    """ValueError if a file would be written over, or is given twice."""
    places = [Path(file).resolve() for file in files]
    if Path(options.output).resolve() in places:
        raise ValueError(
            f"{options.output} would be written over, and what else it holds be lost: name another file"
        )
    twice = [file for file, place in zip(files, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given more than once")


def _mention_averages(options: argparse.Namespace, *files: str) -> None:
    """Say that plain weights were taken where there are averaged ones too."""
    for file in () if options.ema else files:
        if has_both_weights(load_file(file, mapped=True)):
            print(f"{file} has averaged weights too, which --ema takes")


def _average(options: argparse.Namespace) -> None:
    _check_output(options, *options.files)
    weights, facts = average(options.files, options.ema)
    _mention_averages(options, options.files[-1])
    write_weights(options.output, weights, facts)
    print(f"{options.output}: mean of {len(options.files)} files, {len(weights)} tensors")


def _strip(options: argparse.Namespace) -> None:
    _check_output(options, options.file)
    weights, facts = read_weights(options.file, options.ema)
    _mention_averages(options, options.file)
    path = _output(options.output)
    write_weights(path, halved(weights) if options.half else weights, facts)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if options.hash:
        # torch.hub checks the file that it downloads against these digits of its name.
        path = path.rename(path.with_name(f"{path.stem}-{digest[:8]}{path.suffix}"))
    print(f"{path}: {len(weights)} tensors, {path.stat().st_size / 2**20:.2f} MiB\nsha256 {digest}")


def _convert(options: argparse.Namespace) -> None:
    _check_output(options, options.file)
    weights, facts = read_weights(options.file, options.ema)
    _mention_averages(options, options.file)
    write_weights(options.output, weights, facts)
    content = map(str, load_file(options.file, mapped=True))
    left = sorted({*content} - {*weights, "model", "state_dict", *facts})
    print(f"{options.output}: {len(weights)} tensors; left out: {_short(left)}")


def _inspect(options: argparse.Namespace) -> None:
    reports = [inspect(path) for path in options.files]
    for report in reports:
        if not options.keys:
            for kind in ("weights", "averaged_weights"):
                report.get(kind, {}).pop("keys", None)
    if options.json:
        print(json.dumps(reports, indent=2, default=str))
        return
    for report in reports:
        print(f"{report.pop('file')}: {report.pop('kind')}, {report.pop('size_mib')} MiB")
        for kind in ("weights", "averaged_weights"):
            found = report.pop(kind, None)
            if found is None:
                continue
            dtypes = ", ".join(f"{count} {name}" for name, count in found["dtypes"].items())
            print(
                f"  {kind.replace('_', ' ')} {found['where']}: {found['tensors']} tensors ({dtypes}), "
                f"{found['numbers'] / 1e6:.3f} M numbers"
            )
            for name, (shape, dtype) in found.get("keys", {}).items():
                print(f"    {name} {shape} {dtype}")
        entries = ", ".join(f"{key} ({value})" for key, value in report.pop("entries").items())
        print(f"  entries: {entries or 'tensors only'}")
        text = report.pop("config", "")
        for key, value in report.items():
            print(f"  {key}: {value}")
        if text and options.config:
            print("  config:\n    " + text.rstrip().replace("\n", "\n    "))
        elif text:
            print(f"  config: {len(text.splitlines())} lines, shown by --config")


def _diff(options: argparse.Namespace) -> int:
    only_a, only_b, unlike, gaps = compare(options.first, options.second, options.ema)
    for path, names in ((options.first, only_a), (options.second, only_b)):
        for name in names:
            print(f"only in {path}: {name}")
    for name, what in unlike:
        print(f"{name}: {what}")
    far = [(name, gap) for name, gap in gaps if gap > options.tolerance]
    for name, gap in far[: options.top or None]:
        print(f"{gap:.3e}  {name}")
    if options.top and len(far) > options.top:
        print(f"and {len(far) - options.top} more")
    print(f"{len(gaps) - len(far)} tensors agree within {options.tolerance:g}, {len(far)} do not")
    _mention_averages(options, options.first, options.second)
    return int(bool(only_a or only_b or unlike or far))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="checkpoints.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        found.set_defaults(run=run)
        if name != "inspect":
            found.add_argument("--ema", action="store_true", help="take the averaged weights")
        return found

    add = command("average", _average, "the mean of several files").add_argument
    add("files", nargs="+")
    add("--output", required=True)
    add = command("strip", _strip, "weights, class names and config only, for release").add_argument
    add("file")
    add("--output", required=True)
    add("--half", action="store_true", help="half-precision numbers")
    add("--hash", action="store_true", help="add the first digits of the SHA-256 to the name")
    add = command("convert", _convert, "to the format of the output's suffix").add_argument
    add("file")
    add("output", help=f"ends in one of {', '.join(SUFFIXES)}")
    add = command("inspect", _inspect, "what files hold").add_argument
    add("files", nargs="+")
    add("--keys", action="store_true", help="list every tensor")
    add("--config", action="store_true", help="print the configuration")
    add("--json", action="store_true", help="print everything as JSON")
    add = command("diff", _diff, "how two files differ; status 1 if they do").add_argument
    add("first")
    add("second")
    add("--tolerance", type=float, default=0.0, help="largest difference that counts as none")
    add("--top", type=int, default=20, help="tensors that are shown; 0 shows all")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Command line -> exit status: 0, for `diff` 1 where files differ, 2 at a mistake."""
    parser = _parser()
    options = parser.parse_args(args)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
