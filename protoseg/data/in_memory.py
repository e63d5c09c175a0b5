"""Decoded images and labels in memory, where processors cannot decode as fast as a GPU trains."""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch

from protoseg.data.file_dataset import Dataset, DatasetView
from protoseg.runtime.errors import UserError

SAMPLED = 16  # images whose size stands for all
THREADS = 8


class InMemoryDataset(DatasetView):
    """A dataset that has been read already; a loader's workers share it. Never change a sample in place.

    What could not be read is tried again when it is asked for, so that the loader deals with it.
    """

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        with ThreadPoolExecutor(THREADS) as pool:
            self.samples = list(pool.map(self._read_if_possible, range(len(dataset))))

    def _read_if_possible(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        try:
            return self.dataset.read(index)
        except UserError:
            return None

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.samples[index] or self.dataset.read(index)

    def label(self, index: int) -> torch.Tensor:
        sample = self.samples[index]
        return self.dataset.label(index) if sample is None else sample[1]


def megabytes(dataset: Dataset) -> float:
    """What the decoded samples take, judged by some that lie evenly among them; 0 if none can be read."""
    sizes = []
    for index in islice(range(0, len(dataset), max(len(dataset) // SAMPLED, 1)), SAMPLED):
        try:
            sizes.append(sum(x.nbytes for x in dataset.read(index)))
        except UserError:
            continue
    return len(dataset) * sum(sizes) / max(len(sizes), 1) / 1e6


def in_memory(dataset: Dataset, most_mb: float) -> tuple[Dataset, str]:
    """The dataset read into memory if it takes at most `most_mb`, else itself; and a line that says which."""
    needed = megabytes(dataset)
    if needed > most_mb:
        return dataset, (
            f"data.cache_mb: {len(dataset)} decoded images would take about {needed:,.1f} MB, {most_mb:g} are"
            " allowed; they are read from their files in every epoch"
        )
    return InMemoryDataset(
        dataset
    ), f"data.cache_mb: {len(dataset)} decoded images in memory, {needed:,.1f} MB"
