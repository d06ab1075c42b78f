"""Write a model as ONNX, torch.export program and TorchScript, and check each file against PyTorch.

    python tools/export.py --cfg configs/dhvt/dhvt_tiny_cifar_patch4.yaml --resume best.pth --output exported
    python tools/export.py --cfg configs/pvt/pvt_tiny_256.yaml --format onnx --dynamic-size --output exported
    python tools/export.py --cfg configs/dfvt/dfvt_tiny.yaml --fold --output exported

The batch size stays free. The image size is that of the config, or with --dynamic-size any multiple of
the model's largest stride, two at least. Fourier mixers become real matrix products
(`layers/fourier.py`), EViT and mixers with a keep rate keep the share of tokens in force, grained queries
are all computed and weighted by their gates (`set_dense_evaluation`): the numbers are those of the model.

Every file is loaded again and run on fresh random images at other batch sizes. `export.json` says what
was written and how exact it is.
"""

import argparse
import copy
import importlib.util
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import check_is_classifier, load_config, output_dir  # noqa: E402  found through the line above
from models import Backbone  # noqa: E402
from models.folding import fold_batch_norms  # noqa: E402
from models.layers.fourier import set_fourier_way  # noqa: E402
from models.layers.grained import GrainedQueries, set_dense_evaluation  # noqa: E402
from models.layers.point_sampling import PointSampledAttention  # noqa: E402
from models.layers.tokens import to_pair  # noqa: E402
from models.layers.window import Windowed  # noqa: E402
from models.layers.window_mlp import WindowMlp  # noqa: E402
from models.mixers.plain import RandomMixing  # noqa: E402
from models.mixers.queries import KeptTokens  # noqa: E402
from modes.build import build_placed, known_classes, load_weights, source_of  # noqa: E402
from utils.arguments import add_opts  # noqa: E402

FORMATS = {"onnx": ".onnx", "export": ".pt2", "torchscript": ".torchscript.pt"}
TOLERANCE = 1e-4  # relative error of the logits
OPSET = 18
# Exporters take 0 and 1 for constants, so the example has two images; files are checked with others.
EXAMPLE_BATCH, CHECK_BATCHES = 2, (1, 3)

# Layers whose Python code plans tables and loops for one size of the map.
FIXED_SIZE_LAYERS: dict[type[nn.Module], str] = {
    Windowed: "it cuts the map into windows, whose number, padding and masks depend on the size",
    WindowMlp: "it cuts the map into windows, whose number and padding depend on the size",
    GrainedQueries: "its index tables are made per size",
    KeptTokens: "how many tokens it keeps is planned per size",
    RandomMixing: "its matrix is resized by the size in Python",
    PointSampledAttention: "its samples are scaled by the size in Python",
}


class ExportError(RuntimeError):
    """An exported file does not give the numbers of the model."""


