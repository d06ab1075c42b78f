"""One epoch of training, for any task, any precision and any number of processes.

Nothing in the loop waits for the device, except at log steps, at checkpoints and (fp16) in the loss
scaler; a loss that is not finite is found there.
"""

import datetime
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.amp import Amp
from utils.distributed import get_world_size, is_main
from utils.ema import ModelEma
from utils.meters import Mean, peak_memory_mib
from utils.wrappers import is_compiled, unwrap

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What an epoch left: the next step and batch, and means over its batches (this process)."""

    step: int
    batch: int  # `num_batches`, unless the schedule ended before
    metrics: dict[str, float]


def train_epoch(
    model: nn.Module,
    task: Any,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    *,
    device: torch.device,
    amp: Amp,
    num_batches: int,
    epoch: int = 0,
    epochs: int = 1,
    step: int = 0,
    first_batch: int = 0,
    accumulation_steps: int = 1,
    clip_grad: float = 0.0,
    ema: ModelEma | None = None,
    followers: Sequence[nn.Module] = (),
    channels_last: bool = False,
    log_every: int = 10,
    on_log: Callable[[dict[str, float]], None] | None = None,
    save_every: int = 0,
    on_save: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train from batch `first_batch` to the end of an epoch, or of the schedule.

    Args:
        model: on its device; may be wrapped by DDP and torch.compile.
        task: a `tasks.Task`.
        loader: yields the batches `first_batch` ... `num_batches - 1` of this epoch.
        schedule: a `lr_scheduler.Schedule`; its total_steps end the run.
        num_batches: batches of the whole epoch; a last incomplete accumulation window is stepped too.
        step: optimizer steps done before, over all epochs; counts skipped fp16 steps, so that all
            processes and the schedule agree without asking the device.
        first_batch: where a resumed epoch continues; in the middle of an accumulation window (after a
            change of batch size, say) the rest of the window makes a step.
        accumulation_steps: batches per optimizer step; 0 means 1.
        clip_grad: largest total gradient norm; 0 is off. The norm is logged in any case.
        followers: models that are evaluated in place of this one, and whose schedules go along.
        log_every: batches between log lines (the epoch's last batch is logged too).
        on_log: gets a flat dict of numbers at each log line.
        save_every: optimizer steps between calls of `on_save(step, next batch)`; 0 is never. It may
            evaluate; the losses and gradients up to there are known to be finite.

    Raises:
        FloatingPointError: the loss, or the gradient that a step was made with, is nan or infinite.
    """
    window = max(accumulation_steps, 1)
    module = unwrap(model)
    parameters = [p for p in module.parameters() if p.requires_grad]
    learners = [module, *followers] if ema is None else [module, ema.module, *followers]
    watched = ["loss"] if amp.skips_steps else ["loss", "grad_norm"]
    # The last step of the run may come before the end of the epoch.
    end = min(num_batches, first_batch + (schedule.total_steps - step) * window)
    log = _TrainLog(epoch, epochs, num_batches, end, device, watched)
    batches = iter(_with_progress_bar(loader, f"epoch {epoch}", first_batch, num_batches))
    model.train()
    optimizer.zero_grad()

    if first_batch == num_batches and step:  # an epoch that only has to be scored
        for learner in learners:
            _set_progress(learner, step - 1, schedule)
    while first_batch < num_batches and step < schedule.total_steps:
        schedule.step_update(step)
        log.lr = schedule.lr_at(step)
        for learner in learners:
            _set_progress(learner, step, schedule)
        # Windows keep their places in the epoch, so that a resumed one ends where it would have.
        end = min((first_batch // window + 1) * window, num_batches)
        for index in range(first_batch, end):
            final = index == end - 1
            batch = to_device(log.wait_for(batches, index), device, channels_last)
            with _gradient_sync(model, final):
                with _eager_unless_settled(model), amp.autocast():
                    losses = task.losses(model, batch)
                amp.backward(losses["loss"] / (end - first_batch), optimizer, final)
            if final:
                log.add(grad_norm=amp.step(optimizer, parameters, clip_grad))
                optimizer.zero_grad()
                step += 1
                if ema is not None:
                    ema.update(module, step)
            log.add(_num_images(batch), **losses, **_log_values(module))
            if index % log_every == 0 or index == num_batches - 1:
                record = log.write(index, step, optimizer, amp)
                if on_log:
                    on_log(record)
        first_batch = end
        if on_save and save_every and step % save_every == 0:
            log.check(end - 1, step)
            with log.paused():
                on_save(step, end)
            model.train()

    log.check(first_batch - 1, step)
    return TrainResult(step, first_batch, log.means())


def to_device(batch: Any, device: torch.device, channels_last: bool = False) -> Any:
    """Move all tensors in nested tuples, lists and dicts; 4-D float ones in channels_last order if asked."""
    if isinstance(batch, Tensor):
        images = channels_last and batch.ndim == 4 and batch.is_floating_point()
        memory_format = torch.channels_last if images else torch.preserve_format
        return batch.to(device, non_blocking=True, memory_format=memory_format)
    if isinstance(batch, dict):
        return {key: to_device(value, device, channels_last) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device, channels_last) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device, channels_last) for value in batch)
    return batch


