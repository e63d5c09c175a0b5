"""What the doctor knows of each file: one parallel pass that reads all of them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from protoseg.data.classes.palette import Palette
from protoseg.data.file_dataset import ReadIds
from protoseg.data.reading.decode import ImageReader, read_label_ids
from protoseg.data.reading.decode import read_image as read_colours
from protoseg.data.reading.value_range import Extremes, extremes
from protoseg.runtime.errors import UserError

COLOUR_MASK = "colour mask"  # the error of a label that holds colours


@dataclass(frozen=True)
class FileFacts:
    """What is kept of one image and its label. Paths are relative to the root."""

    split: str
    image: str
    label: str
    image_error: str = ""
    label_error: str = ""
    image_size: tuple[int, int] = (0, 0)  # height, width
    label_size: tuple[int, int] = (0, 0)
    label_bits: int = 8
    digest: str = ""  # of the image's pixels
    orientation: int = 1  # its EXIF tag
    extremes: Extremes | None = None  # of the image's values
    id_counts: Mapping[int, int] = field(default_factory=dict)  # raw id → pixels
    colours: Palette = ()  # of a label that is a colour mask, the first few


def read_facts(
    root: Path,
    read_image: ImageReader,
    read_ids: ReadIds,
    pairs: Sequence[tuple[str, Path, Path]],  # split, image, label
    threads: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[FileFacts]:
    """Facts about every pair, in order; `on_progress(done, total)` is called after each."""
    facts: list[FileFacts] = []
    with ThreadPoolExecutor(threads) as pool:
        for each in pool.map(lambda pair: _inspect(root, read_image, read_ids, *pair), pairs):
            facts.append(each)
            if on_progress is not None:
                on_progress(len(facts), len(pairs))
    return facts


def _inspect(
    root: Path, read_image: ImageReader, read_ids: ReadIds, split: str, image_file: Path, label_file: Path
) -> FileFacts:
    """Facts about one pair of files; what cannot be read is a fact too."""
    known: dict[str, Any] = {}
    try:
        values, orientation = read_image.pixels(image_file)
        known["image_size"] = values.shape[1:]
        known["digest"] = hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()
        known |= {"orientation": orientation, "extremes": extremes(values)}
    except UserError as error:
        known["image_error"] = str(error).replace(f"{root}/", "")
    try:
        raw = read_ids(label_file)
        known["label_size"] = raw.shape
        known["label_bits"] = raw.dtype.itemsize * 8
        known["id_counts"] = _count(raw)
    except UserError as error:
        known["label_error"] = str(error).replace(f"{root}/", "")
        if COLOUR_MASK in known["label_error"] and read_ids is read_label_ids:
            known |= {"label_error": COLOUR_MASK, "colours": _colours(label_file)}
    return FileFacts(split, below(root, image_file), below(root, label_file), **known)


def _count(raw: np.ndarray) -> dict[int, int]:
    if raw.dtype == np.uint8:  # many times faster than sorting
        counts = np.bincount(raw.ravel(), minlength=256)
        values, counts = np.flatnonzero(counts), counts[counts > 0]
    else:
        values, counts = np.unique(raw, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist()))


def _colours(path: Path) -> Palette:
    pixels = rearrange(read_colours(path), "c h w -> (h w) c")
    few = torch.unique(pixels[:: max(1, len(pixels) // 20000)], dim=0)[:64]
    return tuple((r, g, b) for r, g, b in few.tolist())


def below(root: Path, path: Path) -> str:
    """The path relative to the root, as text."""
    return path.relative_to(root).as_posix()
