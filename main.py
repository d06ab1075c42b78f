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
from data import Data, build_data, dataset_num_classes
from engine import evaluate, measure_throughput, train_epoch
from logger import MetricsWriter, create_logger
from lr_scheduler import build_scheduler
from models import Backbone, build_model
from models.layers.tokens import to_pair
from models.pretrained import has_averaged_weights, load_pretrained
from optimizer import build_optimizer
from tasks import Task, build_task
from utils.amp import Amp
from utils.arguments import parse_args
from utils.checkpoint import Checkpointer, Source, choose_source, fetch, load_file
from utils.complexity import Complexity, count
from utils.distributed import Runtime, cleanup, init_distributed
from utils.ema import ModelEma
from utils.plotting import plot_training
from utils.seeding import seed_everything, set_deterministic

_LOG = logging.getLogger("mixlab.main")


# -- what a run is made of -----------------------------------------------------------------------


def set_up(config: CfgNode, runtime: Runtime) -> Amp:
    """Logger, seeds and numerics of this process, before anything is built."""
    create_logger(output_dir(config), runtime.rank, config.MODEL.NAME)
    seed_everything(config.SEED, runtime.rank)
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
    return torch.compile(model) if config.COMPILE else model


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


def source_of(config: CfgNode, mode: str, last: Path) -> Source:
    """Where weights come from, said in one log line."""
    source = choose_source(
        mode,
        last,
        resume=config.MODEL.RESUME,
        pretrained=config.MODEL.PRETRAINED,
        auto_resume=config.TRAIN.AUTO_RESUME,
    )
    _LOG.info("weights: %s", source.reason)
    return source


def write_json(path: Path, content: dict[str, Any], runtime: Runtime) -> None:
    """One result file of a run, written by the first process."""
    if runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


# -- modes ---------------------------------------------------------------------------------------


def train(config: CfgNode, runtime: Runtime) -> None:
    """Train, evaluating after every epoch; ends with the summary of the best checkpoint."""
    amp = set_up(config, runtime)
    folder, start = output_dir(config), time.time()
    data = build_data(config, rank=runtime.rank, world_size=runtime.world_size)
    task = build_task(config, data.num_classes)
    model = build_placed(config, data.num_classes, runtime.device)
    source = source_of(config, "train", folder / "checkpoints" / "last.pth")
    if source.kind == "pretrained":
        load_weights(config, model, source)
    if config.TRAIN.SYNC_BN and runtime.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    optimizer = build_optimizer(config, model, runtime.world_size)
    model, optimizer = amp.prepare(model, optimizer)
    ema_config = config.TRAIN.EMA
    ema = ModelEma(model, ema_config.DECAY, ema_config.WARMUP) if ema_config.ENABLE else None
    steps_per_epoch = math.ceil(len(data.train) / max(config.TRAIN.ACCUMULATION_STEPS, 1))
    schedule = build_scheduler(config, optimizer, steps_per_epoch)
    epochs = math.ceil(schedule.total_steps / steps_per_epoch)
    checkpointer = Checkpointer(
        folder / "checkpoints",
        dict(model=model, ema=ema, optimizer=optimizer, scheduler=schedule, scaler=amp),
        metric=task.metric,
        keep=config.SAVE_KEEP,
        config_text=dump(config),
        classes=data.classes,
    )
    progress = dict(epoch=config.TRAIN.START_EPOCH, step=0, batch=0)
    progress["step"] = progress["epoch"] * steps_per_epoch
    if source.kind == "resume":
        progress = checkpointer.resume(fetch(source.path))
    if runtime.is_main:
        (folder / "config.yaml").write_text(dump(config))
    trained = wrap(config, model, runtime)
    scored = model if ema is None else ema.module

    def score() -> dict[str, float]:
        return evaluate(
            scored,
            task,
            data.val,
            device=runtime.device,
            amp=amp,
            channels_last=config.CHANNELS_LAST,
        )

    if source.kind == "pretrained":
        _LOG.info("before training: %s", task.describe(score()))
    with MetricsWriter(folder, runtime.rank, resume_step=progress["step"]) as writer:
        for epoch in range(progress["epoch"], epochs):
            first_batch = progress["batch"] if epoch == progress["epoch"] else 0
            data.train.set_position(epoch, first_batch)
            epoch_start = time.time()
            result = train_epoch(
                trained,
                task,
                data.train,
                optimizer,
                schedule,
                device=runtime.device,
                amp=amp,
                num_batches=len(data.train),
                epoch=epoch,
                epochs=epochs,
                step=progress["step"],
                first_batch=first_batch,
                accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
                clip_grad=config.TRAIN.CLIP_GRAD,
                ema=ema,
                channels_last=config.CHANNELS_LAST,
                log_every=config.PRINT_FREQ,
                on_log=lambda record: writer.write("train", record["step"], record),
                save_every=config.SAVE_STEPS,
                on_save=lambda step, batch, epoch=epoch: checkpointer.save(
                    dict(epoch=epoch, step=step, batch=batch)
                ),
            )
            _LOG.info("EPOCH %d training takes %s", epoch, _duration(time.time() - epoch_start))
            progress = dict(epoch=epoch + 1, step=result.step, batch=0)
            metrics = score()
            writer.write("eval", result.step, dict(epoch=epoch, **metrics))
            numbered = (epoch + 1) % config.SAVE_FREQ == 0 or epoch + 1 == epochs
            checkpointer.save(progress, metrics, epoch if numbered else None)
            _LOG.info("%s", task.describe(metrics))
            if checkpointer.best:
                _LOG.info("Max %s: %.2f", task.metric, checkpointer.best["value"])
            report_skipped(data)
    _LOG.info("Training time %s", _duration(time.time() - start))
    summarise(config, runtime, amp, task, scored, checkpointer, time.time() - start)


