"""Score a model on a loader: exact on any number of processes, and without a trace on the model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from utils.amp import Amp
from utils.distributed import get_rank, get_world_size
from utils.meters import ImageStatistics
from utils.wrappers import broadcast_buffers, on_this_process, unwrap

from .attacks import GradientAttack
from .train import to_device


def evaluate(
    model: nn.Module,
    task: Any,
    loader: Iterable[Any],
    *,
    device: torch.device,
    amp: Amp,
    channels_last: bool = False,
    evaluator: Any = None,
    attack: GradientAttack | None = None,
) -> dict[str, float]:
    """Metrics of `model` over all batches of all processes.

    The model runs outside DDP, so that processes may hold different numbers of batches (also none) without
    waiting for each other inside DDP. All processes must call this; all get the same numbers.

    Args:
        model: may be wrapped; every module's mode is restored afterwards.
        task: a `tasks.Task`.
        loader: this process's batches.
        evaluator: None: `task.evaluator()`; with an attack it says what raises the loss, too.
        attack: moves the images (B, C, H, W) of each batch before they are scored, by the gradients that the
            model has in eval mode, in float32.

    Returns:
        What `evaluator.compute()` returns; `task.metric` is one of the keys. What the model tells of each
        image (`Backbone.image_values`) comes as mean and percentiles beside it, unless images are shown to
        it several times (`single_look` of the task or of a wrapper): it tells of the last time only. What
        else the scores depend on (`Backbone.conditions`) is with them.
    """
    module = unwrap(model)
    runner = on_this_process(model)
    # Every module's own mode: a frozen batch norm must still be in eval mode afterwards.
    modes = [(part, part.training) for part in module.modules()]
    evaluator, statistics = evaluator or task.evaluator(), ImageStatistics()
    told = hasattr(module, "image_values") and all(
        getattr(part, "single_look", True) for part in (task, runner)
    )
    broadcast_buffers(module)
    module.eval()
    try:
        # What inference mode makes could not be used by an attack's backward pass.
        with torch.inference_mode() if attack is None else torch.no_grad():
            for index, batch in enumerate(loader):
                batch = to_device(batch, device, channels_last)
                if attack is not None:
                    number = index * get_world_size() + get_rank()
                    batch = _attacked(attack, runner, task, evaluator, batch, number)
                with amp.autocast():
                    output = task.predict(runner, batch)
                evaluator.update(output, batch)
                if told:
                    statistics.add(module.image_values())
            conditions = module.conditions() if hasattr(module, "conditions") else {}
            return evaluator.compute() | statistics.compute() | conditions
    finally:
        module.eval()  # forgets what `token_maps` would draw of the last batch
        for part, training in modes:
            part.training = training


def _attacked(
    attack: GradientAttack, model: nn.Module, task: Any, evaluator: Any, batch: Any, number: int
) -> tuple[Any, Any]:
    """The batch with images that raise the evaluator's loss."""
    images, targets = batch

    def loss(moved: torch.Tensor) -> torch.Tensor:
        return evaluator.loss(task.predict(model, (moved, targets)), (moved, targets))

    return attack(images, loss, number), targets
