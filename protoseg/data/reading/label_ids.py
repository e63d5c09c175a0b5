"""From the raw ids in label files to class ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protoseg.runtime.errors import UserError

IGNORE = "ignore"  # the word in a label map
LabelMap = Mapping[int, int | str]  # raw id in the file → class id or "ignore"


class LabelIds:
    """The map from raw ids to class ids as a look-up table."""

    def __init__(self, count: int, ignored: int, label_map: LabelMap | None) -> None:
        """`count` classes; `label_map` None means that ids in the files are class ids."""
        if label_map is None:
            label_map = {raw: raw for raw in range(count)}
        self.ignore_index = ignored
        # Small ids stay in one byte, with one value spare to mark what is not in the map.
        small = count < 255 and ignored < 256
        self.dtype = np.uint8 if small else np.int32
        self._unknown = next(v for v in range(255, -1, -1) if v >= count and v != ignored) if small else -1
        self._table = np.full(1 << 16, self._unknown, dtype=self.dtype)
        if 0 <= ignored < len(self._table):
            self._table[ignored] = ignored
        for raw, target in label_map.items():
            self._table[raw] = ignored if target == IGNORE else target
        self.allowed = np.flatnonzero(self._table != self._unknown)
        self._bytes = self._table[:256].tobytes() if small else b""

    def target(self, raw: int) -> int:
        """Class id or ignore index of one raw id, -1 where it is not in the map."""
        inside = 0 <= raw < len(self._table) and self._table[raw] != self._unknown
        return int(self._table[raw]) if inside else -1

    def is_class(self, raw: int) -> bool:
        return self.target(raw) not in (-1, self.ignore_index)

    def to_classes(self, raw: NDArray[np.integer], path: Path) -> NDArray[np.integer]:
        """Class ids (H, W), uint8 or int32. Raises UserError for an id that is neither mapped nor ignored."""
        if raw.dtype.itemsize > 2:  # Pillow gives 16-bit files as int32
            low, high = int(raw.min()), int(raw.max())
            if low < 0 or high >= len(self._table):
                raise UserError(
                    f"{path}: ids run from {low} to {high}, wants 0 to 65535; is this a label file?"
                )
            raw = raw.astype(np.uint16)
        if raw.dtype == np.uint8 and self._bytes:  # four times as fast as indexing
            label = np.frombuffer(bytearray(raw).translate(self._bytes), np.uint8).reshape(raw.shape)
        else:
            label = self._table[raw]
        if (label == self._unknown).any():
            found = np.unique(raw)
            strange = found[self._table[found] == self._unknown]
            raise UserError(
                f"{path}: label ids {id_ranges(strange)} are neither mapped nor ignored "
                f"(ids found {id_ranges(found)}, ids allowed {id_ranges(self.allowed)}); "
                "add them to data.label_map, or mend the file"
            )
        return label


def export_ids(classes: Sequence[str], label_map: LabelMap | None) -> NDArray[np.int64]:
    """(C,) the raw id of each class, for test servers that want the dataset's own ids.

    Errors: UserError where the map leads to a class from no id.
    """
    if label_map is None:
        return np.arange(len(classes))
    raw_of = {target: raw for raw, target in reversed(list(label_map.items())) if target != IGNORE}
    missing = [name for target, name in enumerate(classes) if target not in raw_of]
    if missing:
        raise UserError(f"data.label_map: no id of the files leads to class {missing[0]}; add one")
    return np.array([raw_of[target] for target in range(len(classes))])


def id_ranges(ids: Sequence[int] | NDArray[np.integer], longest: int = 12) -> str:
    """Sorted ids in short: "0-10, 255"."""
    runs: list[list[int]] = []
    for value in (int(v) for v in ids):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    text = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs[:longest]]
    return ", ".join(text) + (f", … ({len(ids)} ids)" if len(runs) > longest else "")
