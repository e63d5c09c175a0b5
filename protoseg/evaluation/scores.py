"""Scores on a labelled split: IoU, accuracy, boundary IoU and calibration, in one pass."""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor

from protoseg.config import Config
from protoseg.data.file_dataset import Dataset
from protoseg.data.loader import EvalLoader
from protoseg.data.tree import LabelTree
from protoseg.evaluation.inference import InferenceSettings, OnBand, Prediction, segment
from protoseg.evaluation.level_scores import level_scores
from protoseg.models.segmenter import Segmenter, autocast
from protoseg.runtime.console import with_bar
from protoseg.runtime.distributed import all_reduce, is_main, rank, world_size
from protoseg.runtime.files import none_if_nan

BINS = 15
BOUNDARY_RATIO = 0.02  # width of the boundary, as a share of the image's diagonal


@dataclass(frozen=True)
class Scores:
    """What is said about a model on a split, all between 0 and 1; counts are summed over images and ranks.

    Classes that occur neither in the labels nor in the predictions have no IoU (NaN) and are left out of the
    mean; classes without labels are left out of mAcc.
    """

    classes: tuple[str, ...]
    confusion: Tensor  # (C, C) int64 pixel counts, row = label, column = prediction
    boundary: Tensor | None = None  # (3, C) int64: boundary pixels of the labels, of the predictions, of both
    bins: Tensor | None = None  # (3, J) double, by confidence: pixels, sum of confidence, right pixels
    unlabelled: tuple[int, ...] = ()  # classes that the data cannot show: a prediction is wrong, IoU is NaN
    tree: LabelTree | None = None
    inner: Tensor | None = None  # (V − C, C) int64, as confusion, of labels that are inner nodes of the tree
    consistency: Tensor | None = None  # (3,) int64, see `ConsistencyCount`

    @property
    def iou(self) -> Tensor:
        """(C,) intersection over union."""
        return self._iou(self.confusion.sum(1), self.confusion.sum(0), self.confusion.diag())

    @property
    def boundary_iou(self) -> Tensor:
        """(C,) IoU of the boundary regions (Cheng et al., CVPR 2021, Eq. 2)."""
        assert self.boundary is not None, "boundaries were not counted"
        return self._iou(*self.boundary)

    def _iou(self, label: Tensor, predicted: Tensor, both: Tensor) -> Tensor:
        iou = both.double() / (label + predicted - both)
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

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al., ICML 2017, Eq. 3): mean |accuracy − confidence| of bins."""
        assert self.bins is not None, "predictions had no confidence"
        pixels, confidence, right = self.bins
        return ((right - confidence).abs().sum() / pixels.sum()).item()

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON; None stands for an undefined value."""
        plain: dict[str, Any] = {
            "mIoU": none_if_nan(self.miou),
            "aAcc": none_if_nan(self.pixel_accuracy),
            "mAcc": none_if_nan(self.accuracy.nanmean().item()),
            "IoU": self._by_class(self.iou),
            "Acc": self._by_class(self.accuracy),
        }
        if self.boundary is not None:
            plain["boundary_mIoU"] = none_if_nan(self.boundary_iou.nanmean().item())
            plain["boundary_IoU"] = self._by_class(self.boundary_iou)
        if self.bins is not None:
            plain["ECE"] = none_if_nan(self.calibration_error)
            plain["reliability"] = dict(zip(("pixels", "confidence", "right"), self.bins.tolist()))
        if self.tree is not None and self.inner is not None:
            plain |= level_scores(torch.cat([self.confusion, self.inner]), self.tree)
        if self.consistency is not None:
            pixels, by_leaf, by_sum = self.consistency.tolist()
            plain["inconsistent"] = by_leaf / pixels if pixels else None
            plain["inconsistent_by_sum"] = by_sum / pixels if pixels else None
        return plain

    def _by_class(self, values: Tensor) -> dict[str, float | None]:
        return dict(zip(self.classes, map(none_if_nan, values.tolist())))


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """(C, C) pixel counts of int64 maps, row = label, column = prediction; ignored pixels are left out."""
    # Here, not above: it brings transformers and half of scipy, three seconds that most commands never need.
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(
        prediction, target, num_classes, ignore_index=ignore_index, validate_args=False
    )


