"""Datasets, augmentation and loaders."""

from protoseg.data.datasets import DATASETS, Dataset, build_dataset, class_names
from protoseg.data.loader import Batch, eval_loader, train_loader
from protoseg.data.transforms import TrainTransform

__all__ = [
    "DATASETS",
    "Batch",
    "Dataset",
    "TrainTransform",
    "build_dataset",
    "class_names",
    "eval_loader",
    "train_loader",
]
