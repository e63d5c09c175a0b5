"""From the data section of a configuration to a dataset that can be read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from protoseg.config import Config, DataConfig, config_from
from protoseg.data import digits
from protoseg.data.classes.palette import default_palette
from protoseg.data.file_dataset import Dataset, FileDataset
from protoseg.data.reading.decode import ImageReader
from protoseg.data.reading.label_ids import IGNORE, LabelIds
from protoseg.data.reading.pairing import Split, check_pairing, pair_files
from protoseg.data.reading.text_lists import is_hidden, read_excluded
from protoseg.data.reading.value_range import measure_range
from protoseg.data.specs import DATASETS, DatasetSpec, folder_split
from protoseg.data.tree import LabelTree, label_tree
from protoseg.runtime.errors import UserError


def build_dataset(name: str, *, split: str, root: str | Path | None = None, **settings: Any) -> Dataset:
    """Dataset `name`, one split or several joined by "+"; `settings` are other keys of the data section.

    Raises UserError, one line, for anything wrong with the names or the files.
    """
    config = config_from({"data": {"name": name, "root": root, **settings}}, "build_dataset")
    return open_dataset(measured(config, split), split)


def open_dataset(config: Config, split: str) -> Dataset:
    """One split of the configured dataset, or several joined by "+"; UserError for what is wrong with it."""
    data = config.data
    spec = dataset_spec(data)
    if data.name == "digits":
        return digits.Digits(split, classes=spec.classes)
    root = data_root(data)
    excluded = read_excluded(data.exclude, root)
    files: dict[str, tuple[Path, Path]] = {}
    for part in split.split("+"):
        pairing = pair_files(root, find_split(data, part), spec.homepage, excluded)
        check_pairing(pairing, part)
        prefix = f"{part}/" if "+" in split else ""
        files |= {prefix + stem: pair for stem, pair in pairing.pairs.items()}
    return FileDataset(files, spec.classes, spec.colours, label_ids(spec), spec.read_ids, image_reader(data))


def measured(config: Config, split: str | None = None) -> Config:
    """With numbers for `data.value_range: auto`, measured over the training split, where images are deep.

    Images of 8 bits need none: then it stays auto. `split` stands in for a training split that is not there.
    """
    data = config.data
    if data.value_range != "auto" or data.name == "digits":
        return config
    try:
        dataset = open_dataset(config, data.train_split)
    except UserError:
        if split is None:
            raise
        dataset = open_dataset(config, split)
    assert isinstance(dataset, FileDataset)
    value_range = measure_range([image for image, _ in dataset.files], dataset.read_image.pixels)
    if value_range is None:
        return config
    return config.model_copy(update={"data": data.model_copy(update={"value_range": value_range})})


def image_reader(data: DataConfig) -> ImageReader:
    """How the images of a dataset are read: alike in training, evaluation and prediction."""
    value_range = None if data.value_range == "auto" else data.value_range
    return ImageReader(data.exif == "apply", value_range, data.bands, data.page)


def data_root(data: DataConfig) -> Path:
    """The folder of the dataset: by default data/NAME."""
    return data.root or Path("data") / data.name


def label_ids(spec: DatasetSpec) -> LabelIds:
    """From the raw ids in its files to its class ids."""
    return LabelIds(len(spec.label_names), spec.ignore_index, spec.label_map)


def find_split(data: DataConfig, split: str) -> Split:
    """Where one split lies. Raises UserError for a missing root and for a split that is not there."""
    spec, root = DATASETS[data.name], data_root(data)
    if not root.is_dir():
        raise UserError(
            f"data.root: folder {root} does not exist; '{data.name}' belongs there; get it: {spec.homepage}"
        )
    if data.name != "folder":
        if split not in spec.splits:
            raise UserError(
                f"data.train_split or val_split: '{data.name}' has no split '{split}';"
                f" use one of {', '.join(spec.splits)}"
            )
        return spec.splits[split]
    images = root / "images"
    found = (
        sorted(p.name for p in images.iterdir() if p.is_dir() and not is_hidden(p.name))
        if images.is_dir()
        else []
    )
    if found and split not in found:
        raise UserError(
            f"data.train_split or val_split: folder {images / split} does not exist;"
            f" {images} has {', '.join(found)}; name one of these, or add it"
        )
    return folder_split(split)


def dataset_spec(data: DataConfig) -> DatasetSpec:
    """The spec of a dataset, completed by what the configuration says of it. UserError for wrong values."""
    if data.name not in DATASETS:
        raise UserError(f"data.name: no dataset '{data.name}'; use one of {', '.join(DATASETS)}")
    spec = DATASETS[data.name]
    if data.name == "folder":
        return _folder_spec(spec, data)
    own = (None if data.name == "digits" else data.classes, data.palette, data.ignore_index, data.label_map)
    if any(given is not None for given in own):
        raise UserError(
            f"data: '{data.name}' brings its own classes, palette, ignore_index and label_map; "
            "remove them, or use name: folder"
        )
    if data.classes is not None:  # some of the digits
        classes = digits.known_classes(data.classes)
        spec = replace(spec, classes=classes, palette=digits.colours(classes))
    _check_tree(data_tree(data, spec.classes), spec.ignore_index)
    return spec


def _folder_spec(spec: DatasetSpec, data: DataConfig) -> DatasetSpec:
    """The spec of a folder, with every value checked."""
    if not data.classes:
        raise UserError("data.classes: a folder dataset needs its class names, in class-id order")
    names = tuple(data.classes)
    if len(set(names)) < len(names) or IGNORE in names:
        raise UserError(
            f"data.classes: names must differ, and '{IGNORE}' is reserved; got {', '.join(names)}"
        )
    ignored = spec.ignore_index if data.ignore_index is None else data.ignore_index
    if not len(names) <= ignored < 1 << 16:
        raise UserError(
            f"data.ignore_index: {ignored} must be outside the class ids 0-{len(names) - 1} and below 65536; "
            "keep 255 and map the raw id in data.label_map"
        )
    palette = default_palette(len(names)) if data.palette is None else tuple(data.palette)
    if len(palette) != len(names) or not all(0 <= value <= 255 for colour in palette for value in colour):
        raise UserError(
            f"data.palette: wants {len(names)} RGB triples of 0-255, one per class; got {len(palette)}"
        )
    label_map, tree, nodes = data.label_map, data_tree(data, names), spec.nodes
    _check_tree(tree, ignored)
    if label_map is not None:
        above = {} if tree is None else {name: v for v, name in enumerate(tree.names) if v >= len(names)}
        label_map = {raw: _target(raw, target, names, above) for raw, target in label_map.items()}
        if any(target in above.values() for target in label_map.values()):
            nodes = tuple(above)
    return replace(
        spec, classes=names, palette=palette, ignore_index=ignored, label_map=label_map, nodes=nodes
    )


def _check_tree(tree: LabelTree | None, ignored: int) -> None:
    """Labels hold the ids of inner nodes after those of classes: none of them may mean ignored."""
    if tree is not None and ignored < len(tree.names):
        raise UserError(
            f"data.ignore_index: {ignored} is the id of a node of data.tree; use fewer nodes, or give"
            f" {len(tree.names)} or more and map the raw id in data.label_map"
        )


def model_tree(data: DataConfig, classes: Sequence[str]) -> LabelTree | None:
    """The label tree of a trained model; None if it has none, or other classes than it was trained with."""
    return data_tree(data, classes) if tuple(classes) == dataset_spec(data).classes else None


def data_tree(data: DataConfig, classes: Sequence[str]) -> LabelTree | None:
    """The label tree over these classes that the configuration asks for. Errors: UserError."""
    if data.tree is None:
        return None
    nested = DATASETS[data.name].tree if data.tree == "shipped" else data.tree
    if nested is None:
        shipped = [name for name, spec in DATASETS.items() if spec.tree is not None]
        raise UserError(
            f"data.tree: none is shipped for '{data.name}', only for {', '.join(shipped)}; write it out"
        )
    return label_tree(nested, classes)


def _target(raw: int, target: int | str, names: Sequence[str], above: Mapping[str, int]) -> int | str:
    if not 0 <= raw < 1 << 16:
        raise UserError(f"data.label_map: raw id {raw!r} must be a whole number from 0 to 65535")
    if target == IGNORE:
        return target
    if target in names:
        return names.index(str(target))
    if target in above:
        return above[str(target)]
    if isinstance(target, int) and 0 <= target < len(names):
        return target
    raise UserError(
        f"data.label_map: raw id {raw} goes to {target!r}, which is no class id 0-{len(names) - 1}, "
        f"no class name, no node of data.tree and not '{IGNORE}'"
    )
