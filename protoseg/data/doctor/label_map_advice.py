"""The ids that the files hold, and a label map that would make them fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protoseg.data.doctor.facts import FileFacts
from protoseg.data.reading.label_ids import IGNORE, LabelIds, LabelMap

MOST_IGNORED = 0.1  # of the pixels: advice never gives up more


@dataclass(frozen=True)
class IdRow:
    """One id of the label files."""

    raw_id: int
    pixels: int
    share: float
    images: int
    meaning: str  # class name, "ignore", or "?" where it is neither mapped nor ignored


@dataclass(frozen=True)
class Advice:
    """A label map to confirm, and what it gives up."""

    label_map: LabelMap
    ignored_share: float  # of all pixels, by ids that it sends to ignore


def id_table(facts: Sequence[FileFacts], ids: LabelIds, classes: Sequence[str]) -> list[IdRow]:
    """A row for each id, in order."""
    pixels: dict[int, int] = {}
    images: dict[int, int] = {}
    for f in facts:
        for raw, count in f.id_counts.items():
            pixels[raw] = pixels.get(raw, 0) + count
            images[raw] = images.get(raw, 0) + 1
    total = max(1, sum(pixels.values()))
    rows = []
    for raw in sorted(pixels):
        target = ids.target(raw)
        meaning = "?" if target == -1 else IGNORE if target == ids.ignore_index else classes[target]
        rows.append(IdRow(raw, pixels[raw], pixels[raw] / total, images[raw], meaning))
    return rows


def advise_label_map(rows: Sequence[IdRow], ids: LabelIds, count: int) -> Advice | None:
    """A label map that would make the ids found fit; None where they fit already, or no map is plain.

    Plain are: ids that were stretched, ids from 1 (with 0 for nothing), as many ids as classes, and a few
    pixels of strange ids among right ones. None may give up more than a tenth of the pixels.
    """
    every = [row.raw_id for row in rows]
    binary = every == [0, 255] and count >= 2 and not ids.is_class(255)
    if not binary and all(row.meaning != "?" for row in rows):
        return None
    label_map = {0: 0, 255: 1} if binary else _plain_map(every, ids.ignore_index, count)
    given_up = {raw for raw, target in label_map.items() if target == IGNORE and raw != ids.ignore_index}
    share = sum(row.share for row in rows if row.raw_id in given_up)
    return Advice(label_map, share) if share <= MOST_IGNORED else None


def _plain_map(every: Sequence[int], ignore_index: int, count: int) -> dict[int, int | str]:
    values = [v for v in every if v != ignore_index]
    step = stretch_factor(every, ignore_index, count)
    if step > 1:
        return {v: v // step if v // step < count else IGNORE for v in values}
    if max(values, default=0) == count:  # every id, since a rare class may be missing in these files
        return {**({0: IGNORE} if 0 in values else {}), **{v: v - 1 for v in range(1, count + 1)}}
    for fitting in (values, every):  # the ignored id may be a class after all
        if len(fitting) == count:
            return {raw: target for target, raw in enumerate(fitting)}
    return {v: v if v < count else IGNORE for v in values}


def stretch_factor(every: Sequence[int], ignore_index: int, count: int) -> int:
    """The factor by which ids were multiplied, 1 if they were not."""
    # The ignored id is stretched like the others, or left alone.
    values = [v for v in every if v not in (0, ignore_index, ignore_index * 257)]
    step = int(np.gcd.reduce(values)) if values else 1
    return step if len(values) > 1 and step > 1 and max(values) // step < count else 1
