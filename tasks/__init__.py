"""What a model is trained for: losses, predictions and metrics, behind one protocol.

A batch is `(inputs, targets)`: inputs is a tensor (B, C, H, W), or a list of tensors (C, H_i, W_i) where
images keep their own size; targets is anything nested of tensors that the task understands.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import classification, detection, segmentation

__all__ = ["Evaluator", "Task", "build_task", "sizes_vary"]


class Evaluator(Protocol):
    """Collects predictions of one process; the metrics are those of all processes together."""

    def update(self, output: Any, batch: tuple[Any, Any]) -> None:
        """Count one batch in, without waiting for the device."""

    def loss(self, output: Any, batch: tuple[Any, Any]) -> Tensor:
        """Sum of the samples' losses, differentiable: what an attack raises."""

    def compute(self) -> dict[str, float]:
        """Metrics by name, percent where they are shares; every sample counts exactly once.

        All processes call it, those without a single batch too, and all get the same numbers.
        """


class Task(Protocol):
    """Everything that the engine knows about what is learnt."""

    metric: str  # key of `compute()` that selects the best checkpoint: higher is better

    def check(self, model: nn.Module) -> None:
        """ValueError if the bare `model`, which may have no memory behind it, cannot be trained so."""

    def losses(self, model: nn.Module, batch: tuple[Any, Any]) -> dict[str, Tensor]:
        """Forward pass in training mode -> {"loss": what to minimise, "loss_x": its parts to log}.

        The model may be wrapped (DDP, torch.compile), and must be called exactly once.
        """

    def predict(self, model: nn.Module, batch: tuple[Any, Any]) -> Any:
        """Forward pass in eval mode -> what the evaluator takes."""

    def evaluator(self, **options: Any) -> Evaluator:
        """A fresh evaluator for one pass over a loader; options are the task's own."""

    def describe(self, metrics: dict[str, float]) -> str:
        """The metrics that a person reads first, as one log line."""

    # Of dense tasks only:

    single_look: bool  # `predict` shows each image to the model once (taken for granted without it)

    def picture(
        self, image: Tensor, found: Any, target: Mapping[str, Any], classes: Sequence[str] = ()
    ) -> Tensor:
        """The ground truth of one image beside what `predict` found in it, uint8 (3, H, W').

        Args:
            image: the stored one, uint8 (3, H, W).
        """


_BUILDERS: dict[str, Callable[[Any, int, torch.device | None], Task]] = {
    "classification": classification.build_task,
    "detection": detection.build_task,
    "segmentation": segmentation.build_task,
}


def build_task(config: Any, num_classes: int, device: torch.device | None = None) -> Task:
    """The task that TASK names; ValueError for an unknown one.

    Args:
        device: of training, where the task may keep networks of its own, such as a teacher; None is enough to
            check the config, or to evaluate.
    """
    if config.TASK not in _BUILDERS:
        raise ValueError(f"TASK='{config.TASK}' must be one of {sorted(_BUILDERS)}")
    return _BUILDERS[config.TASK](config, num_classes, device)


def sizes_vary(config: Any) -> bool:
    """Whether batches have many sizes: images keep their shapes, and are padded as far as they must."""
    return config.TASK != "classification"
