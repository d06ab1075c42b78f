"""Images and labels: formats on disk, sampling over epochs and processes, transforms, batches."""

from .build import (
    Checked,
    Data,
    build_data,
    build_dataset,
    build_evaluation_sets,
    build_loader,
    check_data,
    check_evaluation,
    dataset_num_classes,
    train_batches,
    train_size,
)
from .evaluation_sets import VAL, EvaluationSet, NumberedImages
from .masks import check_labels
from .registry import published_num_classes

__all__ = [
    "VAL",
    "Checked",
    "Data",
    "EvaluationSet",
    "NumberedImages",
    "build_data",
    "build_dataset",
    "build_evaluation_sets",
    "build_loader",
    "check_data",
    "check_evaluation",
    "check_labels",
    "dataset_num_classes",
    "published_num_classes",
    "train_batches",
    "train_size",
]
