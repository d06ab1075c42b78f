"""One program for every experiment: train, evaluate (--eval), time (--throughput), count (--info).

python main.py --cfg configs/demo.yaml
torchrun --nproc_per_node 8 main.py --cfg configs/dfvt/dfvt_tiny.yaml --data-path /data/imagenet
"""

import datetime
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from config import dump, load_config, output_dir
from data import (
    Data,
    build_data,
    build_loader,
    check_data,
    dataset_num_classes,
    published_num_classes,
)
from engine import evaluate, measure_throughput, train_epoch
from logger import MetricsWriter, create_logger
from lr_scheduler import build_scheduler
from models import Backbone, build_model
from models.folding import fold_batch_norms
from models.layers.tokens import to_pair
from models.pretrained import has_averaged_weights, load_pretrained
from optimizer import build_optimizer
from tasks import build_task
from utils.amp import Amp
from utils.arguments import parse_args
from utils.checkpoint import Checkpointer, Source, choose_source, fetch, load_file
from utils.complexity import Complexity, count
from utils.distributed import Runtime, all_reduce_sum, cleanup, init_distributed
from utils.ema import ModelEma
from utils.plotting import plot_training
from utils.seeding import seed_everything, set_deterministic
from utils.wrappers import compiled

_LOG = logging.getLogger("mixlab.main")


# -- what a run is made of -----------------------------------------------------------------------


def set_up(config: CfgNode, runtime: Runtime) -> Amp:
    """Logger, seeds and numerics of this process, before anything is built."""
    create_logger(output_dir(config), runtime.rank, config.MODEL.NAME)
    seed_everything(config.SEED)  # the same on all processes, for the same initial weights
    set_deterministic(config.DETERMINISTIC)
    return Amp(runtime.device, config.AMP_DTYPE, config.AMP_ENABLE, config.AMP_OPT_LEVEL)


def build_placed(config: CfgNode, num_classes: int | None, device: torch.device) -> Backbone:
    """The model on its device, in its memory layout; None classes keeps the config's number."""
    overrides = {} if num_classes is None else dict(num_classes=num_classes)
    layout = torch.channels_last if config.CHANNELS_LAST else torch.preserve_format
    return build_model(config, **overrides).to(device, memory_format=layout)


def wrap(config: CfgNode, model: nn.Module, runtime: Runtime) -> nn.Module:
    """The model as the training loop calls it: gradients averaged over processes, compiled."""
    if runtime.world_size > 1:
        devices = [runtime.device.index] if runtime.device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    return compiled(config, model)