class _TrainLog:
    """Means, times and Swin's log line of one epoch.

    Args:
        watched: names of the values that must be finite.
    """

    def __init__(
        self,
        epoch: int,
        epochs: int,
        num_batches: int,
        end: int,
        device: torch.device,
        watched: Sequence[str],
    ) -> None:
        self.watched = watched
        self.epoch, self.epochs, self.num_batches, self.device = epoch, epochs, num_batches, device
        self.end = end  # the batch that the epoch, or the run, ends before
        self.values: dict[str, Mean] = defaultdict(Mean)
        self.time, self.data_time, self.loss_scale = Mean(), Mean(), Mean()
        self.num_images = self.num_waited = 0
        self.lr = math.nan  # of the current step
        self.mark = time.perf_counter()

    def wait_for(self, batches: Any, index: int) -> Any:
        """The next batch; counts the time that the loader made us wait."""
        start = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            raise RuntimeError(
                f"the loader ended after batch {index} of {self.num_batches} of epoch {self.epoch}"
            ) from None
        self.data_time.add(time.perf_counter() - start)
        self.num_waited += 1
        return batch

    def add(self, num_images: int = 0, /, **values: Tensor | float) -> None:
        """Count numbers in; 0-D tensors are not read."""
        self.num_images += num_images
        for name, value in values.items():
            self.values[name].add(value)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the times what happens inside."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def check(self, index: int, step: int) -> None:
        """Wait for the device; FloatingPointError if what is watched was not finite since the last line."""
        for name in self.watched:
            if name in self.values and not math.isfinite(value := self.values[name].drain()):
                raise FloatingPointError(
                    f"the {name} became {value} at or shortly before step {step} (epoch {self.epoch}, batch "
                    f"{index}, lr {self.lr:.3g}), and nothing was saved since. Use AMP_ENABLE False (or bf16 "
                    "in place of fp16), a lower TRAIN.BASE_LR, a longer TRAIN.WARMUP_EPOCHS, or "
                    "TRAIN.CLIP_GRAD above 0"
                )

    def write(
        self, index: int, step: int, optimizer: torch.optim.Optimizer, amp: Amp
    ) -> dict[str, float]:
        """Log one line -> its finite numbers as a record; means are over the batches since the last one."""
        self.check(index, step)  # waits for the device, so the time below is that of finished work
        now = time.perf_counter()
        count, seconds = self.num_waited, now - self.mark
        for _ in range(count):
            self.time.add(seconds / count)
        self.loss_scale.add(amp.loss_scale())
        images, self.num_images, self.num_waited, self.mark = self.num_images, 0, 0, now

        means = {name: mean.read() for name, mean in self.values.items()}
        batch_time, loss_scale = self.time.read(), self.loss_scale.read()
        loss, grad_norm = means["loss"], means.get("grad_norm", (math.nan, math.nan))
        # No step since the last line, or none at all: log readers expect a number, Swin writes 0.
        shown_norm = [0.0 if math.isnan(norm) else norm for norm in grad_norm]
        # That of the groups that have one.
        weight_decay = max(group["weight_decay"] for group in optimizer.param_groups)
        eta = datetime.timedelta(seconds=int(batch_time[1] * max(0, self.end - 1 - index)))
        memory = peak_memory_mib(self.device)
        _LOG.info(
            f"Train: [{self.epoch}/{self.epochs}][{index}/{self.num_batches}]\t"
            f"eta {eta} lr {self.lr:.6f}\t wd {weight_decay:.4f}\t"
            f"time {batch_time[0]:.4f} ({batch_time[1]:.4f})\t"
            f"loss {loss[0]:.4f} ({loss[1]:.4f})\t"
            f"grad_norm {shown_norm[0]:.4f} ({shown_norm[1]:.4f})\t"
            f"loss_scale {loss_scale[0]:.4f} ({loss_scale[1]:.4f})\t"
            f"mem {memory:.0f}MB"
        )
        record = dict(
            step=step,
            epoch=self.epoch,
            batch=index,
            lr=self.lr,
            weight_decay=weight_decay,
            **{name: mean for name, (mean, _) in means.items()},
            loss_scale=loss_scale[0],
            time=batch_time[0],
            data_time=self.data_time.read()[0],
            img_per_s=images * get_world_size() / seconds,
            mem_mib=memory,
        )
        # fp16 overflows now and then, and JSON has no infinity.
        return {key: value for key, value in record.items() if math.isfinite(value)}

    def means(self) -> dict[str, float]:
        """Means over the whole epoch."""
        return {name: mean.read()[1] for name, mean in self.values.items()}


def _set_progress(module: nn.Module, step: int, schedule: Any) -> None:
    """Advance the schedules inside a model; plain modules have none."""
    if hasattr(module, "set_progress"):
        module.set_progress(
            step, schedule.total_steps, schedule.warmup_steps, schedule.steps_per_epoch
        )


def _eager_unless_settled(model: nn.Module) -> AbstractContextManager[None]:
    """No compiler while shapes in the model change from step to step: it would compile each of them."""
    if not is_compiled(model) or getattr(unwrap(model), "settled", True):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _log_values(module: nn.Module) -> dict[str, Tensor | float]:
    """What a model tells of its last training forward; plain modules nothing."""
    return module.log_values() if hasattr(module, "log_values") else {}


def _gradient_sync(model: nn.Module, final: bool) -> AbstractContextManager[None]:
    """Gradients are averaged in the backward pass: only the last of an accumulation window needs to be."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP
        model.set_requires_gradient_sync(final)
        return nullcontext()
    return nullcontext() if final or not hasattr(model, "no_sync") else model.no_sync()


def _num_images(batch: tuple[Any, Any]) -> int:
    return len(batch[0])


def _with_progress_bar(
    loader: Iterable[Any], title: str, first_batch: int, num_batches: int
) -> Iterable[Any]:
    """A bar on rank 0, if standard error is a terminal."""
    return tqdm(
        loader,
        desc=title,
        initial=first_batch,
        total=num_batches,
        disable=None if is_main() else True,
        leave=False,
        dynamic_ncols=True,
    )
