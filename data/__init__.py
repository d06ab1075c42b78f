"""Images and labels: formats on disk, sampling over epochs and processes, transforms, batches."""

from .build import Data, build_data, build_dataset, build_loader, dataset_num_classes

__all__ = ["Data", "build_data", "build_dataset", "build_loader", "dataset_num_classes"]
