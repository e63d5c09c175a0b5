"""Samples read from image and label files."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from protoseg.data.classes.palette import Palette
from protoseg.data.reading.decode import ImageReader
from protoseg.data.reading.label_ids import LabelIds
from protoseg.runtime.errors import UserError, in_short

ReadIds = Callable[[Path], NDArray[np.integer]]  # label file → (H, W) raw ids


class Dataset(Protocol):
    """What the loaders, the trainer and the figures ask of a dataset."""

    classes: tuple[str, ...]
    palette: Palette
    ignore_index: int

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Unique stem, for messages and file names."""

    def stamp(self, index: int) -> str:
        """Another text for another image, without reading it."""

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (3, H, W) uint8 RGB and label (H, W) of class ids and `ignore_index`, uint8 or int32."""

    def label(self, index: int) -> torch.Tensor:
        """The label alone, without decoding the image."""


class FileDataset:
    """Pairs of an image and a label file, read on demand. `files[i]` are the two paths of sample i."""

    def __init__(
        self,
        files: dict[str, tuple[Path, Path]],  # by name
        classes: tuple[str, ...],
        palette: Palette,
        ids: LabelIds,
        read_ids: ReadIds,
        read_image: ImageReader,
    ) -> None:
        self.names = list(files)
        self.files = list(files.values())
        self.classes = classes
        self.palette = palette
        self.ignore_index = ids.ignore_index
        self._ids = ids
        self._read_ids = read_ids
        self.read_image = read_image

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.names[index]

    def stamp(self, index: int) -> str:
        file = self.files[index][0].stat()
        return f"{self.names[index]}, {file.st_size} bytes of {file.st_mtime_ns}, {self.read_image}"

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image_file, label_file = self.files[index]
        image, label = self.read_image(image_file), self.label(index)
        check_sizes(image.shape[1:], label.shape, image_file, label_file, self.read_image)
        return image, label

    def label(self, index: int) -> torch.Tensor:
        label_file = self.files[index][1]
        return torch.from_numpy(self._ids.to_classes(self._read_ids(label_file), label_file))


class DatasetView:
    """Another dataset's samples in another form; what a subclass does not say is as it is there."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.classes, self.palette = dataset.classes, dataset.palette
        self.ignore_index = dataset.ignore_index

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def stamp(self, index: int) -> str:
        return self.dataset.stamp(index)

    def label(self, index: int) -> torch.Tensor:
        return self.dataset.label(index)


class RenumberedDataset(DatasetView):
    """A dataset in the class ids of another list, matched by name; classes that are not in it are ignored."""

    def __init__(self, dataset: Dataset, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
        super().__init__(dataset)
        self.classes = tuple(classes)
        self.palette = tuple((r, g, b) for r, g, b in palette)
        self.ignore_index = max(dataset.ignore_index, len(classes))
        dtype = torch.uint8 if self.ignore_index < 256 else torch.int32
        ids = [classes.index(name) if name in classes else self.ignore_index for name in dataset.classes]
        others = dataset.ignore_index + 1 - len(ids)  # inner nodes of a label tree, and what is ignored
        self._ids = torch.tensor([*ids, *[self.ignore_index] * others], dtype=dtype)

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.dataset.read(index)
        return image, self._renumbered(label)

    def label(self, index: int) -> torch.Tensor:
        return self._renumbered(self.dataset.label(index))

    def _renumbered(self, label: torch.Tensor) -> torch.Tensor:
        return self._ids[label.long()]


def with_classes(dataset: Dataset, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> Dataset:
    """The dataset in the class ids of a model that has these classes; itself if it has the same list.

    Errors: UserError if no class has the same name in both.
    """
    if list(dataset.classes) == list(classes):
        return dataset
    if not set(dataset.classes) & set(classes):
        raise UserError(
            f"data: none of its classes ({in_short(dataset.classes)}) is one of the model's"
            f" ({in_short(classes)}); classes are matched by name, use data with the model's names"
        )
    return RenumberedDataset(dataset, classes, palette)


def check_sizes(
    image: tuple[int, ...],
    label: tuple[int, ...],
    image_file: Path,
    label_file: Path,
    read_image: ImageReader,
) -> None:
    """Raises UserError where (height, width) of an image and its label differ."""
    if tuple(image) == tuple(label):
        return
    advice = "export both at the same size"
    if tuple(image) == tuple(label[::-1]):
        other = replace(read_image, upright=not read_image.upright).pixels(image_file)
        advice = turned_advice(read_image.upright, other.values.shape[1:] == tuple(label))
    raise UserError(
        f"{label_file}: label is {label[1]} x {label[0]} pixels, its image {image_file} is "
        f"{image[1]} x {image[0]}; {advice}"
    )


def turned_advice(upright: bool, other_fits: bool) -> str:
    """What to do where an image is turned against its label; `other_fits`: its EXIF tag decides."""
    if not other_fits:
        return "one of the two is turned and the image has no EXIF tag that says so: export them alike"
    if upright:
        return "the label fits the image as it was before its EXIF tag turned it: say data.exif: ignore"
    return "the label fits the image as its EXIF tag turns it: say data.exif: apply"
