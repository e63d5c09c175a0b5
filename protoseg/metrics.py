"""Scores beyond IoU, for `tools/evaluate.py`: boundary IoU and calibration.

C classes, J bins; (H, W) pixels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor

from protoseg.distributed import all_reduce
from protoseg.evaluate import Scores, confusion_matrix, none_if_nan
from protoseg.inference import Prediction

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
