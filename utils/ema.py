"""Exponential moving average of a model, on top of timm's."""

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .wrappers import unwrap


class ModelEma:
    """Moving average of all parameters and buffers: `average <- decay * average + (1 - decay) * model`.

    Args:
        model: bare, or wrapped by DDP or torch.compile; the copy is of the bare model.
        decay: per optimizer step.
        warmup: shorter memory at first, `1 - step^(-2/3)` until that exceeds `decay`; the first step
            then copies the model.
        device: where the average lives; None is where the model does.
        foreach: update all tensors in one call, which refuses a mixture of sharded ones and others.

    Attributes:
        module: the averaged model, in eval mode: evaluate it, its state dict is the checkpoint's.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        warmup: bool = False,
        device: torch.device | None = None,
        foreach: bool = True,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"TRAIN.EMA.DECAY={decay} must be in [0, 1): 1 would never learn")
        self.warmup = warmup
        self._average = ModelEmaV3(
            unwrap(model), decay=decay, use_warmup=warmup, device=device, foreach=foreach
        )
        self.module = self._average.module.requires_grad_(False)

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 1 over the whole run."""
        # timm copies the model at step 1 whenever it is told the step; without warm-up the plain
        # formula holds from the start.
        self._average.update(unwrap(model), step=step if self.warmup else None)

    def state_dict(self) -> dict[str, Tensor]:
        """State dict of the averaged model, under the model's own names."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average; also takes the state dict of a plain model."""
        self.module.load_state_dict(state)
