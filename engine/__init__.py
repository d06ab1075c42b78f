"""Task-agnostic loops: they take plain values, models, and a `tasks.Task`."""

from .evaluate import evaluate
from .throughput import measure_throughput
from .train import TrainResult, to_device, train_epoch

__all__ = ["TrainResult", "evaluate", "measure_throughput", "to_device", "train_epoch"]
