"""How often each class occurs in the files, and the loss weights that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protoseg.data.doctor.facts import FileFacts
from protoseg.data.reading.label_ids import LabelIds


@dataclass(frozen=True)
class ClassRow:
    """One line of the class table."""

    name: str
    pixels: int
    share: float  # of the labelled pixels
    images: int
    median_frequency_weight: float
    inverse_log_weight: float


def class_table(
    facts: Sequence[FileFacts], ids: LabelIds, classes: Sequence[str]
) -> tuple[list[ClassRow], int]:
    """A row for each class, and how many pixels are ignored."""
    count = len(classes)
    pixels, images, extent = (np.zeros(count, dtype=np.int64) for _ in range(3))
    ignored = 0
    for f in facts:
        own = np.zeros(count, dtype=np.int64)
        for raw, number in f.id_counts.items():
            target = ids.target(raw)
            if target == ids.ignore_index:
                ignored += number
            elif target >= 0:
                own[target] += number
        pixels += own
        images += own > 0
        extent += (own > 0) * own.sum()
    columns = (
        pixels.tolist(),
        (pixels / max(1, pixels.sum())).tolist(),
        images.tolist(),
        _median_frequency_weights(pixels, extent),
        _inverse_log_weights(pixels),
    )
    return [ClassRow(*row) for row in zip(classes, *columns)], ignored


def _median_frequency_weights(pixels: NDArray, extent: NDArray) -> list[float]:
    """median(f) / f_c, f_c = share of class c in the images that hold it; 0 for absent classes.

    Source: Eigen, Fergus, "Predicting depth, surface normals and semantic labels", ICCV 2015, section 4.3.2.
    """
    present = pixels > 0
    frequency = pixels[present] / extent[present]
    weights = np.zeros(len(pixels))
    weights[present] = np.median(frequency) / frequency if present.any() else 0
    return [round(float(w), 4) for w in weights]


def _inverse_log_weights(pixels: NDArray) -> list[float]:
    """1 / ln(1.02 + p_c), p_c = share of class c in all labelled pixels.

    Source: Paszke et al., "ENet", arXiv 1606.02147, section 4.
    """
    return [round(float(w), 4) for w in 1 / np.log(1.02 + pixels / max(1, pixels.sum()))]
