"""Batches in an order that depends on (seed, epoch, index) alone: not on workers, ranks or resuming."""

import signal
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from protoseg.config import DataConfig
from protoseg.data.file_dataset import Dataset
from protoseg.data.order import EpochOrder, count_classes, rare_class_order, uniform_order
from protoseg.runtime.errors import UserError

Transform = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Key = tuple[int, int, int]  # epoch, dataset index, how often the epoch has had it before
SKIP_TRIES = 20


class Batch(NamedTuple):
    """Training batch of one rank, on the CPU."""

    image: Any  # (B, 3, H, W) uint8 RGB; or a frozen backbone's maps, a list
    label: torch.Tensor  # (B, H, W) class ids and ignore_index, uint8 or int32
    index: torch.Tensor  # type: ignore[assignment]  # (B,) int64, which samples; hides tuple.index


class _Bad(NamedTuple):
    """A sample that could not be read, on its way from a worker to the main process."""

    message: str


class _Sample(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor
    number: int
    skipped: tuple[str, ...]


class BatchOrder(Sampler[list[Key]]):
    """Keys of the batches start … iterations−1 for one rank.

    The stream is one order per epoch, end to end; batch i takes positions i·B … (i+1)·B−1 of it and rank r
    the r-th contiguous part of the batch.
    """

    def __init__(
        self,
        order: EpochOrder,
        length: int,
        *,
        batch_size: int,
        iterations: int,
        start: int,
        rank: int,
        world_size: int,
    ) -> None:
        if batch_size % world_size:
            raise UserError(
                f"data.batch_size: {batch_size} does not divide by {world_size} processes; "
                f"use {batch_size // world_size * world_size or world_size}"
            )
        self.order, self.length = order, length
        self.batch_size, self.iterations, self.start = batch_size, iterations, start
        self.share = batch_size // world_size
        self.offset = rank * self.share
        self._epoch, self._keys = -1, [(0, 0, 0)]

    def __len__(self) -> int:
        return max(0, self.iterations - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        for iteration in range(self.start, self.iterations):
            first = iteration * self.batch_size + self.offset
            yield [self._key(position) for position in range(first, first + self.share)]

    def _key(self, position: int) -> Key:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            before: Counter[int] = Counter()
            self._epoch, self._keys = epoch, []
            for index in self.order(epoch).tolist():
                self._keys.append((epoch, index, before[index]))
                before[index] += 1
        return self._keys[place]


class _Augmented(TorchDataset):
    """Reads and augments one sample, with the RNG of that sample."""

    def __init__(self, dataset: Dataset, transform: Transform, seed: int, skip: bool) -> None:
        self.dataset, self.transform, self.seed, self.skip = dataset, transform, seed, skip

    def __getitem__(self, key: Key) -> "_Sample | _Bad":
        epoch, index, repeat = key
        skipped: list[str] = []
        for _ in range(SKIP_TRIES if self.skip else 1):
            try:
                image, label = self.dataset.read(index)
            except UserError as error:
                skipped.append(str(error))
                index = (index + 1) % len(self.dataset)
                continue
            state = np.random.SeedSequence((self.seed, epoch, index, repeat)).generate_state(1, np.uint64)
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(int(state[0]))
                image, label = self.transform(image, label)
            return _Sample(image, label, index, tuple(skipped))
        return _Bad(skipped[0])


class _Plain(TorchDataset):
    """Reads one sample as it is."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> "tuple[torch.Tensor, torch.Tensor, int, str] | _Bad":
        try:
            image, label = self.dataset.read(index)
        except UserError as error:
            return _Bad(str(error))
        return image, label, index, self.dataset.name(index)


def train_loader(
    dataset: Dataset,
    transform: Transform,
    data: DataConfig,
    *,
    iterations: int,
    start: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch, None, None]:
    """The batches start … iterations−1 of a run, this rank's share of each.

    `data.batch_size` is over all ranks. `transform(image, label)` must return one size and take all chance
    from torch's global RNG, which is seeded by (seed, epoch, index) for each sample and left as it was.
    `data.rare_class_temperature` reads all labels first. `data.on_error`: "raise" passes on the UserError of
    an unreadable sample, "skip" takes the next readable sample instead and warns once per file.
    A batch size that does not divide by the ranks is a UserError.
    """
    skip = data.on_error == "skip"
    if data.rare_class_temperature is None:
        epoch_order = uniform_order(len(dataset), seed)
    else:
        epoch_order = rare_class_order(count_classes(dataset, skip), data.rare_class_temperature, seed)
    order = BatchOrder(
        epoch_order,
        len(dataset),
        batch_size=data.batch_size,
        iterations=iterations,
        start=start,
        rank=rank,
        world_size=world_size,
    )
    loader: DataLoader = DataLoader(
        _Augmented(dataset, transform, seed, skip),
        batch_sampler=order,
        collate_fn=_collate,
        **_worker_options(data.workers),
    )
    return _checked_batches(loader)


def _checked_batches(loader: DataLoader) -> Generator[Batch, None, None]:
    warned: set[str] = set()
    for loaded in loader:
        if isinstance(loaded, _Bad):
            raise UserError(loaded.message)
        batch, skipped = loaded
        for message in skipped:
            if message not in warned:
                warned.add(message)
                warnings.warn(f"skipped: {message}", stacklevel=2)
        yield batch


class EvalLoader:
    """Yields (image (3, H, W) uint8, label (H, W), index, name) in dataset order, any size, no augmentation.

    This rank's share: samples rank, rank + world_size, … Keep the object: its workers stay alive from one
    pass to the next. UserError if a file is unreadable.
    """

    def __init__(self, dataset: Dataset, *, workers: int, rank: int = 0, world_size: int = 1) -> None:
        self.loader: DataLoader = DataLoader(
            _Plain(dataset),
            batch_size=None,
            sampler=range(rank, len(dataset), world_size),
            persistent_workers=workers > 0,
            **_worker_options(workers),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def close(self) -> None:
        """End the workers; a loader that is left open keeps the process from exiting."""
        self.loader._iterator = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, str]]:
        for loaded in self.loader:
            if isinstance(loaded, _Bad):
                raise UserError(loaded.message)
            yield loaded


def _collate(samples: "list[_Sample | _Bad]") -> "tuple[Batch, tuple[str, ...]] | _Bad":
    good: list[_Sample] = []
    for sample in samples:
        if isinstance(sample, _Bad):
            return sample
        good.append(sample)
    batch = Batch(
        torch.stack([sample.image for sample in good]),
        torch.stack([sample.label for sample in good]),
        torch.tensor([sample.number for sample in good]),
    )
    return batch, tuple(message for sample in good for message in sample.skipped)


def _worker_options(workers: int) -> dict:
    # Its own generator: by default each pass would draw a number from the global RNG.
    options: dict = {
        "num_workers": workers,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),
    }
    if workers:
        options |= {"worker_init_fn": _start_worker, "prefetch_factor": 4}
    return options


def _start_worker(_: int) -> None:
    """Ctrl-C and SIGTERM often reach the whole process group, but the main process still needs the batches to
    leave cleanly. Workers therefore end with their loader alone: whoever opens one closes it, or
    multiprocessing would wait for them for ever at exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
