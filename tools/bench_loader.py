"""Where the time of a loader goes, how many workers it needs, and how it compares with the usual one.

python tools/bench_loader.py --cfg configs/dhvt/dhvt_small_imagenet_patch16.yaml --data-path /data/imagenet
python tools/bench_loader.py --cfg ... --opts DATA.DECODER simplejpeg --target 1800   # images/s of the model
python tools/bench_loader.py --cfg ... --compare --rounds 9 --output benchmarks/results/loader/mine

Three measurements, none of which needs a model:
- stages: milliseconds per image of reading, decoding, augmenting, collating (what a worker does), and of
  copying to the device with normalisation and erasing (what the training process does), one after another;
- workers: images/s of the loader with 0, 1, 2, ... of them, and the fewest that reach 95 % of the best, or
  --target;
- --compare: every decoder against PIL with torchvision's v1 transforms in float (RandomResizedCrop, flip,
  ToTensor, Normalize) and PyTorch's own loader. All live in this process and take turns; the ratio is the
  median over the rounds of neighbouring turns. Sides have the same images, sizes, filter and worker
  count, and only the crop and the flip, as the usual pipeline has no more.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import check_is_classifier, load_config
from data import build_loader
from data.decoders import DECODERS
from data.loader import Loader, Samples, collate, preserved_rng
from data.registry import ImageDataset, decode_image
from data.samplers import Key
from data.transforms import channel_stats, to_image
from models.layers.tokens import to_pair
from utils.arguments import add_opts
from utils.distributed import own_device
from utils.files import check_output
from utils.fingerprint import fingerprint, load_average

WORKER_STAGES = ("read", "decode", "augment", "collate")
STAGES = (*WORKER_STAGES, "copy")
ENOUGH = 0.95  # of the best rate: more workers than that are waste
# What the usual pipeline does not do either.
PLAIN = ["AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", "0", "AUG.REPROB", "0", "AUG.VFLIP", "0"]
BASELINE = "torchvision v1, float"


class UsualSamples(Dataset):
    """What most training scripts load: decoded by PIL, augmented and normalised in float32 by the worker."""

    def __init__(self, dataset: ImageDataset, transform: Callable, in_chans: int) -> None:
        self.dataset, self.transform, self.in_chans = dataset, transform, in_chans

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        content, label = self.dataset.read(index)
        image = decode_image(content) if isinstance(content, bytes) else content
        return self.transform(to_image(image, self.in_chans)), label


class Indices:
    """The batches of one of our samplers, as other datasets want them."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        return ([key.index for key in batch] for batch in self.sampler)


def usual_loader(config: Any, ours: Loader) -> DataLoader:
    """PyTorch's loader with torchvision's v1 transforms in float, of the images of `ours`."""
    data, aug, in_chans = config.DATA, config.AUG, config.MODEL.IN_CHANS
    mode = transforms.InterpolationMode(
        "bicubic" if data.INTERPOLATION == "random" else data.INTERPOLATION
    )
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                to_pair(data.IMG_SIZE), tuple(aug.SCALE), tuple(aug.RATIO), interpolation=mode
            ),
            transforms.RandomHorizontalFlip(aug.HFLIP),
            transforms.ToTensor(),
            transforms.Normalize(*channel_stats(data.MEAN, data.STD, in_chans)),
        ]
    )
    return DataLoader(
        UsualSamples(ours.dataset.dataset, transform, in_chans),
        batch_sampler=Indices(ours.batch_sampler),
        num_workers=ours.num_workers,
        persistent_workers=ours.num_workers > 0,
        pin_memory=ours.pin_memory,
    )


def time_stages(loader: Loader, num_batches: int, rounds: int = 3) -> dict[str, float]:
    """Milliseconds per image of each stage, in this process: the median over rounds of fresh batches."""
    samples: Samples = loader.dataset
    batches = list(itertools.islice(endless(loader), rounds * num_batches))
    times = {stage: [] for stage in STAGES}
    for start in range(0, len(batches), num_batches):
        group = batches[start : start + num_batches]
        spent = dict.fromkeys(STAGES, 0.0)
        for keys in group:
            for stage, seconds in time_batch(loader, samples, keys).items():
                spent[stage] += seconds
        images = sum(map(len, group))
        for stage, seconds in spent.items():
            times[stage].append(1000 * seconds / images)
    return {stage: statistics.median(values) for stage, values in times.items()}