def evaluate_only(config: CfgNode, runtime: Runtime) -> None:
    """Score exactly the file that --resume (or --pretrained) names; never trains."""
    amp = set_up(config, runtime)
    folder = output_dir(config)
    source = source_of(config, "eval", folder / "checkpoints" / "last.pth")
    data = build_data(config, rank=runtime.rank, world_size=runtime.world_size, splits=("val",))
    task = build_task(config, data.num_classes)
    model = build_placed(config, data.num_classes, runtime.device)
    load_weights(config, model, source)
    metrics = evaluate(
        torch.compile(model) if config.COMPILE else model,
        task,
        data.val,
        device=runtime.device,
        amp=amp,
        channels_last=config.CHANNELS_LAST,
    )
    _LOG.info("%s", task.describe(metrics))
    report_skipped(data)
    write_json(folder / "eval.json", dict(checkpoint=source.path, **metrics), runtime)
    _LOG.info("written: %s", folder / "eval.json")


def throughput_only(config: CfgNode, runtime: Runtime) -> None:
    """Time the model alone at the config's batch size; needs no data."""
    amp = set_up(config, runtime)
    folder = output_dir(config)
    model = build_placed(config, known_classes(config), runtime.device)
    source = source_of(config, "throughput", folder / "checkpoints" / "last.pth")
    if source.kind != "scratch":
        load_weights(config, model, source)
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
    """Count parameters, GMACs and activations per module; needs no data."""
    set_up(config, runtime)
    cost = count_model(config, build_placed(config, known_classes(config), torch.device("cpu")))
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
    """Classes of the data where it is at hand; None leaves the config's number, or 1000."""
    try:
        return dataset_num_classes(config)
    except FileNotFoundError:
        return None


def count_model(config: CfgNode, model: nn.Module) -> Complexity:
    """Costs of one image at the config's size."""
    return count(model, (config.MODEL.IN_CHANS, *to_pair(config.DATA.IMG_SIZE)))


def time_model(config: CfgNode, amp: Amp, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Throughput and latency, with what they depend on."""
    timed = measure_throughput(
        torch.compile(model) if config.COMPILE else model,
        batch_size=config.DATA.BATCH_SIZE,
        image_size=to_pair(config.DATA.IMG_SIZE),
        in_chans=config.MODEL.IN_CHANS,
        device=device,
        amp=amp,
        channels_last=config.CHANNELS_LAST,
    )
    return dict(model=config.MODEL.NAME, compile=config.COMPILE, **timed)


def report_skipped(data: Data) -> None:
    """Say how many unreadable images DATA.ON_ERROR skip has left out."""
    for name, loader in (("training", data.train), ("validation", data.val)):
        if loader is not None and loader.skipped:
            _LOG.warning("%d unreadable %s images were skipped so far", loader.skipped, name)


def summarise(
    config: CfgNode,
    runtime: Runtime,
    amp: Amp,
    task: Task,
    model: nn.Module,
    checkpointer: Checkpointer,
    seconds: float,
) -> None:
    """Time the trained model, draw the curves, and end the log with what the run achieved."""
    folder = output_dir(config)
    speed = time_model(config, amp, model, runtime.device)
    write_json(folder / "throughput.json", speed, runtime)
    if not runtime.is_main or checkpointer.best is None:
        return
    best, best_file = checkpointer.best, checkpointer.folder / "best.pth"
    write_json(folder / "eval.json", dict(checkpoint=str(best_file), **best["metrics"]), runtime)
    plot_training(folder / "metrics.jsonl", folder / "curves.png", task.metric, config.MODEL.NAME)
    cost = count_model(config, model)
    size = "x".join(map(str, to_pair(config.DATA.IMG_SIZE)))
    files = ", ".join(sorted(p.name for p in folder.iterdir() if p.name != "curves.png"))
    lines = [
        f"{config.MODEL.NAME}: done in {_duration(seconds)}",
        f"  best       {task.describe(best['metrics'])} (after epoch {best['progress']['epoch']})",
        f"  model      {cost.params_m:.3f} M parameters, {cost.gmacs:.4f} GMACs at {size}",
        f"  speed      {speed['img_per_s']:.1f} images/s (batch {speed['batch_size']}, "
        f"{speed['dtype']}, {speed['device']})",
        f"  curves     {folder / 'curves.png'}",
        f"  files      {folder}: {files}",
    ]
    _LOG.info("Summary\n%s", "\n".join(lines))


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line -> config -> processes -> the mode that was asked for."""
    parser, args, flags = parse_args(argv)
    try:
        config = load_config(args.cfg, args.opts, flags)
        runtime = init_distributed(local_rank_flag=args.local_rank)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    mode = next((run for key, run in MODES.items() if config[key]), train)
    try:
        mode(config, runtime)
    finally:
        cleanup()


if __name__ == "__main__":
    main()
