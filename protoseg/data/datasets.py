"""Datasets on disk: one spec per dataset, one reader for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from protoseg.config import UserError
from protoseg.data import classes as lists
from protoseg.data import digits
from protoseg.data.decode import IMAGE_ENDINGS, LABEL_ENDINGS, read_image, read_label_ids
from protoseg.data.palette import default_palette

IGNORE = "ignore"  # the word in a label map
Colours = Sequence[tuple[int, int, int]]
LabelMap = Mapping[int, int | str]  # raw id in the file → class id, class name or "ignore"


@dataclass(frozen=True)
class Split:
    """Where one split lies under the root: a stem is a path below the folder without its ending."""

    images: str
    labels: str
    image_endings: tuple[str, ...] = IMAGE_ENDINGS
    label_endings: tuple[str, ...] = LABEL_ENDINGS
    listed: str | None = None  # text file with the stems of the split, one per line; None = all files


@dataclass(frozen=True)
class DatasetSpec:
    """All that sets one dataset apart. `label_map` None means that ids in the files are class ids."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    splits: Mapping[str, Split]
    homepage: str
    ignore_index: int = 255
    label_map: LabelMap | None = field(default=None, repr=False)


def _folder_split(split: str) -> Split:
    return Split(f"images/{split}", f"labels/{split}")


DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(digits.CLASSES, digits.PALETTE, {}, "nothing to get: it is composed on the fly"),
    # Class names, palette and label map of a folder come from the YAML; every sub-folder of images/ is a split.
    "folder": DatasetSpec((), (), {}, "see 'Your own images' in the README"),
    # SegNet tutorial form, 480×360: 0–10 are the classes, 255 (and 11 in the original files) is void.
    "camvid": DatasetSpec(
        lists.CAMVID_CLASSES,
        lists.CAMVID_PALETTE,
        {split: _folder_split(split) for split in ("train", "val", "test")},
        "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/ (11 classes as in the SegNet tutorial)",
        label_map={raw: raw for raw in range(11)} | {11: IGNORE},
    ),
    # ADEChallengeData2016: 0 is "other objects", not evaluated; 1–150 in the order of objectInfo150.txt.
    "ade20k": DatasetSpec(
        lists.ADE20K_CLASSES,
        lists.ADE20K_PALETTE,
        {
            "train": Split("images/training", "annotations/training"),
            "val": Split("images/validation", "annotations/validation"),
        },
        "http://sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)",
        label_map={0: IGNORE} | {raw: raw - 1 for raw in range(1, 151)},
    ),
}


