"""Score a model on a loader: exact on any number of processes, and without a trace on the model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from utils.amp import Amp
from utils.wrappers import broadcast_buffers, on_this_process, unwrap

from .train import to_device


def evaluate(
    model: nn.Module,
    task: Any,
    loader: Iterable[Any],
    *,
    device: torch.device,
    amp: Amp,
    channels_last: bool = False,
) -> dict[str, float]:
    """Metrics of `model` over all batches of all processes.

    The model runs outside DDP, so that processes may hold different numbers of batches (also none) without
    waiting for each other inside DDP. All processes must call this; all get the same numbers.

    Args:
        model: may be wrapped; every module's mode is restored afterwards.
        task: a `tasks.Task`.
        loader: this process's batches.

    Returns:
        What `task.evaluator().compute()` returns; `task.metric` is one of the keys.
    """
    module = unwrap(model)
    runner = on_this_process(model)
    # Every module's own mode: a frozen batch norm must still be in eval mode afterwards.
    modes = [(part, part.training) for part in module.modules()]
    evaluator = task.evaluator()
    broadcast_buffers(module)
    module.eval()
    try:
        with torch.inference_mode():
            for batch in loader:
                batch = to_device(batch, device, channels_last)
                with amp.autocast():
                    output = task.predict(runner, batch)
                evaluator.update(output, batch)
            return evaluator.compute()
    finally:
        module.eval()  # forgets what `token_maps` would draw of the last batch
        for part, training in modes:
            part.training = training
