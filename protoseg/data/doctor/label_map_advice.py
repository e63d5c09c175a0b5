"""Which label map would make the ids in the files fit."""

from collections.abc import Sequence

import numpy as np

from protoseg.data.doctor.facts import FileFacts
from protoseg.data.reading.label_ids import IGNORE, LabelIds, LabelMap


def advise_label_map(facts: Sequence[FileFacts], ids: LabelIds, count: int) -> LabelMap | None:
    """A label map that would make the ids found fit, None where they fit already or cannot."""
    every = sorted({raw for f in facts for raw in f.id_counts})
    if every == [0, 255] and count >= 2 and not ids.is_class(255):
        return {0: 0, 255: 1}
    if not set(every) - set(ids.allowed.tolist()) or len(every) > 4 * count + 40:
        return None
    step = stretch_factor(every, ids.ignore_index, count)
    values = [v for v in every if v != ids.ignore_index]
    if step > 1:
        return {v: v // step if v // step < count else IGNORE for v in values}
    if max(values) == count:  # every id, since a rare class may be missing in these files
        return {**({0: IGNORE} if 0 in values else {}), **{v: v - 1 for v in range(1, count + 1)}}
    return {v: v if v < count else IGNORE for v in values}


def stretch_factor(every: Sequence[int], ignore_index: int, count: int) -> int:
    """The factor by which ids were multiplied, 1 if they were not."""
    # The ignored id is stretched like the others, or left alone.
    values = [v for v in every if v not in (0, ignore_index, ignore_index * 257)]
    step = int(np.gcd.reduce(values)) if values else 1
    return step if len(values) > 1 and step > 1 and max(values) // step < count else 1
