"""Schedules of the learning rate (timm's) and of the weight decay, per optimizer step."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
)
from torch import nn

from optimizer import build_rates

_LOG = logging.getLogger(__name__)

# Swin's linear schedule ends at this share of the base rate, whatever MIN_LR says.
LINEAR_END = 0.01


class Schedule:
    """Learning rate and weight decay as functions of the optimizer step, and the length of the run.

    Nothing in it depends on the past: resuming is calling `step_update` with the right step, and a run
    with other hyper-parameters follows those from there on.

    Args:
        make: builds a timm scheduler for an optimizer.
        optimizer: its groups have the scaled base rate as `initial_lr` (or `lr`), and may have their own
            factors as `lr_scale` and `wd_scale`.
        total_steps, warmup_steps, steps_per_epoch: in optimizer steps.
        weight_decay: (at the start, at the end) of a cosine over the whole run; None leaves the groups'
            own as it is.
    """

    def __init__(
        self,
        make: Callable[[torch.optim.Optimizer], Any],
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        warmup_steps: int = 0,
        steps_per_epoch: int | None = None,
        weight_decay: tuple[float, float] | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.steps_per_epoch = steps_per_epoch
        self.weight_decay = weight_decay
        self._optimizer = optimizer
        # Remembered here: the groups of an older checkpoint, once loaded, do not say it.
        self._wd_scales = [group.get("wd_scale", 1.0) for group in optimizer.param_groups]
        # A twin on a throwaway parameter answers lr_at without touching the real optimizer.
        self._probed = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=_base_lr(optimizer))
        self._probe = make(self._probed)
        self._scheduler = make(optimizer)

    def step_update(self, step: int) -> None:
        """Set rates and decay for optimizer step number `step`, counted from 0; call it before that step."""
        self._scheduler.step_update(step)
        if self.weight_decay is not None:
            decay = self.weight_decay_at(step)
            for group, scale in zip(self._optimizer.param_groups, self._wd_scales, strict=True):
                group["weight_decay"] = decay * scale

    def lr_at(self, step: int) -> float:
        """Rate of a group with factor 1 at step `step`."""
        self._probe.step_update(step)
        return self._probed.param_groups[0]["lr"]

    def weight_decay_at(self, step: int) -> float:
        """Weight decay at step `step`, of the groups that decay."""
        if self.weight_decay is None:
            return max(group["weight_decay"] for group in self._optimizer.param_groups)
        first, last = self.weight_decay
        return last + (first - last) * (1 + math.cos(math.pi * step / self.total_steps)) / 2

    def state_dict(self) -> dict[str, int]:
        """The length of the run, so that a resumed run can tell when it follows another schedule."""
        return dict(total_steps=self.total_steps, warmup_steps=self.warmup_steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the checkpoint's run; there is nothing to restore."""
        own = self.state_dict()
        differing = {key: state[key] for key in own if key in state and state[key] != own[key]}
        if differing:
            _LOG.warning(
                "the checkpoint was trained with %s, this run has %s: its schedule continues with the latter",
                differing,
                {key: own[key] for key in differing},
            )


def build_scheduler(
    config: Any,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    world_size: int | None = None,
) -> Schedule:
    """The schedule that TRAIN.LR_SCHEDULER names, and that of TRAIN.WEIGHT_DECAY_END.

    Args:
        config: keys TRAIN and DATA.BATCH_SIZE.
        optimizer: fresh from `build_optimizer`; build the schedule before loading a checkpoint into it.
        steps_per_epoch: optimizer steps, so batches / ACCUMULATION_STEPS rounded up.
        world_size: processes, for the scaling of the rates; None asks the process group.

    Raises:
        ValueError: unknown name, or no step to schedule.
    """
    train, options = config.TRAIN, config.TRAIN.LR_SCHEDULER
    total = train.MAX_STEPS or int(train.EPOCHS * steps_per_epoch)
    warmup = train.WARMUP_STEPS or int(train.WARMUP_EPOCHS * steps_per_epoch)
    if total < 1:
        raise ValueError(
            f"TRAIN.EPOCHS={train.EPOCHS} with {steps_per_epoch} steps per epoch and "
            f"TRAIN.MAX_STEPS={train.MAX_STEPS} leave nothing to train"
        )
    if warmup >= total:
        _LOG.warning(
            "the run ends inside its warm-up (%d of %d steps): lower TRAIN.WARMUP_EPOCHS=%s or "
            "TRAIN.WARMUP_STEPS=%s to reach TRAIN.BASE_LR",
            total, warmup, train.WARMUP_EPOCHS, train.WARMUP_STEPS,
        )  # fmt: skip
    rates = build_rates(config, world_size)
    after_warmup = max(total - warmup, 2)  # timm has no curve of one step; only its start is used
    common = dict(warmup_t=warmup, warmup_lr_init=rates.warmup, t_in_epochs=False)
    prefixed = common | dict(
        lr_min=rates.minimum,
        warmup_prefix=options.WARMUP_PREFIX,
        t_initial=after_warmup if options.WARMUP_PREFIX else max(total, 2),
    )
    # Swin's step and multistep schedules count from the start of the run, timm's from the end of warm-up.
    absolute = common | dict(warmup_prefix=False)

    def make(target: torch.optim.Optimizer) -> Any:
        name = options.NAME.lower()
        if name == "cosine":
            return CosineLRScheduler(target, **prefixed)
        if name == "poly":
            return PolyLRScheduler(target, power=options.POWER, **prefixed)
        if name == "linear":
            return PolyLRScheduler(
                target,
                power=1.0,
                lr_min=LINEAR_END * _base_lr(target),
                t_initial=after_warmup,
                warmup_prefix=True,
                **common,
            )
        if name == "step":
            decay_steps = max(int(options.DECAY_EPOCHS * steps_per_epoch), 1)
            return StepLRScheduler(
                target, decay_t=decay_steps, decay_rate=options.DECAY_RATE, **absolute
            )
        if name == "multistep":
            # timm decays one step early ("t + 1"); a decay at epoch e shall begin with its first step.
            milestones = sorted(int(epoch * steps_per_epoch) + 1 for epoch in options.MULTISTEPS)
            return MultiStepLRScheduler(
                target, decay_t=milestones, decay_rate=options.GAMMA, **absolute
            )
        raise ValueError(
            f"TRAIN.LR_SCHEDULER.NAME='{options.NAME}' must be one of "
            "['cosine', 'linear', 'step', 'multistep', 'poly']"
        )

    decays = train.WEIGHT_DECAY, train.WEIGHT_DECAY_END
    return Schedule(
        make,
        optimizer,
        total_steps=total,
        warmup_steps=warmup,
        steps_per_epoch=steps_per_epoch,
        weight_decay=None if train.WEIGHT_DECAY_END is None else decays,
    )


def _base_lr(optimizer: torch.optim.Optimizer) -> float:
    group = optimizer.param_groups[0]
    return group.get("initial_lr", group["lr"])
