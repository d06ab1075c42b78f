"""Images and labels: formats on disk, sampling over epochs and processes, transforms, batches."""

from .build import (
    Data,
    build_data,
    build_dataset,
    build_loader,
    check_data,
    dataset_num_classes,
)
from .registry import published_num_classes

__all__ = [
    "Data",
    "build_data",
    "build_dataset",
    "build_loader",
    "check_data",
    "dataset_num_classes",
    "published_num_classes",
]
