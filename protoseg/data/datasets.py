"""Datasets on disk: one spec per dataset, one reader for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from protoseg.config import UserError
from protoseg.data import classes as lists
from protoseg.data import digits
from protoseg.data.decode import read_image, read_label_ids
from protoseg.data.label_ids import IGNORE, LabelIds, LabelMap
from protoseg.data.pairing import Split, check_pairing, pair_files, read_excluded
from protoseg.data.palette import default_palette

Palette = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class DatasetSpec:
    """All that sets one dataset apart. `label_map` None means that ids in the files are class ids."""

    classes: tuple[str, ...]
    palette: Palette
    splits: Mapping[str, Split]
    homepage: str
    ignore_index: int = 255
    label_map: LabelMap | None = field(default=None, repr=False)


def _folder_split(split: str) -> Split:
    return Split(f"images/{split}", f"labels/{split}")


DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(digits.CLASSES, digits.PALETTE, {}, "nothing to get: it is composed on the fly"),
    # Classes, palette and label map of a folder come from the YAML; every sub-folder of images/ is a split.
    "folder": DatasetSpec((), (), {}, "see 'Your own images' in the README"),
    # SegNet tutorial form, 480×360: 0-10 are the classes, 255 (and 11 in the original files) is void.
    "camvid": DatasetSpec(
        lists.CAMVID_CLASSES,
        lists.CAMVID_PALETTE,
        {split: _folder_split(split) for split in ("train", "val", "test")},
        "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/ (11 classes as in the SegNet tutorial)",
        label_map={raw: raw for raw in range(11)} | {11: IGNORE},
    ),
    # ADEChallengeData2016: 0 is "other objects", not evaluated; 1-150 in the order of objectInfo150.txt.
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
    palette: Palette
    ignore_index: int

    def __len__(self) -> int: ...
    def name(self, index: int) -> str:
        """Unique stem, for messages and file names."""

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (3, H, W) uint8 RGB and label (H, W) of class ids and `ignore_index`, uint8 or int32."""


def build_dataset(
    name: str,
    *,
    root: str | Path | None,
    split: str,
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int | None = None,
    label_map: LabelMap | None = None,
    exclude: str | Path | None = None,
    seed: int = 0,
) -> Dataset:
    """Dataset `name` of DATASETS, one split or several joined by "+".

    classes, palette, ignore_index and label_map describe a `folder`; the other datasets bring their own. A
    label map sends raw ids to class ids, class names or "ignore". `exclude` is a text file with paths of
    images or labels to leave out, one per line, relative to `root`. `seed` is for the scenes of `digits`.
    Raises UserError, one line, for anything wrong with the names or the files.
    """
    spec = dataset_spec(name, classes, palette, ignore_index, label_map)
    if name == "digits":
        return digits.Digits(split, seed=seed)
    if root is None:
        raise UserError(f"data.root: '{name}' needs the folder where it lies; get it: {spec.homepage}")
    return FileDataset(name, spec, Path(root), split, exclude)


def class_names(name: str, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """The class names of a dataset, without its files. Raises UserError for an unknown dataset."""
    return dataset_spec(name, classes).classes


def dataset_spec(
    name: str,
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int | None = None,
    label_map: LabelMap | None = None,
) -> DatasetSpec:
    """The spec of a dataset, completed by what the YAML says of a folder. UserError for wrong values."""
    if name not in DATASETS:
        raise UserError(f"data.name: no dataset '{name}'; use one of {', '.join(DATASETS)}")
    if name == "folder":
        return _folder_spec(DATASETS[name], classes, palette, ignore_index, label_map)
    if any(given is not None for given in (classes, palette, ignore_index, label_map)):
        raise UserError(
            f"data: '{name}' brings its own classes, palette, ignore_index and label_map; "
            "remove them, or use name: folder"
        )
    return DATASETS[name]


class FileDataset:
    """Image and label files of one or several splits. The files are paired here and read on demand."""

    def __init__(
        self, name: str, spec: DatasetSpec, root: Path, split: str, exclude: str | Path | None = None
    ) -> None:
        self.classes = spec.classes
        self.palette = spec.palette
        self.ignore_index = spec.ignore_index
        self._ids = LabelIds(len(spec.classes), spec.ignore_index, spec.label_map)
        excluded = read_excluded(exclude, root)
        self.names: list[str] = []
        self.files: list[tuple[Path, Path]] = []
        parts = split.split("+")
        for part in parts:
            pairing = pair_files(root, find_split(name, spec, root, part), spec.homepage, excluded)
            check_pairing(pairing, part)
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
                f"{label_file}: label is {columns} x {rows} pixels, its image {image_file} is "
                f"{width} x {height}{turned}; export both at the same size"
            )
        return image, torch.from_numpy(label)


def find_split(name: str, spec: DatasetSpec, root: Path, split: str) -> Split:
    """Where one split lies. Raises UserError for a missing root and for a split that is not there."""
    if not root.is_dir():
        raise UserError(
            f"data.root: folder {root} does not exist; '{name}' belongs there; get it: {spec.homepage}"
        )
    if name != "folder":
        if split not in spec.splits:
            raise UserError(
                f"data.split: '{name}' has no split '{split}'; use one of {', '.join(spec.splits)}"
            )
        return spec.splits[split]
    images = root / "images"
    found = sorted(p.name for p in images.iterdir() if p.is_dir()) if images.is_dir() else []
    if found and split not in found:
        raise UserError(
            f"data.split: folder {images / split} does not exist; {images} has {', '.join(found)}"
        )
    return _folder_split(split)


def _folder_spec(
    spec: DatasetSpec,
    classes: Sequence[str] | None,
    palette: Sequence[Sequence[int]] | None,
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
            f"data.ignore_index: {ignored} must be outside the class ids 0-{len(names) - 1} and below 65536; "
            "keep 255 and map the raw id in data.label_map"
        )
    colours = default_palette(len(names)) if palette is None else palette
    if len(colours) != len(names) or any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in colours):
        raise UserError(
            f"data.palette: wants {len(names)} RGB triples of 0-255, one per class; got {len(colours)}"
        )
    if label_map is not None:
        label_map = {_raw_id(raw): _target(raw, target, names) for raw, target in label_map.items()}
    return replace(
        spec,
        classes=names,
        palette=tuple((r, g, b) for r, g, b in colours),
        ignore_index=ignored,
        label_map=label_map,
    )


def _raw_id(raw: object) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not 0 <= raw < 1 << 16:
        raise UserError(f"data.label_map: raw id {raw!r} must be a whole number from 0 to 65535")
    return raw


def _target(raw: int, target: int | str, names: tuple[str, ...]) -> int | str:
    if target == IGNORE:
        return target
    if target in names:
        return names.index(str(target))
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(names):
        return target
    raise UserError(
        f"data.label_map: raw id {raw} goes to {target!r}, which is no class id 0-{len(names) - 1}, "
        f"no class name and not '{IGNORE}'"
    )