def endless(loader: Loader) -> Iterator[list[Key]]:
    """Keys of batches, epoch after epoch; none waits in a worker."""
    for epoch in itertools.count():
        if hasattr(loader.batch_sampler, "set_position"):
            loader.set_position(epoch)
        yield from loader.batch_sampler


def time_batch(loader: Loader, samples: Samples, keys: list[Key]) -> dict[str, float]:
    """Seconds of each stage of one batch."""
    dataset, marks = samples.dataset, [time.perf_counter()]

    def mark(result: Any) -> Any:
        marks.append(time.perf_counter())
        return result

    stored = mark([dataset.read(key.index) for key in keys])
    decoded = mark(
        [(dataset.decode(c) if isinstance(c, bytes) else c, label) for c, label in stored]
    )
    with preserved_rng():
        augmented = [
            samples.augment(samples.convert(image, samples.in_chans), label, key)
            for (image, label), key in zip(decoded, keys, strict=True)
        ]
    mark(None)
    batch = mark(collate(augmented, len(augmented)))
    mark(loader.finished(batch))
    if loader.device is not None and loader.device.type != "cpu":
        torch.accelerator.synchronize(loader.device)
        marks[-1] = time.perf_counter()
    return {stage: b - a for stage, (a, b) in zip(STAGES, itertools.pairwise(marks), strict=True)}


def rate(loader: Any, device: torch.device) -> float:
    """Images/s of an epoch on `device`, from the first batch on: filling the queue is not counted."""
    images, start = 0, 0.0
    for batch, _ in loader:
        batch = batch.to(device, non_blocking=True)
        if start:
            images += len(batch)
        else:
            start = time.perf_counter()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    if not images:
        raise ValueError(
            "an epoch has a single batch here, and speed is measured from the second one on: lower "
            "DATA.BATCH_SIZE"
        )
    return images / (time.perf_counter() - start)


def time_workers(
    config: Any, split: str, counts: Sequence[int], device: torch.device
) -> dict[int, float]:
    """Images/s for each number of workers."""
    rates = {}
    for count in counts:
        loader = build(config, split, device, count)
        rate(loader, device)  # starts the workers and fills the disk cache
        rates[count] = rate(loader, device)
    return rates


def recommend(rates: dict[int, float], target: float | None) -> int:
    """The fewest workers whose rate is enough."""
    best = max(rates.values())
    wanted = min(target or math.inf, ENOUGH * best)
    return min(count for count, images_per_s in rates.items() if images_per_s >= wanted)