def synchronise_batch_norm(config: CfgNode, model: Backbone, runtime: Runtime) -> Backbone:
    """The model with batch statistics over all processes, if TRAIN.SYNC_BN asks for it."""
    if not config.TRAIN.SYNC_BN or runtime.world_size == 1:
        return model
    if runtime.device.type != "cuda":
        _LOG.warning("TRAIN.SYNC_BN is left out: PyTorch synchronises batch norm on GPUs only")
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def hyper_parameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the config says of each parameter group, the learning rate aside (the schedule's)."""
    names = ("weight_decay", "betas", "eps", "momentum")
    return [{k: group[k] for k in names if k in group} for group in optimizer.param_groups]


def load_weights(config: CfgNode, model: nn.Module, source: Source) -> None:
    """Weights of a file of ours or an official one; only a fresh run may replace the classifier."""
    content = load_file(fetch(source.path))
    fresh = source.kind == "pretrained"
    averaged = config.MODEL.PRETRAINED_EMA or (config.TRAIN.EMA.ENABLE and not fresh)
    if averaged and not has_averaged_weights(content):
        _LOG.warning("%s has no averaged weights: taking the plain ones", source.path)
        averaged = False
    load_pretrained(
        model,
        content,
        name=source.path,
        allow_partial=config.MODEL.PRETRAINED_PARTIAL,
        use_ema=averaged,
        new_head=fresh,
    )


def find_source(config: CfgNode, mode: str, last: Path) -> Source:
    """Where weights come from; ValueError if they are not there."""
    return choose_source(
        mode,
        last,
        resume=config.MODEL.RESUME,
        pretrained=config.MODEL.PRETRAINED,
        auto_resume=config.TRAIN.AUTO_RESUME,
    )


def source_of(config: CfgNode, mode: str, last: Path) -> Source:
    """Where weights come from, said in one log line."""
    source = find_source(config, mode, last)
    _LOG.info("weights: %s", source.reason)
    return source


def write_json(path: Path, content: dict[str, Any], runtime: Runtime) -> None:
    """One result file of a run, written by the first process."""
    if runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


# -- modes ---------------------------------------------------------------------------------------


class TrainingRun:
    """Everything that one training run is made of, built from the config; `run` trains it to the end."""

    def __init__(self, config: CfgNode, runtime: Runtime) -> None:
        self.config, self.runtime, self.folder = config, runtime, output_dir(config)
        self.amp = set_up(config, runtime)
        self.data = build_data(config, rank=runtime.rank, world_size=runtime.world_size)
        self.task = build_task(config, self.data.num_classes)
        model = build_placed(config, self.data.num_classes, runtime.device)
        self.source = source_of(config, "train", self.folder / "checkpoints" / "last.pth")
        if self.source.kind == "pretrained":
            load_weights(config, model, self.source)
        # Until here all processes drew the same numbers, so that averages start from the same weights.
        seed_everything(config.SEED, runtime.rank)
        model = synchronise_batch_norm(config, model, runtime)
        model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
        optimizer = build_optimizer(config, model, runtime.world_size)
        self.model, self.optimizer = self.amp.prepare(model, optimizer)
        average = config.TRAIN.EMA
        self.ema = ModelEma(model, average.DECAY, average.WARMUP) if average.ENABLE else None
        self.scored = self.model if self.ema is None else self.ema.module
        self.window = max(config.TRAIN.ACCUMULATION_STEPS, 1)
        self.schedule = build_scheduler(
            config, self.optimizer, math.ceil(len(self.data.train) / self.window)
        )
        self.epochs = math.ceil(self.schedule.total_steps / self.schedule.steps_per_epoch)
        self.checkpointer = Checkpointer(
            self.folder / "checkpoints",
            dict(
                model=self.model,
                ema=self.ema,
                optimizer=self.optimizer,
                scheduler=self.schedule,
                scaler=self.amp,
            ),
            metric=self.task.metric,
            keep=config.SAVE_KEEP,
            config_text=dump(config),
            classes=self.data.classes,
        )

    def run(self) -> None:
        """Train from where the weights' source left off, scoring and saving as the config says."""
        start = time.time()
        epoch, batch = self.config.TRAIN.START_EPOCH, 0
        if self.source.kind == "resume":
            epoch, batch = self.resume()
        elif self.source.kind == "pretrained":
            _LOG.info("before training: %s", self.task.describe(self.score()))
        step = epoch * self.schedule.steps_per_epoch + math.ceil(batch / self.window)
        if self.runtime.is_main:
            (self.folder / "config.yaml").write_text(dump(self.config))
        if epoch >= self.epochs:
            _LOG.info("nothing left to train: %d of %d epochs are done", epoch, self.epochs)
        trained = wrap(self.config, self.model, self.runtime)
        with MetricsWriter(self.folder, self.runtime.rank, resume_step=step) as writer:
            for number in range(epoch, self.epochs):
                step = self.run_epoch(trained, writer, number, batch, step)
                batch = 0
        seconds = time.time() - start
        _LOG.info("Training time %s", _duration(seconds))
        self.summarise(seconds)

    def run_epoch(
        self, trained: nn.Module, writer: MetricsWriter, epoch: int, first_batch: int, step: int
    ) -> int:
        """Train the rest of an epoch, score it, save it -> number of the next step."""
        config, start = self.config, time.time()
        self.data.train.set_position(epoch, first_batch)
        result = train_epoch(
            trained,
            self.task,
            self.data.train,
            self.optimizer,
            self.schedule,
            device=self.runtime.device,
            amp=self.amp,
            num_batches=len(self.data.train),
            epoch=epoch,
            epochs=self.epochs,
            step=step,
            first_batch=first_batch,
            accumulation_steps=self.window,
            clip_grad=config.TRAIN.CLIP_GRAD,
            ema=self.ema,
            channels_last=config.CHANNELS_LAST,
            log_every=config.PRINT_FREQ,
            on_log=lambda record: writer.write("train", record["step"], record),
            save_every=config.SAVE_STEPS,
            on_save=lambda step, batch: self.checkpointer.save(self.progress(epoch, step, batch)),
        )
        _LOG.info("EPOCH %d training takes %s", epoch, _duration(time.time() - start))
        final = epoch + 1 == self.epochs
        metrics = {}
        if final or (epoch + 1) % config.EVAL_FREQ == 0:
            metrics = dict(epoch=epoch, **self.score())
            writer.write("eval", result.step, metrics)
            _LOG.info("%s", self.task.describe(metrics))
        numbered = epoch if final or (epoch + 1) % config.SAVE_FREQ == 0 else None
        self.checkpointer.save(self.progress(epoch, result.step, result.batch), metrics, numbered)
        if self.checkpointer.best:
            _LOG.info("Max %s: %.2f", self.task.metric, self.checkpointer.best["value"])
        report_skipped(self.data)
        return result.step

    def progress(self, epoch: int, step: int, batch: int) -> dict[str, Any]:
        """Where training is, as a checkpoint holds it: the next batch, and the steps done."""
        sampler = self.data.train.state(batch)
        if batch == len(self.data.train):
            epoch, batch = epoch + 1, 0
        return dict(epoch=epoch, step=step, batch=batch, sampler=sampler)

    def resume(self) -> tuple[int, int]:
        """Restore the run's state -> (epoch, batch) to continue with, in batches of today's size."""
        settings = hyper_parameters(self.optimizer)
        progress = self.checkpointer.resume(fetch(self.source.path))
        for group, current in zip(self.optimizer.param_groups, settings, strict=True):
            changed = {k: v for k, v in current.items() if group[k] != v}
            if changed:
                _LOG.warning("taken from the config, not from the checkpoint: %s", changed)
                group.update(changed)
        if not (self.checkpointer.folder / "best.pth").is_file():
            self.checkpointer.best = None  # it lies in another folder: this one gets its own
        epoch, batch = self.data.train.load_state(progress["sampler"])
        return (epoch + 1, 0) if batch == len(self.data.train) else (epoch, batch)

    def score(self) -> dict[str, float]:
        """Metrics of the averaged weights, if there are any, else of the trained ones."""
        return evaluate(
            self.scored,
            self.task,
            self.data.val,
            device=self.runtime.device,
            amp=self.amp,
            channels_last=self.config.CHANNELS_LAST,
        )

    def summarise(self, seconds: float) -> None:
        """Time the trained model, draw the curves, and end the log with what the run achieved."""
        config, folder, best = self.config, self.folder, self.checkpointer.best
        speed = time_model(config, self.amp, self.scored, self.runtime.device)
        write_json(folder / "throughput.json", speed, self.runtime)
        if not self.runtime.is_main or best is None:
            return
        best_file = self.checkpointer.folder / "best.pth"
        result = dict(checkpoint=str(best_file), **best["metrics"])
        write_json(folder / "eval.json", result, self.runtime)
        curves = folder / "curves.png"
        plot_training(folder / "metrics.jsonl", curves, self.task.metric, config.MODEL.NAME)
        cost = count_model(config, self.scored)
        size = "x".join(map(str, to_pair(config.DATA.IMG_SIZE)))
        scores = self.task.describe(best["metrics"]).strip(" *")
        files = ", ".join(sorted(path.name for path in folder.iterdir() if path != curves))
        lines = [
            f"{config.MODEL.NAME}: done in {_duration(seconds)}",
            f"  best    {scores}, epoch {best['metrics']['epoch']} of 0 to {self.epochs - 1}",
            f"  model   {cost.params_m:.3f} M parameters, {cost.gmacs:.4f} GMACs at {size}",
            f"  speed   {speed['img_per_s']:.1f} images/s (batch {speed['batch_size']}, "
            f"{speed['dtype']}, {speed['device']})",
            f"  curves  {curves}",
            f"  files   {folder}: {files}",
        ]
        _LOG.info("Summary\n%s", "\n".join(lines))


def train(config: CfgNode, runtime: Runtime) -> None:
    """Train; ends with the summary of the best checkpoint."""
    TrainingRun(config, runtime).run()


def evaluate_only(config: CfgNode, runtime: Runtime) -> None:
    """Score exactly the file that --resume (or --pretrained) names; never trains."""
    amp = set_up(config, runtime)
    folder = output_dir(config)
    source = source_of(config, "eval", folder / "checkpoints" / "last.pth")
    data = build_data(config, rank=runtime.rank, world_size=runtime.world_size, splits=("val",))
    task = build_task(config, data.num_classes)
    model = build_placed(config, data.num_classes, runtime.device)
    load_weights(config, model, source)
    model, _ = amp.prepare(model)
    metrics = evaluate(
        compiled(config, model),
        task,
        data.val,
        device=runtime.device,
        amp=amp,
        channels_last=config.CHANNELS_LAST,
    )
    _LOG.info("%s", task.describe(metrics))
    skipped = report_skipped(data)
    result = dict(checkpoint=source.path, **metrics, skipped=skipped)
    write_json(folder / "eval.json", result, runtime)
    _LOG.info("written: %s", folder / "eval.json")


def throughput_only(config: CfgNode, runtime: Runtime) -> None:
    """Time the model alone at the config's batch size; needs no data."""
    amp = set_up(config, runtime)
    folder = output_dir(config)
    model = build_placed(config, known_classes(config), runtime.device)
    source = source_of(config, "throughput", folder / "checkpoints" / "last.pth")
    if source.kind != "scratch":
        load_weights(config, model, source)
    model, _ = amp.prepare(model)
    result = time_model(config, amp, model, runtime.device)
    _LOG.info(
        "batch_size %d throughput %.1f (images/s, median of %d; %.1f to %.1f)",
        result["batch_size"],
        result["img_per_s"],
        result["repeats"],
        result["img_per_s_min"],
        result["img_per_s_max"],
    )
    write_json(folder / "throughput.json", result, runtime)
    _LOG.info("written: %s", folder / "throughput.json")


def info_only(config: CfgNode, runtime: Runtime) -> None:
    """Count parameters, GMACs and activations per module.

    Needs no data; a model whose cost depends on the image is counted as the mean over a batch of
    validation images where they are at hand, else on noise. Weights come from --resume, if given.
    """
    set_up(config, runtime)
    model = build_placed(config, known_classes(config), torch.device("cpu"))
    source = source_of(config, "throughput", output_dir(config) / "checkpoints" / "last.pth")
    if source.kind != "scratch":
        load_weights(config, model, source)
    cost = count_model(config, model, some_images(config) if model.cost_depends_on_images else None)
    _LOG.info("%s\n%s", config.MODEL.NAME, cost.to_text())
    write_json(output_dir(config) / "info.json", cost.to_dict(), runtime)
    _LOG.info("written: %s", output_dir(config) / "info.json")


MODES: dict[str, Callable[[CfgNode, Runtime], None]] = {
    "EVAL_MODE": evaluate_only,
    "THROUGHPUT_MODE": throughput_only,
    "INFO_MODE": info_only,
}


# -- results -------------------------------------------------------------------------------------


def known_classes(config: CfgNode) -> int | None:
    """Classes of the data, at hand or by its name; None leaves the config's number, or 1000."""
    try:
        return dataset_num_classes(config)
    except FileNotFoundError:
        configured = config.MODEL.NUM_CLASSES is not None
        return None if configured else published_num_classes(config.DATA.DATASET)


def count_model(
    config: CfgNode, model: nn.Module, images: torch.Tensor | None = None
) -> Complexity:
    """Costs of one image at the config's size; the mean over `images` (B, C, H, W) if given."""
    if images is not None:
        _LOG.info("counting the mean over %d validation images", len(images))
        return count(model, images).per_image()
    return count(model, (config.MODEL.IN_CHANS, *to_pair(config.DATA.IMG_SIZE)))


def some_images(config: CfgNode) -> torch.Tensor | None:
    """A batch of validation images (B, C, H, W), if there is a dataset."""
    try:
        return next(iter(build_loader(config, "val")))[0]
    except FileNotFoundError:
        return None


def time_model(config: CfgNode, amp: Amp, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Throughput and latency of a deployed copy, with what they depend on."""
    model = fold_batch_norms(model)
    timed = measure_throughput(
        compiled(config, model),
        batch_size=config.DATA.BATCH_SIZE,
        image_size=to_pair(config.DATA.IMG_SIZE),
        in_chans=config.MODEL.IN_CHANS,
        device=device,
        amp=amp,
        channels_last=config.CHANNELS_LAST,
    )
    return dict(
        model=config.MODEL.NAME,
        compile=config.COMPILE,
        compile_mode=config.COMPILE_MODE if config.COMPILE else None,
        **timed,
    )


def report_skipped(data: Data) -> int:
    """How many unreadable images DATA.ON_ERROR skip has left out, on all processes."""
    loaders = [loader for loader in (data.train, data.val) if loader is not None]
    skipped = int(all_reduce_sum(torch.tensor(sum(loader.skipped for loader in loaders))))
    if skipped:
        _LOG.warning("%d unreadable images were skipped so far", skipped)
    return skipped


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


def check(config: CfgNode, runtime: Runtime) -> None:
    """Stop a run that cannot succeed before it writes anything.

    The model is built without memory behind it; no image and no weights are read, and the images of
    folders, which take long to list, are left to the run.

    Raises:
        ValueError: keys that the data, the task, the model or the optimizer refuse, or missing weights.
        FileNotFoundError: the data is not there.
    """
    Amp(runtime.device, config.AMP_DTYPE, config.AMP_ENABLE, config.AMP_OPT_LEVEL)
    mode = next((key for key in MODES if config[key]), "train")
    if mode in ("train", "EVAL_MODE"):
        classes = check_data(config, ("train", "val") if mode == "train" else ("val",))
        build_task(config, classes)
    else:
        classes = known_classes(config)
    with torch.device("meta"):
        model = build_placed(config, classes, torch.device("meta"))
    if mode == "train":
        build_optimizer(config, model, runtime.world_size)
    # Timing and counting take weights if they are given, and need none.
    kind = {"train": "train", "EVAL_MODE": "eval"}.get(mode, "throughput")
    find_source(config, kind, output_dir(config) / "checkpoints" / "last.pth")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line -> config -> processes -> the mode that was asked for."""
    parser, args, flags = parse_args(argv)
    try:
        config = load_config(args.cfg, args.opts, flags)
        runtime = init_distributed(config.DEVICE, args.local_rank)
        check(config, runtime)
    except (ValueError, FileNotFoundError) as error:
        cleanup()
        parser.error(str(error))
    mode = next((run for key, run in MODES.items() if config[key]), train)
    try:
        mode(config, runtime)
    finally:
        cleanup()


if __name__ == "__main__":
    main()
