"""Scores on a labelled split: IoU, accuracy, boundary IoU and calibration, in one pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from protoseg.evaluation.inference import Prediction
from protoseg.runtime.distributed import all_reduce


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


BINS = 15
BOUNDARY_RATIO = 0.02  # width of the boundary, as a share of the image's diagonal


@dataclass(frozen=True)
class Measures:
    """Everything that is said about a model on a split; counts are summed over images and ranks."""

    scores: Scores
    boundary: Tensor  # (3, C) int64: boundary pixels of the labels, of the predictions, of both
    bins: Tensor  # (3, J) double, by confidence: pixels, sum of confidence, rightly classified pixels

    @property
    def boundary_iou(self) -> Tensor:
        """(C,) IoU of the boundary regions (Cheng et al., CVPR 2021, Eq. 2); NaN for absent classes."""
        label, predicted, both = self.boundary.double()
        iou = both / (label + predicted - both)
        return iou.index_fill(0, torch.tensor(self.scores.unlabelled, dtype=torch.long), torch.nan)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al., ICML 2017, Eq. 3): mean |accuracy − confidence| of bins."""
        pixels, confidence, right = self.bins
        return ((right - confidence).abs().sum() / pixels.sum()).item()

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON; None stands for an undefined value."""
        iou = self.boundary_iou
        return {
            **self.scores.to_plain(),
            "boundary_mIoU": none_if_nan(iou.nanmean().item()),
            "boundary_IoU": dict(zip(self.scores.classes, map(none_if_nan, iou.tolist()))),
            "ECE": none_if_nan(self.calibration_error),
            "reliability": {
                name: values.tolist() for name, values in zip(("pixels", "confidence", "right"), self.bins)
            },
        }


def measure(
    segment: Callable[[Tensor, tuple[int, int]], Prediction],
    samples: Iterable[tuple[Tensor, Tensor, int, str]],
    classes: tuple[str, ...],
    ignore_index: int,
    device: torch.device,
    boundary_ratio: float = BOUNDARY_RATIO,
) -> Measures:
    """All scores of `segment(image, label size)`, whose predictions have confidences, summed over ranks."""
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.long, device=device)
    boundary = torch.zeros(3, len(classes), dtype=torch.long)
    bins = torch.zeros(3, BINS, dtype=torch.double, device=device)
    for image, label, _, _ in samples:
        target = label.to(device).long()
        prediction = segment(image.to(device), (label.shape[-2], label.shape[-1]))
        assert prediction.confidence is not None, "measure needs confidences"
        confusion += confusion_matrix(prediction.classes, target, len(classes), ignore_index)
        counts = boundary_counts(
            target.cpu().numpy(),
            prediction.classes.cpu().numpy(),
            len(classes),
            ignore_index,
            boundary_distance(label.shape[-2], label.shape[-1], boundary_ratio),
        )
        boundary += torch.from_numpy(counts)
        known = target != ignore_index
        bins += confidence_bins(prediction.confidence[known], (prediction.classes == target)[known])
    return Measures(
        Scores(classes, all_reduce(confusion).cpu()),
        all_reduce(boundary.to(device)).cpu(),
        all_reduce(bins).cpu(),
    )


def boundary_distance(height: int, width: int, ratio: float = BOUNDARY_RATIO) -> int:
    """Width of the boundary in pixels, at least 1."""
    return max(1, round(ratio * (height**2 + width**2) ** 0.5))


def boundary_region(label: NDArray, distance: int) -> NDArray[np.bool_]:
    """(H, W): pixels within `distance` of another class or of the image's rim, on their own class's side.

    Distance counts diagonal steps as one, as the published code does, which erodes each class's mask by 3×3
    squares. A square of one class has equal minimum and maximum: that serves all classes at once.
    """
    side = 2 * distance + 1
    # Outside counts as class −1, which no pixel has.
    lowest = minimum_filter(label, side, mode="constant", cval=-1)
    return lowest != maximum_filter(label, side, mode="constant", cval=-1)


def boundary_counts(
    label: NDArray, prediction: NDArray, num_classes: int, ignore_index: int, distance: int
) -> NDArray[np.int64]:
    """(3, C) boundary pixels of the label, of the prediction, and of both, by class.

    Ignored pixels are ignored in the prediction too: there both have the same edge.
    """
    known = label != ignore_index
    label, prediction = label.astype(np.int32), np.where(known, prediction, ignore_index).astype(np.int32)
    in_label = known & boundary_region(label, distance)
    in_prediction = known & boundary_region(prediction, distance)
    both = in_label & in_prediction & (label == prediction)
    pairs = ((label, in_label), (prediction, in_prediction), (label, both))
    return np.stack([np.bincount(ids[region], minlength=num_classes) for ids, region in pairs])


def confidence_bins(confidence: Tensor, right: Tensor) -> Tensor:
    """(3, J) pixels, sum of confidence and right pixels in J equal bins of confidence (N,) in 0…1."""
    index = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    rows = (torch.ones_like(confidence), confidence, right)
    return torch.stack([torch.bincount(index, row.double(), minlength=BINS) for row in rows])
