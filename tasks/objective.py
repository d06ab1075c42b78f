"""What a model is taught by beyond its own task, and what it must give for that."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from utils.wrappers import unwrap

# Logits (B, K), and targets as indices (B,) or shares (B, K) -> a scalar.
LabelLoss = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """Makes the loss of a batch from the labels and from something else, such as a teacher."""

    def check(self, model: nn.Module) -> None:
        """ValueError unless `model` has the outputs in training mode that are needed; runs nothing."""

    def __call__(
        self, model: nn.Module, images: Tensor, targets: Tensor, label_loss: LabelLoss
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call `model` exactly once, in training mode -> what to minimise, and its parts by name."""


def training_outputs(model: nn.Module) -> tuple[str, ...]:
    """What the bare model gives in training mode (`Backbone.training_outputs`); plain modules: logits."""
    return getattr(unwrap(model), "training_outputs", ("logits",))


def check_task(model: nn.Module, task: str) -> None:
    """ValueError unless the bare `model` has a head for TASK `task`."""
    made_for = getattr(unwrap(model), "task", "classification")
    if made_for != task:
        raise ValueError(
            f"TASK='{task}' cannot train {type(unwrap(model)).__name__}, which is made for {made_for}: set "
            f"MODEL.HEAD.TYPE to a head for {task}"
        )


def with_auxiliary(model: nn.Module, loss: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """A task's loss and its parts -> what `Task.losses` returns, with the model's own losses added.

    Those are what the bare model computed in its last forward (`Backbone.aux_losses`), if it can.
    """
    aux_losses = getattr(unwrap(model), "aux_losses", None)
    auxiliary = aux_losses() if aux_losses else {}
    return {
        "loss": sum(auxiliary.values(), start=loss),
        **{f"loss_{name}": value for name, value in (parts | auxiliary).items()},
    }