def evaluate(
    predict: Callable[[Tensor, tuple[int, int]], Prediction],
    samples: Iterable[tuple[Tensor, Tensor, int, str]],
    classes: tuple[str, ...],
    ignore_index: int,
    device: torch.device,
    *,
    boundary_ratio: float | None = None,
    tree: LabelTree | None = None,
    on_sample: Callable[[str, Tensor, Tensor, Tensor], None] | None = None,
) -> Scores:
    """Score `predict(image, label size)` on samples (image, label, index, name), summed over ranks.

    Predictions are compared at the label's own size. With `boundary_ratio`, the width of boundaries, these
    and the calibration are counted too, for which predictions need confidences. Labels that are inner nodes
    of `tree` count at their level alone. `on_sample(name, image, label, prediction)` sees every sample, for
    pictures.
    """
    ids = len(classes if tree is None else tree.names)
    confusion = torch.zeros(ids, ids, dtype=torch.long, device=device)  # of all nodes
    boundary = torch.zeros(3, len(classes), dtype=torch.long, device=device)
    bins = torch.zeros(3, BINS, dtype=torch.double, device=device)
    for image, label, _, name in samples:
        target = label.to(device).long()
        prediction = predict(image.to(device), (label.shape[-2], label.shape[-1]))
        confusion += confusion_matrix(prediction.classes, target, ids, ignore_index)
        inner = (target >= len(classes)) & (target != ignore_index)
        target = target.masked_fill(inner, ignore_index)
        predicted = prediction.classes.cpu()
        if boundary_ratio is not None:
            assert prediction.confidence is not None, "calibration needs confidences"
            distance = boundary_distance(label.shape[-2], label.shape[-1], boundary_ratio)
            counts = boundary_counts(
                target.cpu().numpy(), predicted.numpy(), len(classes), ignore_index, distance
            )
            boundary += torch.from_numpy(counts).to(device)
            known = target != ignore_index
            bins += confidence_bins(prediction.confidence[known], (prediction.classes == target)[known])
        if on_sample is not None:
            on_sample(name, image, label, predicted)
    confusion = all_reduce(confusion).cpu()[:, : len(classes)]
    counts_CC, inner = confusion[: len(classes)], confusion[len(classes) :]
    scores = Scores(classes, counts_CC, tree=tree, inner=None if tree is None else inner)
    if boundary_ratio is None:
        return scores
    return replace(scores, boundary=all_reduce(boundary).cpu(), bins=all_reduce(bins).cpu())


def evaluate_segmenter(
    model: Segmenter,
    config: Config,
    dataset: Dataset,
    device: torch.device,
    protocol: InferenceSettings,
    *,
    title: str,
    boundary_ratio: float | None = None,
    tree: LabelTree | None = None,
    on_band: OnBand | None = None,
) -> Scores:
    """`evaluate` of a model on a dataset in its classes, in the precision of its training, on all ranks.

    title: of the progress bar. on_band: see `most_likely`.
    """
    ranks = {"rank": rank(), "world_size": world_size()}
    with (
        closing(EvalLoader(dataset, workers=config.data.workers, **ranks)) as loader,
        autocast(config, device),
    ):
        return evaluate(
            lambda image, size: segment(
                model, image, size, protocol, confidence=boundary_ratio is not None, on_band=on_band
            ),
            with_bar(loader, title, len(loader), shown=is_main()),
            dataset.classes,
            dataset.ignore_index,
            device,
            boundary_ratio=boundary_ratio,
            tree=tree,
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
