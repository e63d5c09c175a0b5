"""Scores on a labelled split: a function of `predict` that returns named numbers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from protoseg.distributed import all_reduce


@dataclass(frozen=True)
class Scores:
    """Segmentation scores, all between 0 and 1.

    Classes that occur neither in the labels nor in the predictions have no IoU (NaN) and are left out of the
    mean; classes without labels are left out of mAcc.
    """

    classes: tuple[str, ...]
    confusion: Tensor  # (C, C) int64 pixel counts, row = label, column = prediction
    unlabelled: tuple[int, ...] = ()  # classes that the data cannot show: a prediction is wrong, IoU is NaN

    @property
    def iou(self) -> Tensor:
        """(C,) intersection over union."""
        hit = self.confusion.diag().double()
        iou = hit / (self.confusion.sum(0) + self.confusion.sum(1) - hit)
        return iou.index_fill(0, torch.tensor(self.unlabelled, dtype=torch.long), torch.nan)

    @property
    def accuracy(self) -> Tensor:
        """(C,) share of a class's labelled pixels that were found."""
        return self.confusion.diag().double() / self.confusion.sum(1)

    @property
    def miou(self) -> float:
        return self.iou.nanmean().item()

    @property
    def pixel_accuracy(self) -> float:
        return (self.confusion.diag().sum() / self.confusion.sum()).item()

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON; None stands for an undefined value."""
        return {
            "mIoU": none_if_nan(self.miou),
            "aAcc": none_if_nan(self.pixel_accuracy),
            "mAcc": none_if_nan(self.accuracy.nanmean().item()),
            "IoU": dict(zip(self.classes, map(none_if_nan, self.iou.tolist()))),
            "Acc": dict(zip(self.classes, map(none_if_nan, self.accuracy.tolist()))),
        }


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """(C, C) pixel counts of int64 maps, row = label, column = prediction; ignored pixels are left out."""
    return multiclass_confusion_matrix(
        prediction, target, num_classes, ignore_index=ignore_index, validate_args=False
    )


def evaluate(
    predict: Callable[[Tensor, tuple[int, int]], Tensor],
    samples: Iterable[tuple[Tensor, Tensor, int, str]],
    classes: tuple[str, ...],
    ignore_index: int,
    device: torch.device,
    on_sample: Callable[[int, str, Tensor, Tensor, Tensor], None] | None = None,
) -> Scores:
    """Score `predict(image, label size)` on samples (image, label, index, name), summed over ranks.

    Predictions are compared at the label's own size. `on_sample(index, name, image, label, prediction)` sees
    every sample, for pictures.
    """
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.long, device=device)
    for image, label, index, name in samples:
        target = label.to(device).long()
        prediction = predict(image.to(device), (label.shape[-2], label.shape[-1]))
        confusion += confusion_matrix(prediction, target, len(classes), ignore_index)
        if on_sample is not None:
            on_sample(index, name, image, label, prediction.cpu())
    return Scores(classes, all_reduce(confusion).cpu())