def export_model(
    model: Backbone,
    example: Tensor,
    formats: Sequence[str],
    folder: str | Path,
    name: str = "model",
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    fold: bool = False,
) -> dict[str, Any]:
    """Write `model` in some formats, run the files, and say what came out; the model is not changed.

    Args:
        example: images (B, in_chans, H, W); B at least 2 for a free batch size. Only the shape matters.
        formats: of `FORMATS`.
        folder: made if it does not exist; gets `name` + suffix for each format, and `export.json`.
        dynamic_batch: the files take any number of images.
        dynamic_size: the files take any sides that are multiples of the model's largest stride.
        fold: batch norms become part of the convolutions before them.

    Returns:
        The content of `export.json`. Per format: `file`, `size_mib`, `relative_error` (the largest),
        `checked` (input shapes), `seconds` (writing).

    Raises:
        ValueError: unknown format, or a combination that this model cannot have.
        ImportError: ONNX is asked for and its packages are missing.
        ExportError: a file's logits differ by more than `TOLERANCE`.
    """
    _check_request(formats, example, dynamic_batch)
    step = size_step(model) if dynamic_size else None
    if step is not None:
        # At a size of its own, so that tables are resized in the graph instead of taken as they are.
        example = example.new_zeros(*example.shape[:2], *_multiples(example, step, 1, 2))
    reference = copy.deepcopy(model).eval()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = dict(
        model=name,
        torch=str(torch.__version__),
        input=list(example.shape),
        dynamic_batch=dynamic_batch,
        size_multiple_of=step,
        folded=fold,
        formats={},
    )
    # In no-grad mode: autograd functions and views of parameters would be in the graphs.
    with torch.no_grad():
        checks = _check_images(example, dynamic_batch, step)
        expected = [reference(images) for images in checks]
        prepared = prepare(fold_batch_norms(model) if fold else model)
        program, seconds = None, 0.0
        if {"onnx", "export"} & set(formats):
            start = time.perf_counter()
            program = _trace_program(prepared, example, dynamic_batch, step)
            seconds = time.perf_counter() - start
        for key in dict.fromkeys(formats):
            path = folder / f"{name}{FORMATS[key]}"
            start = time.perf_counter()
            if key == "torchscript":
                _write_torchscript(prepared, example, path)
            elif key == "export":
                torch.export.save(program, path)
            else:
                _write_onnx(program, path)
            took = time.perf_counter() - start + (seconds if key != "torchscript" else 0.0)
            error = _check_file(key, path, checks, expected)
            report["formats"][key] = dict(
                file=path.name,
                size_mib=round(path.stat().st_size / 2**20, 3),
                relative_error=error,
                checked=[list(images.shape) for images in checks],
                seconds=round(took, 2),
            )
    (folder / "export.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def prepare(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that has no complex numbers and no shape that depends on the images."""
    # A copy also has empty caches: nothing that was computed before becomes a constant of the graph.
    model = copy.deepcopy(model).eval()
    set_fourier_way(model, "matmul")
    set_dense_evaluation(model, True)
    return model


def size_step(model: Backbone) -> int:
    """What the sides of images must be multiples of in files for any size.

    Raises:
        ValueError: a layer of the model works for one size only once it is exported.
    """
    if model.drops_tokens:
        raise ValueError(
            f"--dynamic-size: {type(model).__name__} drops tokens, and how many depends on the size. "
            "Leave --dynamic-size out, and export one file per size with --opts DATA.IMG_SIZE"
        )
    for name, module in model.named_modules():
        if hasattr(module, "fourier"):
            reason = "its Fourier matrices are made per size"
        else:
            reason = next((r for t, r in FIXED_SIZE_LAYERS.items() if isinstance(module, t)), "")
        if reason:
            raise ValueError(
                f"--dynamic-size: {type(model).__name__} cannot be exported for any size, because of its "
                f"layer {name} ({type(module).__name__}): {reason}. Leave --dynamic-size out, and export "
                "one file per size with --opts DATA.IMG_SIZE"
            )
    return max(info["stride"] for info in model.feature_info)


def _check_request(formats: Sequence[str], example: Tensor, dynamic_batch: bool) -> None:
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(f"--format {unknown or 'nothing'}: choose of {list(FORMATS)}")
    if dynamic_batch and example.shape[0] < 2:
        raise ValueError(
            f"example of shape {tuple(example.shape)}: a free batch size needs at least two images, "
            "because exporters take 1 for a constant"
        )
    packages = ("onnx", "onnxscript", "onnxruntime")
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if "onnx" in formats and missing:
        raise ImportError(
            f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}, or choose of "
            f"{[key for key in FORMATS if key != 'onnx']}"
        )


def _multiples(like: Tensor, step: int, rows: int, columns: int) -> tuple[int, int]:
    """Sides of `like` in whole steps, and so many steps more; two at least."""
    height, width = (max(round(side / step), 2) for side in like.shape[2:])
    return (height + rows) * step, (width + columns) * step


def _check_images(example: Tensor, dynamic_batch: bool, step: int | None) -> list[Tensor]:
    """Random images of the shapes that a file is checked with."""
    batches = CHECK_BATCHES if dynamic_batch else example.shape[:1]
    sizes = [tuple(example.shape[2:])] * len(batches)
    if step is not None:
        # One step less and two steps less are the model's own size.
        own = (example.shape[2] - step, example.shape[3] - 2 * step)
        sizes = [own, (own[0], own[1] + step)][: len(batches)]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, example.shape[1], *size, generator=generator)
        for batch, size in zip(batches, sizes, strict=True)
    ]


