"""The order in which an epoch visits the samples: uniform, or with rare classes more often.

N samples, C classes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from protoseg.data.file_dataset import Dataset
from protoseg.runtime.errors import UserError

EpochOrder = Callable[[int], NDArray[np.int64]]  # epoch → (N,) sample indices


def uniform_order(length: int, seed: int) -> EpochOrder:
    """Every sample once per epoch, in another order each time."""
    return lambda epoch: np.random.default_rng((seed, epoch)).permutation(length)


def rare_class_order(counts_NC: NDArray[np.int64], temperature: float, seed: int) -> EpochOrder:
    """Draws a class by P(c) ∝ exp((1 − f_c) / temperature), then a sample that holds it; N draws per epoch.

    counts_NC: pixels of each class in each sample; f_c: the class's share of all labelled pixels. The smaller
    the temperature, the more often rare classes. Classes without pixels are never drawn.
    Source: Hoyer, Dai, Van Gool, "DAFormer", CVPR 2022, "Rare Class Sampling".
    """
    pixels = counts_NC.sum(0)
    if not pixels.any():
        raise UserError("data: rare-class sampling finds no labelled pixel; is the label_map right?")
    present = np.flatnonzero(pixels)
    logits = (1 - pixels[present] / pixels.sum()) / temperature
    chance = np.exp(logits - logits.max())
    chance /= chance.sum()
    holders = [np.flatnonzero(counts_NC[:, c]) for c in present]

    def order(epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((seed, epoch))
        drawn = rng.choice(len(present), size=len(counts_NC), p=chance)
        return np.array([rng.choice(holders[c]) for c in drawn])

    return order


def count_classes(dataset: Dataset, skip_unreadable: bool = False, threads: int = 4) -> NDArray[np.int64]:
    """(N, C) pixels of each class in each sample, from one parallel pass over the labels.

    Raises UserError for an unreadable label, or counts nothing for it where `skip_unreadable`.
    """

    def count(index: int) -> NDArray[np.int64]:
        try:
            label = dataset.label(index).numpy()
        except UserError:
            if skip_unreadable:
                return np.zeros(len(dataset.classes), dtype=np.int64)
            raise
        counts = np.bincount(label[label != dataset.ignore_index], minlength=len(dataset.classes))
        return counts[: len(dataset.classes)]  # what follows are inner nodes of a label tree

    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(count, range(len(dataset)))))
