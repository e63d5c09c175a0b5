"""The datasets that are known by name: one spec each. A new dataset is one entry in DATASETS."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from protoseg.data import digits
from protoseg.data.classes.palette import Palette, default_palette
from protoseg.data.classes.published import ADE20K_FULL_HIGHEST_ID, LISTS, TREES
from protoseg.data.file_dataset import ReadIds
from protoseg.data.reading.decode import read_ade20k_ids, read_label_ids, read_mat_ids
from protoseg.data.reading.label_ids import IGNORE, LabelMap
from protoseg.data.reading.pairing import Split


@dataclass(frozen=True)
class DatasetSpec:
    """All that sets one dataset apart.

    `palette` empty means the default colours, `label_map` None that ids in the files are class ids.
    """

    classes: tuple[str, ...]
    palette: Palette
    splits: Mapping[str, Split]
    homepage: str
    ignore_index: int = 255
    label_map: LabelMap | None = field(default=None, repr=False)
    read_ids: ReadIds = read_label_ids
    tree: Mapping[str, Any] | None = field(default=None, repr=False)  # shipped, for data.tree: shipped

    nodes: tuple[str, ...] = ()  # inner nodes of the label tree, if the label map leads to them

    @property
    def label_names(self) -> tuple[str, ...]:
        """Of all ids that a label may hold."""
        return (*self.classes, *self.nodes)

    @property
    def colours(self) -> Palette:
        return self.palette or default_palette(len(self.classes))


def folder_split(split: str) -> Split:
    """The split of a `folder`."""
    return Split(f"images/{split}", f"labels/{split}")


def _map(ids: Sequence[int], ignored: Iterable[int]) -> dict[int, int | str]:
    """The label map of a published dataset: `ids` are the raw ids of its classes, in order."""
    return {**dict.fromkeys(ignored, IGNORE), **{raw: target for target, raw in enumerate(ids)}}


def _splits(names: str, form: Split) -> dict[str, Split]:
    """Splits that lie alike: {} in a path is the split's name, or its folder where names say name=folder."""
    splits = {}
    for each in names.split():
        name, _, folder = each.partition("=")
        images, labels, listed = (
            path.format(folder or name) for path in (form.images, form.labels, form.listed)
        )
        splits[name] = replace(form, images=images, labels=labels, listed=listed)
    return splits