def _trace_program(
    model: nn.Module, example: Tensor, dynamic_batch: bool, step: int | None
) -> torch.export.ExportedProgram:
    axes: dict[int, Any] = {}
    if dynamic_batch:
        axes[0] = torch.export.Dim("batch", min=1)
    if step is not None:
        axes[2] = step * torch.export.Dim("rows", min=2, max=4096 // step)
        axes[3] = step * torch.export.Dim("columns", min=2, max=4096 // step)
    return torch.export.export(model, (example,), dynamic_shapes=(axes,), strict=False)


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    torch.onnx.export(
        program,
        f=path,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _write_torchscript(model: nn.Module, example: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        _ignore_torchscript_deprecation()
        # Sizes that Python code reads become constants; that the file holds elsewhere is checked.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.trace(model, example, check_trace=False).save(str(path))


def _ignore_torchscript_deprecation() -> None:
    # PyTorch advises torch.export, which is the other format here; runtimes without it read this one.
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")


def _check_file(
    key: str, path: Path, checks: Sequence[Tensor], expected: Sequence[Tensor]
) -> float:
    """Largest relative error of the file over `checks`; ExportError if it is above `TOLERANCE`."""
    run, errors = _load(key, path), []
    for images, logits in zip(checks, expected, strict=True):
        try:
            result = run(images)
        except Exception as error:
            raise ExportError(f"{path} cannot run images {tuple(images.shape)}: {error}") from error
        if result.shape != logits.shape:
            raise ExportError(
                f"{path} gives {tuple(result.shape)} for images {tuple(images.shape)}, the model "
                f"{tuple(logits.shape)}"
            )
        errors.append(((result - logits).norm() / logits.norm()).item())
        if not errors[-1] <= TOLERANCE:  # also for NaN
            raise ExportError(
                f"{path} differs from the model by {errors[-1]:.1e} (relative, allowed {TOLERANCE}) "
                f"on images {tuple(images.shape)}"
            )
    return max(errors)


def _load(key: str, path: Path) -> Callable[[Tensor], Tensor]:
    """What runs the file: images -> logits."""
    if key == "export":
        return torch.export.load(path).module()
    if key == "torchscript":
        with warnings.catch_warnings():
            _ignore_torchscript_deprecation()
            return torch.jit.load(str(path))
    import onnxruntime  # here, because only this format needs it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def table(report: dict[str, Any]) -> str:
    """The formats of a report, one per line."""
    lines = [f"{'format':12} {'MiB':>9} {'rel. error':>11} {'seconds':>8}  file"]
    lines += [
        f"{key:12} {entry['size_mib']:9.2f} {entry['relative_error']:11.1e} {entry['seconds']:8.1f}"
        f"  {entry['file']}"
        for key, entry in report["formats"].items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the experiment's YAML file")
    parser.add_argument("--resume", metavar="FILE", help="weights; without them they are fresh")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--output", metavar="DIR", help="folder; by default that of the experiment")
    parser.add_argument("--dynamic-size", action="store_true", help="leave the image size open")
    parser.add_argument("--fold", action="store_true", help="fold batch norms into convolutions")
    add_opts(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    for package in ("modes", "models"):  # alone: the ONNX exporter logs every node
        logging.getLogger(package).setLevel(logging.INFO)
    flags = {"MODEL.RESUME": args.resume} if args.resume else {}
    try:
        config = load_config(args.cfg, args.opts, flags)
        check_is_classifier(config, "files give the logits of an image")
        model = build_placed(config, known_classes(config), torch.device("cpu"))
        source = source_of(config, "throughput", output_dir(config) / "checkpoints" / "last.pth")
        if source.kind != "scratch":
            load_weights(config, model, source)
        size = to_pair(config.DATA.IMG_SIZE)
        example = torch.zeros(EXAMPLE_BATCH, config.MODEL.IN_CHANS, *size)
        report = export_model(
            model,
            example,
            args.format,
            args.output or output_dir(config) / "export",
            config.MODEL.NAME,
            dynamic_size=args.dynamic_size,
            fold=args.fold,
        )
    except (ValueError, ImportError, FileNotFoundError, ExportError) as error:
        parser.error(str(error))
    print(table(report))


if __name__ == "__main__":
    main()
