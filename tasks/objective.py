"""What a classifier is taught by beyond the labels, and what it must give for that."""

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