_COCOSTUFF_HOME = "https://github.com/nightrome/cocostuff"
_COCOSTUFF10K_HOME = "https://github.com/nightrome/cocostuff10k (cocostuff-10k-v1.1.zip)"
_PCONTEXT_HOME = "https://cs.stanford.edu/~roozbeh/pascal-context and PASCAL VOC 2010"
_ADE20K_FULL_HOME = "https://groups.csail.mit.edu/vision/datasets/ADE20K (full dataset, ADE20K_2021_17_01)"
# Here: the file tree, and what 0 and void mean. Each list's source stands beside it in classes/lists.yaml.
DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(digits.CLASSES, digits.PALETTE, {}, "nothing to get: it is composed on the fly"),
    # Classes, palette and label map of a folder come from the YAML; every sub-folder of images/ is a split.
    "folder": DatasetSpec((), (), {}, "see 'Your own images' in the README"),
    # SegNet tutorial form, 480 x 360: 0-10 are the classes, 255 (and 11 in the original files) is void.
    "camvid": DatasetSpec(
        *LISTS["camvid"][:2],
        _splits("train val test", Split("images/{}", "labels/{}")),
        "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/ (11 classes as in the SegNet tutorial)",
        label_map=_map(range(11), [11]),
        tree=TREES["camvid"],
    ),
    # ADEChallengeData2016: 0 is "other objects", not evaluated; 1-150 in the order of objectInfo150.txt.
    "ade20k": DatasetSpec(
        *LISTS["ade20k"][:2],
        _splits("train=training val=validation", Split("images/{}", "annotations/{}")),
        "http://sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)",
        label_map=_map(range(1, 151), [0]),
    ),
    "cityscapes": DatasetSpec(
        *LISTS["cityscapes"][:2],
        _splits(
            "train val test",
            Split("leftImg8bit/{}", "gtFine/{}", ("_leftImg8bit.png",), ("_gtFine_labelIds.png",)),
        ),
        "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)",
        label_map=_map(LISTS["cityscapes"].ids, range(34)),
        tree=TREES["cityscapes"],
    ),
    # stuffthingmaps: id - 1 is stored, 255 is unlabeled (README of the dataset, "Caffe-compatible ... maps").
    # Trees that mmsegmentation has converted hold a second label file per image.
    "cocostuff164k": DatasetSpec(
        *LISTS["cocostuff"][:2],
        _splits(
            "train val",
            Split("images/{}2017", "annotations/{}2017", (".jpg",), (".png",), ("_labelTrainIds.png",)),
        ),
        f"{_COCOSTUFF_HOME} (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip)",
        label_map=_map([i - 1 for i in LISTS["cocostuff"].ids], []),
    ),
    # The released .mat files, version 1.1: field S, 0 is unlabeled.
    "cocostuff10k": DatasetSpec(
        *LISTS["cocostuff"][:2],
        _splits(
            "train test", Split("images", "annotations", (".jpg",), (".mat",), listed="imageLists/{}.txt")
        ),
        _COCOSTUFF10K_HOME,
        label_map=_map(LISTS["cocostuff"].ids, [0]),
        read_ids=read_mat_ids,
    ),
    # The same as PNG, as mmsegmentation converts it: 0 is unlabeled, 1-171 are the classes.
    "cocostuff10k_png": DatasetSpec(
        *LISTS["cocostuff"][:2],
        _splits(
            "train test", Split("images/{}2014", "annotations/{}2014", (".jpg",), ("_labelTrainIds.png",))
        ),
        _COCOSTUFF10K_HOME,
        label_map=_map(range(1, 172), [0]),
    ),
    # VOCdevkit/VOC2010 with the released trainval/*.mat beside JPEGImages: field LabelMap, 459 classes.
    "pcontext": DatasetSpec(
        *LISTS["pcontext"][:2],
        _splits(
            "train val", Split("JPEGImages", "trainval", (".jpg",), (".mat",), listed="ImageSets/Main/{}.txt")
        ),
        _PCONTEXT_HOME,
        label_map=_map(LISTS["pcontext"].ids, range(460)),
        tree=TREES["pcontext"],
        read_ids=read_mat_ids,
    ),
    # The same as PNG: 0 is everything else, 1-59 are the classes.
    "pcontext_png": DatasetSpec(
        *LISTS["pcontext"][:2],
        _splits(
            "train val",
            Split(
                "JPEGImages",
                "SegmentationClassContext",
                (".jpg",),
                (".png",),
                listed="ImageSets/SegmentationContext/{}.txt",
            ),
        ),
        _PCONTEXT_HOME,
        label_map=_map(range(1, 60), [0]),
        tree=TREES["pcontext"],
    ),
    # Palette PNGs, 0 is background, 255 the rim of the objects. Root: VOCdevkit/VOC2012.
    "voc": DatasetSpec(
        *LISTS["voc"][:2],
        _splits(
            "train val trainval",
            Split(
                "JPEGImages",
                "SegmentationClass",
                (".jpg",),
                (".png",),
                listed="ImageSets/Segmentation/{}.txt",
            ),
        ),
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        label_map=_map(range(21), []),
    ),
}


for _name in ("pcontext", "pcontext_png"):  # with everything else as a 60th class, which comes first
    _spec = DATASETS[_name]
    DATASETS[_name.replace("pcontext", "pcontext60")] = replace(
        _spec,
        classes=("background", *_spec.classes),
        tree={"background": None, **TREES["pcontext"]},
        label_map={
            raw: 0 if target == IGNORE else int(target) + 1 for raw, target in (_spec.label_map or {}).items()
        },
    )


_FOLDERS = "train=training val=validation"
for _count in (150, 300, 500, 700, 847):  # the most frequent classes; the others are ignored
    # The release: red and green of *_seg.png beside each image are the object id. Root: ADE20K_2021_17_01.
    DATASETS[f"ade20k_full_{_count}"] = _spec = DatasetSpec(
        LISTS["ade20k_full"].classes[:_count],
        (),
        _splits(_FOLDERS, Split("images/ADE/{}", "images/ADE/{}", (".jpg",), ("_seg.png",))),
        _ADE20K_FULL_HOME,
        ignore_index=65535,
        label_map=_map(LISTS["ade20k_full"].ids[:_count], range(ADE20K_FULL_HIGHEST_ID + 1)),
        read_ids=read_ade20k_ids,
    )
    # As MaskFormer's script converts it (shorter side 512 at most): 16-bit TIFF, class ids, 65535 is void.
    DATASETS[f"ade20k_full_{_count}_tif"] = replace(
        _spec,
        splits=_splits(
            _FOLDERS, Split("images_detectron2/{}", "annotations_detectron2/{}", (".jpg",), (".tif",))
        ),
        label_map=_map(range(_count), range(847)),
        read_ids=read_label_ids,
    )