def compare(
    configs: dict[str, Any], split: str, device: torch.device, workers: int, rounds: int
) -> dict[str, Any]:
    """Images/s of each of `configs` and of the usual loader, in turns, and the ratios to the usual one."""
    loaders: dict[str, Any] = {
        name: build(config, split, device, workers) for name, config in configs.items()
    }
    first = next(iter(loaders))
    loaders[BASELINE] = usual_loader(configs[first], loaders[first])
    for loader in loaders.values():
        rate(loader, device)
    turns: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds):
        names = list(loaders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turns[name].append(rate(loaders[name], device))
    result = {}
    for name, rates in turns.items():
        ratios = [mine / usual for mine, usual in zip(rates, turns[BASELINE], strict=True)]
        result[name] = dict(
            img_per_s=statistics.median(rates),
            img_per_s_range=[min(rates), max(rates)],
            ratio=statistics.median(ratios),
            ratio_range=[min(ratios), max(ratios)],
        )
    return result


def build(config: Any, split: str, device: torch.device, workers: int) -> Loader:
    """The config's loader with another number of workers."""
    own = config.clone()
    own.defrost()
    own.DATA.NUM_WORKERS = workers
    return build_loader(own, split, device=device)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg", required=True, help="YAML file of the experiment")
    parser.add_argument("--data-path", help="DATA.DATA_PATH")
    add_opts(parser)
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--batches", type=int, default=4, help="batches per round of the stages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, nargs="+", help="counts to try (default: up to the CPUs)"
    )
    parser.add_argument("--target", type=float, help="images/s that are wanted, say the model's")
    parser.add_argument("--compare", action="store_true", help="race against the usual pipeline")
    parser.add_argument(
        "--compare-workers", type=int, default=1, help="workers of each in the race"
    )
    parser.add_argument("--output", help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(argv)
    for name in ("batches", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if min(args.workers or [0]) < 0 or args.compare_workers < 0:
        parser.error("numbers of workers must be at least 0")
    if args.compare and args.split != "train":
        parser.error("--compare is about training: leave --split val out")
    return parser, args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command line asks for, as plain data."""
    opts = [*args.opts, *(["DATA.DATA_PATH", args.data_path] if args.data_path else [])]
    config = load_config(args.cfg, opts)
    check_is_classifier(config, "the stages that are timed are those of its images")
    if config.DATA.ON_DEVICE:
        raise ValueError("DATA.ON_DEVICE=True: there is no loader whose stages could be timed")
    device = own_device(config.DEVICE)
    machine = fingerprint(device)
    stages = time_stages(build(config, args.split, device, 0), args.batches, args.rounds)
    cpus = machine["cores"]
    counts = args.workers or sorted({0, 1, *(2**i for i in range(1, cpus.bit_length())), cpus})
    rates = time_workers(config, args.split, counts, device)
    result = dict(
        command=" ".join(["python", "tools/bench_loader.py", *(args.command or [])]),
        cfg=args.cfg,
        split=args.split,
        decoder=config.DATA.DECODER,
        batch_size=config.DATA.BATCH_SIZE,
        ms_per_image=stages,
        limited_by=limit(stages),
        img_per_s_by_workers=rates,
        recommended_workers=recommend(rates, args.target),
        target_img_per_s=args.target,
    )
    if args.compare:
        configs = {
            name: load_config(args.cfg, [*opts, *PLAIN, "DATA.DECODER", name]) for name in DECODERS
        }
        result["compare"] = compare(configs, args.split, device, args.compare_workers, args.rounds)
        result["compare_workers"] = args.compare_workers
    return result | dict(machine=machine, load_average_after=load_average())


def _load(average: Sequence[float] | None) -> str:
    return "unknown" if average is None else f"{average[0]:.1f}"


def limit(stages: dict[str, float]) -> str:
    """The slowest stage of those that a worker does one after another."""
    return max(WORKER_STAGES, key=lambda stage: stages[stage])


def to_markdown(result: dict[str, Any]) -> str:
    """Tables of a result."""
    stages = result["ms_per_image"]
    worker = sum(stages[stage] for stage in WORKER_STAGES)
    lines = [
        f"`{result['command']}`",
        "",
        f"{result['split']}, decoder {result['decoder']}, batch {result['batch_size']}, "
        f"{result['machine']['cpu']}, {result['machine']['cores']} CPUs, load "
        f"{_load(result['machine']['load_average'])} before and {_load(result['load_average_after'])} after",
        "",
        "| stage | ms/image | images/s | share of a worker |",
        "|---|---|---|---|",
    ]
    for stage, ms in stages.items():
        share = f"{100 * ms / worker:.0f} %" if stage in WORKER_STAGES else "main process"
        lines.append(f"| {stage} | {ms:.3f} | {1000 / ms:.0f} | {share} |")
    limited = result["limited_by"]
    lines += [
        "",
        f"A worker makes {1000 / worker:.0f} images/s, and {limited} takes most of its time; the main "
        f"process finishes {1000 / stages['copy']:.0f} images/s.",
        "",
        "| workers | images/s |",
        "|---|---|",
        *(f"| {count} | {rate:.0f} |" for count, rate in result["img_per_s_by_workers"].items()),
        "",
        f"DATA.NUM_WORKERS {result['recommended_workers']} is enough here, per process.",
    ]
    target, best = result["target_img_per_s"], max(result["img_per_s_by_workers"].values())
    if target and best < target:
        lines.append(f"No number of workers reaches {target:.0f} images/s: speed up {limited}.")
    if "compare" in result:
        lines += [
            "",
            f"| pipeline, {result['compare_workers']} worker(s) | images/s | ratio (range) |",
            "|---|---|---|",
        ]
        for name, row in result["compare"].items():
            low, high = row["ratio_range"]
            lines.append(
                f"| {name} | {row['img_per_s']:.0f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line -> tables on standard output, and files."""
    parser, args = parse_args(argv)
    args.command = sys.argv[1:] if argv is None else list(argv)
    try:
        if args.output:
            check_output(Path(args.output).with_suffix(".json"), "--output")
        result = measure(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(to_markdown(result))
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(to_markdown(result))
    return result


if __name__ == "__main__":
    main()
