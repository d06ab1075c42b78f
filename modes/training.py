"""Training, and what is written about it."""

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from config import dump, output_dir
from data import build_data
from engine import evaluate, train_epoch
from logger import MetricsWriter
from lr_scheduler import build_scheduler
from optimizer import build_optimizer
from tasks import build_task
from utils.checkpoint import Checkpointer
from utils.checkpoint_files import fetch
from utils.distributed import Runtime
from utils.plotting import plot_training
from utils.seeding import seed_everything
from utils.sharding import Gathered, WholeCopy, shard

from .build import (
    average_of,
    build_placed,
    freeze,
    hyper_parameters,
    is_sharded,
    load_weights,
    log_start,
    set_up,
    source_of,
    synchronise_batch_norm,
    wrap,
)
from .results import (
    count_model,
    duration,
    info_size,
    report_skipped,
    time_model,
    write_json,
    write_speed,
)

_LOG = logging.getLogger(__name__)


class TrainingRun:
    """Everything that one training run is made of, built from the config; `run` trains it to the end."""

    def __init__(self, config: CfgNode, runtime: Runtime) -> None:
        self.config, self.runtime, self.folder = config, runtime, output_dir(config)
        self.amp = set_up(config, runtime)
        log_start(config, runtime)
        self.data = build_data(
            config,
            rank=runtime.rank,
            world_size=runtime.world_size,
            local_world_size=runtime.local_world_size,
            device=runtime.device,
        )
        self.task = build_task(config, self.data.num_classes, runtime.device)
        sharded = is_sharded(config, runtime)
        # A sharded model is moved in parts.
        device = torch.device("cpu") if sharded else runtime.device
        model = build_placed(config, self.data.num_classes, device)
        self.source = source_of(config, "train", self.folder / "checkpoints" / "last.pth")
        self.fresh_head: list[str] = []
        if self.source.kind == "pretrained":
            self.fresh_head = load_weights(config, model, self.source).fresh_head
        # Until here all processes drew the same numbers, so that averages start from the same weights.
        seed_everything(config.SEED, runtime.rank)
        model = synchronise_batch_norm(config, model, runtime)
        freeze(config, model)
        model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
        self.copy = WholeCopy(model) if sharded else None
        if sharded:  # copies can only be made of a whole model
            self.ema = average_of(config, model, foreach=False)
            for part in [model, *([self.ema.module] if self.ema else [])]:
                shard(part, runtime.device)
        optimizer = build_optimizer(config, model, runtime.world_size)
        self.model, self.optimizer = self.amp.prepare(model, optimizer)
        if not sharded:
            self.ema = average_of(config, model)
        averaged = self.ema is not None and config.TRAIN.EMA.EVALUATE
        self.scored = self.ema.module if averaged else self.model
        self.window = max(config.TRAIN.ACCUMULATION_STEPS, 1)
        self.schedule = build_scheduler(
            config, self.optimizer, math.ceil(len(self.data.train) / self.window)
        )
        self.epochs = math.ceil(self.schedule.total_steps / self.schedule.steps_per_epoch)
        self.checkpointer = Checkpointer(
            self.folder / "checkpoints",
            dict(
                model=Gathered(self.model) if sharded else self.model,
                ema=Gathered(self.ema) if sharded and self.ema else self.ema,
                optimizer=Gathered(self.optimizer) if sharded else self.optimizer,
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
        done = before = None
        position = (0, 0)  # of the checkpoint, in batches of then
        if self.source.kind == "resume":
            epoch, batch, done, position = self.resume()
        elif self.fresh_head:
            # It would find nothing in any image, and take as long as a trained one.
            _LOG.info("not scored before training: %s is fresh", ", ".join(self.fresh_head[:3]))
        elif self.source.kind == "pretrained":
            before = self.score()
            _LOG.info("before training: %s", self.task.describe(before))
        step = self.step_at(epoch, batch, done)
        if done is not None and step < done:
            _LOG.warning(
                "the checkpoint was made after %d steps, of fewer images: this run goes on at step %d, and "
                "later lines of metrics.jsonl move to metrics.replaced.jsonl", done, step,
            )  # fmt: skip
        if self.runtime.is_main:
            self.write_config(step)
        if epoch >= self.epochs:
            _LOG.info("nothing left to train: %d of %d epochs are done", epoch, self.epochs)
        trained = wrap(self.config, self.model, self.runtime)
        with MetricsWriter(
            self.folder,
            self.runtime.rank,
            resume_step=None if done is None else step,
            position=position,
        ) as writer:
            if before is not None:
                writer.write("eval", step, before)
            for number in range(epoch, self.epochs):
                step = self.run_epoch(trained, writer, number, batch, step)
                batch = 0
        seconds = time.time() - start
        _LOG.info("Training time %s", duration(seconds))
        self.summarise(seconds)

    def write_config(self, step: int) -> None:
        """config.yaml; one of other settings, by which the steps before were trained, stays beside it."""
        path, text = self.folder / "config.yaml", dump(self.config)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            path.replace(self.folder / f"config_before_step_{step}.yaml")
        path.write_text(text, encoding="utf-8")

    def step_at(self, epoch: int, batch: int, done: int | None) -> int:
        """Number of the first step of a run that starts here; `epochs` becomes where it ends.

        Args:
            done: steps of the run that is continued. TRAIN.MAX_STEPS counts them as they were made, and
                TRAIN.EPOCHS in steps of today's size.
        """
        per_epoch = self.schedule.steps_per_epoch
        # The rest of a window is a step to come, but at the end of the epoch there is no rest.
        in_epoch = per_epoch if batch == len(self.data.train) else batch // self.window
        if done is None or not self.config.TRAIN.MAX_STEPS:
            return epoch * per_epoch + in_epoch
        left = max(self.schedule.total_steps - done, 0)
        begun = 1 if batch else 0  # at the end of the run too: it may not have been scored
        self.epochs = epoch + max(begun, math.ceil((in_epoch + left) / per_epoch))
        return done

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
            clip_grad=config.TRAIN.CLIP_GRAD or 0.0,
            ema=self.ema,
            followers=[self.copy.module] if self.copy else [],
            channels_last=config.CHANNELS_LAST,
            log_every=config.PRINT_FREQ,
            on_log=lambda record: writer.write("train", record["step"], record),
            save_every=config.SAVE_STEPS,
            on_save=lambda step, batch: self.save_within(epoch, step, batch),
        )
        _LOG.info("EPOCH %d training takes %s", epoch, duration(time.time() - start))
        final = epoch + 1 == self.epochs
        metrics = {}
        if final or (epoch + 1) % config.EVAL_FREQ == 0:
            # An image or the memory can fail it; a run that continues from here scores first.
            self.checkpointer.save(self.progress(epoch, result.step, result.batch, scored=False))
            metrics = dict(epoch=epoch, **self.score())
            writer.write("eval", result.step, metrics)
            _LOG.info("%s", self.task.describe(metrics))
        numbered = epoch if final or (epoch + 1) % config.SAVE_FREQ == 0 else None
        self.checkpointer.save(self.progress(epoch, result.step, result.batch), metrics, numbered)
        if self.checkpointer.best:
            _LOG.info("Max %s: %.2f", self.task.metric, self.checkpointer.best["value"])
        report_skipped([self.data.train, self.data.val])
        return result.step

    def save_within(self, epoch: int, step: int, batch: int) -> None:
        """Save in the middle of an epoch; its end is scored before, which a resumed run would leave out."""
        if batch < len(self.data.train) and step < self.schedule.total_steps:
            self.checkpointer.save(self.progress(epoch, step, batch))

    def progress(self, epoch: int, step: int, batch: int, scored: bool = True) -> dict[str, Any]:
        """Where training is, as a checkpoint holds it: the next batch, and the steps done.

        Args:
            scored: whether an epoch that ends here needs nothing more.
        """
        sampler = self.data.train.state(batch)
        if scored and batch == len(self.data.train):
            epoch, batch = epoch + 1, 0
        return dict(epoch=epoch, step=step, batch=batch, sampler=sampler)

    def resume(self) -> tuple[int, int, int, tuple[int, int]]:
        """Restore the run's state -> epoch and batch to continue with, steps done, and the saved position.

        The batch is one of today's size, the saved (epoch, batch) is in those of then.
        """
        settings = hyper_parameters(self.config, self.optimizer)
        progress = self.checkpointer.resume(fetch(self.source.path))
        for group, current in zip(self.optimizer.param_groups, settings, strict=True):
            group.setdefault("lr_scale", 1.0)  # timm's schedulers read it so
            changed = {k: v for k, v in current.items() if group[k] != v}
            if changed:
                _LOG.warning("taken from the config, not from the checkpoint: %s", changed)
                group.update(changed)
        folder = self.checkpointer.folder
        continued = Path(self.source.path).resolve() == (folder / "last.pth").resolve()
        if not continued or not (folder / "best.pth").is_file():
            self.checkpointer.best = None  # it is not in this folder, which gets its own
        epoch, batch = self.data.train.load_state(progress["sampler"])
        # An epoch that ends here only by today's batches has not been scored.
        if batch == len(self.data.train) and progress["batch"] == 0:
            epoch, batch = epoch + 1, 0
        return epoch, batch, progress["step"], (progress["epoch"], progress["batch"])

    def scored_model(self) -> AbstractContextManager[nn.Module]:
        """The averaged model, if there is one, else the trained one; in one piece on this device."""
        if self.copy is None:
            return nullcontext(self.scored)
        return self.copy.holding(self.scored, self.runtime.device)

    def score(self) -> dict[str, float]:
        """Metrics of the averaged weights, if there are any, else of the trained ones."""
        with self.scored_model() as model:
            return evaluate(
                model,
                self.task,
                self.data.val,
                device=self.runtime.device,
                amp=self.amp,
                channels_last=self.config.CHANNELS_LAST,
            )

    def summarise(self, seconds: float) -> None:
        """Time the trained model, draw the curves, and end the log with what the run achieved."""
        config, folder, best = self.config, self.folder, self.checkpointer.best
        with self.scored_model() as model:
            speed = time_model(config, self.amp, model, self.runtime.device)
        write_speed(folder, speed, self.runtime)
        if not self.runtime.is_main or best is None:
            return
        best_file = self.checkpointer.folder / "best.pth"
        result = dict(checkpoint=str(best_file), **best["metrics"])
        write_json(folder / "eval.json", result, self.runtime)
        curves = folder / "curves.png"
        try:
            plot_training(folder / "metrics.jsonl", curves, self.task.metric, config.MODEL.NAME)
        except ValueError as error:  # a finished run, of which only the checkpoints are here
            _LOG.warning("no curves: %s", error)
        cost = count_model(config, self.copy.module if self.copy else self.scored)
        size = "x".join(map(str, info_size(config)))
        scores = self.task.describe(best["metrics"]).strip(" *")
        files = ", ".join(sorted(path.name for path in folder.iterdir() if path != curves))
        lines = [
            f"{config.MODEL.NAME}: done in {duration(seconds)}",
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