class Dataset(Protocol):
    """What the loaders, the trainer and the figures ask of a dataset."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Unique stem, for messages and file names."""

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (3, H, W) uint8 RGB and label (H, W) of class ids and `ignore_index`, uint8 or int32."""


@dataclass(frozen=True)
class Pairing:
    """The files of one split: stems with both files, and those that lack one."""

    pairs: dict[str, tuple[Path, Path]]
    images_alone: list[Path]
    labels_alone: list[Path]
    listed_without_image: list[str]


def build_dataset(
    name: str,
    *,
    root: str | Path | None,
    split: str,
    classes: Sequence[str] | None = None,
    palette: Colours | None = None,
    ignore_index: int | None = None,
    label_map: LabelMap | None = None,
    exclude: str | Path | None = None,
    seed: int = 0,
) -> Dataset:
    """Dataset `name` of DATASETS, one split or several joined by "+".

    classes, palette, ignore_index and label_map describe a `folder`; the other datasets bring their own. `exclude`
    is a text file with paths of images or labels to leave out, one per line, relative to `root`. `seed` changes
    the scenes of `digits` only. Raises UserError, one line, for anything wrong with the names or the files.
    """
    if name not in DATASETS:
        raise UserError(f"data.name: no dataset '{name}'; use one of {', '.join(DATASETS)}")
    if name == "digits":
        return digits.Digits(split, seed=seed)
    if root is None:
        raise UserError(
            f"data.root: dataset '{name}' needs the folder where it lies; get it: {DATASETS[name].homepage}"
        )
    spec = DATASETS[name]
    if name == "folder":
        spec = _folder_spec(spec, classes, palette, ignore_index, label_map)
    elif any(given is not None for given in (classes, palette, ignore_index, label_map)):
        raise UserError(
            f"data: '{name}' brings its own classes, palette, ignore_index and label_map; "
            "remove them, or use name: folder"
        )
    return FileDataset(name, spec, Path(root), split, exclude)


class FileDataset:
    """Image and label files of one or several splits. The files are paired here and read on demand."""

    def __init__(
        self, name: str, spec: DatasetSpec, root: Path, split: str, exclude: str | Path | None = None
    ) -> None:
        self.classes = spec.classes
        self.palette = spec.palette
        self.ignore_index = spec.ignore_index
        self._ids = LabelIds(spec)
        excluded = _read_excluded(exclude, root)
        self.names: list[str] = []
        self.files: list[tuple[Path, Path]] = []
        parts = split.split("+")
        for part in parts:
            pairing = pair_files(name, spec, root, part, excluded)
            _check_pairing(pairing, part)
            prefix = f"{part}/" if len(parts) > 1 else ""
            self.names += [prefix + stem for stem in pairing.pairs]
            self.files += pairing.pairs.values()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image_file, label_file = self.files[index]
        image = read_image(image_file)
        label = self._ids.to_classes(read_label_ids(label_file), label_file)
        (height, width), (rows, columns) = image.shape[1:], label.shape
        if (height, width) != (rows, columns):
            turned = (
                " (is the photograph turned by its EXIF tag?)" if (height, width) == (columns, rows) else ""
            )
            raise UserError(
                f"{label_file}: label is {columns}×{rows} pixels, its image {image_file} is "
                f"{width}×{height}{turned}; export both at the same size"
            )
        return image, torch.from_numpy(label)


class LabelIds:
    """The map from raw ids to class ids as a look-up table."""

    def __init__(self, spec: DatasetSpec) -> None:
        count, ignored = len(spec.classes), spec.ignore_index
        raw_map: LabelMap = {raw: raw for raw in range(count)} if spec.label_map is None else spec.label_map
        # Small ids stay in one byte, with one value spare to mark what is not in the map.
        small = count < 255 and ignored < 256
        self.dtype = np.uint8 if small else np.int32
        self._unknown = next(v for v in range(255, -1, -1) if v >= count and v != ignored) if small else -1
        self._table = np.full(1 << 16, self._unknown, dtype=self.dtype)
        if 0 <= ignored < len(self._table):
            self._table[ignored] = ignored
        for raw, target in raw_map.items():
            self._table[raw] = ignored if target == IGNORE else target
        self.allowed = np.flatnonzero(self._table != self._unknown)

    def to_classes(self, raw: NDArray[np.integer], path: Path) -> NDArray[np.integer]:
        """Class ids (H, W), uint8 or int32. Raises UserError for an id that is neither mapped nor ignored."""
        if raw.dtype.itemsize > 2:  # Pillow gives 16-bit files as int32
            if raw.size and (raw.min() < 0 or raw.max() >= len(self._table)):
                raise UserError(
                    f"{path}: label ids run from {raw.min()} to {raw.max()}, wants 0 to 65535; is this a label file?"
                )
            raw = raw.astype(np.uint16)
        label = self._table[raw]
        if (label == self._unknown).any():
            found = np.unique(raw)
            strange = found[self._table[found] == self._unknown]
            raise UserError(
                f"{path}: label ids {id_ranges(strange)} are neither mapped nor ignored (ids found {id_ranges(found)}, "
                f"ids allowed {id_ranges(self.allowed)}); add them to data.label_map, or mend the file"
            )
        return label


def id_ranges(ids: Sequence[int] | NDArray[np.integer], longest: int = 12) -> str:
    """Sorted ids in short: "0–10, 255"."""
    runs: list[list[int]] = []
    for value in (int(v) for v in ids):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    text = [f"{a}" if a == b else f"{a}–{b}" for a, b in runs[:longest]]
    return ", ".join(text) + (f", … ({len(ids)} ids)" if len(runs) > longest else "")


def pair_files(
    name: str, spec: DatasetSpec, root: Path, split: str, excluded: frozenset[Path] = frozenset()
) -> Pairing:
    """Finds the files of one split. Raises UserError for a missing root, split or folder."""
    where = _split_of(name, spec, root, split)
    folders = {"images": root / where.images, "labels": root / where.labels}
    for key, folder in folders.items():
        if not folder.is_dir():
            raise UserError(
                f"data.root: {folder} does not exist; '{name}' wants the {key} of split '{split}' there; "
                f"get it: {spec.homepage}"
            )
    images = _stems(folders["images"], where.image_endings, excluded)
    labels = _stems(folders["labels"], where.label_endings, excluded)
    missing: list[str] = []
    if where.listed is not None:
        wanted = _read_stems(root / where.listed, name, spec)
        missing = [stem for stem in wanted if stem not in images]
        images = {stem: images[stem] for stem in wanted if stem in images}
        labels = {stem: labels[stem] for stem in wanted if stem in labels}
    # A file left out takes its partner with it.
    for path in excluded:
        for own, other, folder, endings in (
            (images, labels, folders["images"], where.image_endings),
            (labels, images, folders["labels"], where.label_endings),
        ):
            stem = _stem(path, folder, endings)
            if stem is not None and stem not in own:
                other.pop(stem, None)
    return Pairing(
        {stem: (images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())},
        [images[stem] for stem in sorted(images.keys() - labels.keys())],
        [labels[stem] for stem in sorted(labels.keys() - images.keys())],
        missing,
    )


def _split_of(name: str, spec: DatasetSpec, root: Path, split: str) -> Split:
    if not root.is_dir():
        raise UserError(
            f"data.root: folder {root} does not exist; '{name}' wants its files there; get it: {spec.homepage}"
        )
    if name != "folder":
        if split not in spec.splits:
            raise UserError(
                f"data.split: '{name}' has no split '{split}'; use one of {', '.join(spec.splits)}"
            )
        return spec.splits[split]
    found = (
        sorted(p.name for p in (root / "images").iterdir() if p.is_dir())
        if (root / "images").is_dir()
        else []
    )
    if found and split not in found:
        raise UserError(f"data.split: no folder {root / 'images' / split}; it has {', '.join(found)}")
    return _folder_split(split)


def _stem(path: Path, folder: Path, endings: tuple[str, ...]) -> str | None:
    try:
        below = path.relative_to(folder).as_posix()
    except ValueError:
        return None
    for ending in endings:
        if below.lower().endswith(ending.lower()):
            return below[: -len(ending)]
    return None


def _stems(folder: Path, endings: tuple[str, ...], excluded: frozenset[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        stem = None if path.name.startswith(".") or path in excluded else _stem(path, folder, endings)
        if stem is None:
            continue
        if stem in found:
            raise UserError(f"{path}: has the same stem as {found[stem].name}; keep one of the two")
        found[stem] = path
    return found


def _read_stems(path: Path, name: str, spec: DatasetSpec) -> list[str]:
    try:
        words = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this list of '{name}' ({error.strerror}); get it: {spec.homepage}"
        ) from None
    return words


def _read_excluded(exclude: str | Path | None, root: Path) -> frozenset[Path]:
    if exclude is None:
        return frozenset()
    try:
        lines = Path(exclude).read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"data.exclude: cannot read {exclude} ({error.strerror}); write it with check_data"
        ) from None
    return frozenset(root / line.strip() for line in lines if line.strip() and not line.startswith("#"))


def _check_pairing(pairing: Pairing, split: str) -> None:
    faults = []
    if pairing.images_alone:
        faults.append(f"{len(pairing.images_alone)} image(s) without label ({_first(pairing.images_alone)})")
    if pairing.labels_alone:
        faults.append(f"{len(pairing.labels_alone)} label(s) without image ({_first(pairing.labels_alone)})")
    if pairing.listed_without_image:
        faults.append(
            f"{len(pairing.listed_without_image)} listed name(s) without image ({_first(pairing.listed_without_image)})"
        )
    if faults:
        raise UserError(
            f"split '{split}': {'; '.join(faults)}; add the missing files, or list these under data.exclude"
        )
    if not pairing.pairs:
        raise UserError(f"split '{split}': no images found; is data.root right?")


def _first(items: Sequence[Path] | Sequence[str], count: int = 3) -> str:
    return ", ".join(str(item) for item in items[:count]) + (", …" if len(items) > count else "")


def _folder_spec(
    spec: DatasetSpec,
    classes: Sequence[str] | None,
    palette: Colours | None,
    ignore_index: int | None,
    label_map: LabelMap | None,
) -> DatasetSpec:
    """The spec of a folder from the YAML, with every value checked."""
    if not classes:
        raise UserError("data.classes: a folder dataset needs its class names, in class-id order")
    names = tuple(str(entry) for entry in classes)
    if len(set(names)) < len(names) or IGNORE in names:
        raise UserError(
            f"data.classes: names must differ, and '{IGNORE}' is reserved; got {', '.join(names)}"
        )
    ignored = spec.ignore_index if ignore_index is None else ignore_index
    if not len(names) <= ignored < 1 << 16:
        raise UserError(
            f"data.ignore_index: {ignored} must be outside the class ids 0–{len(names) - 1} and below 65536; "
            "keep 255 and map the raw id in data.label_map"
        )
    colours = default_palette(len(names)) if palette is None else tuple(tuple(colour) for colour in palette)
    if len(colours) != len(names) or any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in colours):
        raise UserError(
            f"data.palette: wants {len(names)} RGB triples of 0–255, one per class; got {len(colours)}"
        )
    if label_map is not None:
        label_map = {_raw_id(raw): _target(raw, target, names) for raw, target in label_map.items()}
    return replace(spec, classes=names, palette=colours, ignore_index=ignored, label_map=label_map)


def _raw_id(raw: object) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not 0 <= raw < 1 << 16:
        raise UserError(f"data.label_map: raw id {raw!r} must be a whole number from 0 to 65535")
    return raw


def _target(raw: int, target: int | str, names: tuple[str, ...]) -> int | str:
    if target == IGNORE:
        return target
    if target in names:
        return names.index(str(target))
    if isinstance(target, int) and 0 <= target < len(names):
        return target
    raise UserError(
        f"data.label_map: raw id {raw} goes to {target!r}, which is no class id 0–{len(names) - 1}, "
        f"no class name and not '{IGNORE}'"
    )
