"""Small trees in the form of the published datasets, and facts known about their class lists."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from protoseg.config import DataConfig
from protoseg.data.ade20k_conversion import prepare_ade20k_full
from protoseg.data.datasets import build_dataset
from protoseg.data.doctor.check import check_dataset
from protoseg.data.reading.label_ids import IGNORE, export_ids
from protoseg.data.specs import DATASETS
from protoseg.runtime.errors import UserError

COLOUR = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


def write(path: Path, array: np.ndarray, field: str = "S") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mat":
        savemat(path, {field: array, "names": np.array(["x"], dtype=object)}, do_compression=True)
    else:
        Image.fromarray(array).save(path)


def write_list(path: Path, *stems: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{stem}\n" for stem in stems))


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"folder"}))
def test_lists_are_complete(name):
    spec = DATASETS[name]
    assert len(spec.classes) == len(spec.colours) == len(set(spec.classes))
    assert all(entry and entry == entry.strip() for entry in spec.classes)
    assert all(len(colour) == 3 and 0 <= min(colour) <= max(colour) <= 255 for colour in spec.colours)
    if spec.label_map is not None:
        targets = [target for target in spec.label_map.values() if target != "ignore"]
        assert set(targets) == set(range(len(spec.classes)))
        ids = export_ids(spec.classes, spec.label_map)
        assert [spec.label_map[int(raw)] for raw in ids] == list(range(len(spec.classes)))


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("camvid", 11, {0: "sky", 8: "car", 10: "bicyclist"}),
        ("ade20k", 150, {0: "wall", 12: "person", 20: "car", 41: "box", 116: "minibike", 149: "flag"}),
        ("cityscapes", 19, {0: "road", 9: "terrain", 12: "rider", 16: "train", 18: "bicycle"}),
        ("cocostuff164k", 171, {0: "person", 11: "stop sign", 79: "toothbrush", 80: "banner", 170: "wood"}),
        ("cocostuff10k", 171, {24: "backpack", 118: "light", 129: "pillow"}),
        ("pcontext", 59, {0: "aeroplane", 35: "mouse", 54: "tvmonitor", 58: "wood"}),
        ("pcontext60", 60, {0: "background", 1: "aeroplane", 59: "wood"}),
        ("ade20k_full_847", 847, {0: "wall", 149: "washer", 499: "windshield", 846: "adding machine"}),
        ("ade20k_full_300", 300, {299: "coffee maker"}),
        ("voc", 21, {0: "background", 11: "diningtable", 15: "person", 20: "tvmonitor"}),
    ],
)
def test_class_counts_and_places(name, count, some):
    classes = DATASETS[name].classes
    assert len(classes) == count
    assert {i: classes[i] for i in some} == some


# Of names; ids; colours, as they were compared entry by entry with objectInfo150.txt and color150.mat,
# with labels.txt of COCO-Stuff and the 11 classes that its README leaves out, with the 459 names of
# PASCAL-Context and the 59 ids in the Detail API's conversion, with labels.py of cityscapesScripts, and with
# the label colours of the SegNet tutorial.
DIGESTS = {
    "ade20k": "26b4f9382f1cfd3b",
    "camvid": "d7fba3796cde2a2c",
    "cityscapes": "51948b9822e18d67",
    "cocostuff10k": "13f0a6664ff2b54d",
    "pcontext": "23a1b74a222c24fe",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_lists_are_still_those_of_the_sources(name):
    spec = DATASETS[name]
    ids = export_ids(spec.classes, spec.label_map).tolist()
    text = f"{list(spec.classes)} {ids} {[list(colour) for colour in spec.palette]}"
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]


def test_pcontext_classes_are_alphabetical():
    assert list(DATASETS["pcontext"].classes) == sorted(DATASETS["pcontext"].classes)


def test_voc_palette_is_the_bit_pattern_of_the_development_kit():
    def colour(index: int) -> tuple[int, ...]:
        return tuple(sum(((index >> (3 * b + c)) & 1) << (7 - b) for b in range(3)) for c in range(3))

    assert DATASETS["voc"].palette == tuple(colour(i) for i in range(21))


def test_cityscapes_tree_and_ids(tmp_path):
    raw = np.array([[0, 7, 8], [26, 33, 29]], dtype=np.uint8)
    stem = "aachen/aachen_000000_000019"
    write(tmp_path / f"leftImg8bit/train/{stem}_leftImg8bit.png", COLOUR)
    write(tmp_path / f"gtFine/train/{stem}_gtFine_labelIds.png", raw)
    for other in ("instanceIds", "color", "labelTrainIds"):
        write(tmp_path / f"gtFine/train/{stem}_gtFine_{other}.png", raw)
    data = build_dataset("cityscapes", root=tmp_path, split="train")
    assert data.name(0) == stem
    assert data.read(0)[1].tolist() == [[255, 0, 1], [13, 18, 255]]
    # what the test server wants back, by labels.py: trainId 0 is 7 (road), 13 is 26 (car), 16 is 31 (train)
    ids = export_ids(DATASETS["cityscapes"].classes, DATASETS["cityscapes"].label_map)
    assert [ids[i] for i in (0, 1, 2, 13, 16, 18)] == [7, 8, 11, 26, 31, 33]
    colours = [DATASETS["cityscapes"].palette[i] for i in (0, 13, 18)]
    assert colours == [(128, 64, 128), (0, 0, 142), (119, 11, 32)]
    with pytest.raises(UserError, match=r"gtFine/val|leftImg8bit/val.*cityscapes-dataset.com"):
        build_dataset("cityscapes", root=tmp_path, split="train+val")


def test_cocostuff_164k(tmp_path):
    # one less than the ids of labels.txt: 1 person, 2 bicycle, 13 stop sign, 92 banner, 182 wood
    raw = np.array([[0, 1, 12], [91, 181, 255]], dtype=np.uint8)
    write(tmp_path / "images/val2017/000000000139.jpg", COLOUR)
    write(tmp_path / "annotations/val2017/000000000139.png", raw)
    write(tmp_path / "annotations/val2017/000000000139_labelTrainIds.png", raw)
    data = build_dataset("cocostuff164k", root=tmp_path, split="val")
    assert len(data) == 1
    assert data.read(0)[1].tolist() == [[0, 1, 11], [80, 170, 255]]
    write(tmp_path / "annotations/val2017/000000000139.png", np.full((2, 3), 11, dtype=np.uint8))
    with pytest.raises(UserError, match="label ids 11 are neither"):  # 12 is street sign, never annotated
        data.read(0)


def test_cocostuff_10k_as_released_and_as_png(tmp_path):
    stem = "COCO_train2014_000000000077"
    write(tmp_path / f"images/{stem}.jpg", COLOUR)
    write(tmp_path / f"annotations/{stem}.mat", np.array([[0, 1, 2], [13, 92, 182]], dtype=np.uint16))
    write(tmp_path / "images/unused.jpg", COLOUR)
    write_list(tmp_path / "imageLists/train.txt", stem)
    expected = [[255, 0, 1], [11, 80, 170]]
    assert build_dataset("cocostuff10k", root=tmp_path, split="train").read(0)[1].tolist() == expected
    write(tmp_path / f"images/test2014/{stem}.jpg", COLOUR)
    raw = np.array([[0, 1, 2], [12, 81, 171]], dtype=np.uint8)
    write(tmp_path / f"annotations/test2014/{stem}_labelTrainIds.png", raw)
    assert build_dataset("cocostuff10k_png", root=tmp_path, split="test").read(0)[1].tolist() == expected


@pytest.mark.parametrize(("name", "shift"), [("pcontext", 0), ("pcontext60", 1)])
def test_pcontext_as_released_and_as_png(tmp_path, name, shift):
    stem = "2008_000002"
    write(tmp_path / f"JPEGImages/{stem}.jpg", COLOUR)
    write(tmp_path / "JPEGImages/2008_000003.jpg", COLOUR)
    # 459-class ids: 1 accordion, 2 aeroplane, 9 bag, 427 tvmonitor, 458 wood, 459 the last of all
    raw = np.array([[1, 2, 9], [427, 458, 459]], dtype=np.float64)
    write(tmp_path / f"trainval/{stem}.mat", raw, field="LabelMap")
    write_list(tmp_path / "ImageSets/Main/val.txt", stem)
    other = 0 if shift else 255
    expected = [[other, 0 + shift, 1 + shift], [54 + shift, 58 + shift, other]]
    assert build_dataset(name, root=tmp_path, split="val").read(0)[1].tolist() == expected
    raw = np.array([[0, 1, 2], [55, 59, 0]], dtype=np.uint8)
    write(tmp_path / f"SegmentationClassContext/{stem}.png", raw)
    write_list(tmp_path / "ImageSets/SegmentationContext/val.txt", stem)
    assert build_dataset(f"{name}_png", root=tmp_path, split="val").read(0)[1].tolist() == expected


def test_voc_palette_files_and_lists(tmp_path):
    for stem in ("2007_000032", "2007_000033"):
        write(tmp_path / f"JPEGImages/{stem}.jpg", COLOUR)
    label = Image.fromarray(np.array([[0, 1, 20], [15, 255, 0]], dtype=np.uint8), mode="P")
    label.putpalette([v for colour in DATASETS["voc"].palette for v in colour])
    (tmp_path / "SegmentationClass").mkdir()
    label.save(tmp_path / "SegmentationClass/2007_000032.png")
    write_list(tmp_path / "ImageSets/Segmentation/train.txt", "2007_000032")
    data = build_dataset("voc", root=tmp_path, split="train")
    assert len(data) == 1
    assert data.read(0)[1].tolist() == [[0, 1, 20], [15, 255, 0]]
    write_list(tmp_path / "ImageSets/Segmentation/val.txt", "2007_000033", "2007_000999")
    with pytest.raises(
        UserError, match=r"1 image.s. without label .*000033.*1 listed name.s. without image .2007_000999"
    ):
        build_dataset("voc", root=tmp_path, split="val")
    report = check_dataset(DataConfig(name="voc", root=tmp_path))
    assert report.bad_files == ["JPEGImages/2007_000033.jpg"], "a name in a list is no file to leave out"
    with pytest.raises(UserError, match=r"trainval.txt: cannot read this list.*voc2012"):
        build_dataset("voc", root=tmp_path, split="trainval")


def test_broken_mat_file_is_named(tmp_path):
    write(tmp_path / "images/a.jpg", COLOUR)
    write_list(tmp_path / "imageLists/train.txt", "a")
    for content in (b"", b"MATLAB 5.0 MAT-file" + bytes(90)):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations/a.mat").write_bytes(content)
        with pytest.raises(UserError, match=r"a.mat: cannot read this label"):
            build_dataset("cocostuff10k", root=tmp_path, split="train").read(0)
    write(tmp_path / "annotations/a.mat", np.zeros((2, 3)), field="T")
    with pytest.raises(UserError, match=r"a.mat: cannot read this label"):
        build_dataset("cocostuff10k", root=tmp_path, split="train").read(0)


def ade20k_colours(ids: np.ndarray) -> np.ndarray:
    """The encoding of *_seg.png: ten times the high part of the id in red, the low part in green."""
    instances = np.arange(ids.size).reshape(ids.shape) % 7
    return np.stack([ids // 256 * 10, ids % 256, instances], -1).astype(np.uint8)


def test_full_ade20k_as_released(tmp_path):
    folder = tmp_path / "images/ADE/training/urban/street"
    write(folder / "ADE_train_00016869.jpg", COLOUR)
    # object ids: 2978 wall, 312 building, 3148 adding machine (the last of 847), 206 blanket (the 151st)
    ids = np.array([[2978, 312, 0], [3148, 206, 1]])
    write(folder / "ADE_train_00016869_seg.png", ade20k_colours(ids))
    write(folder / "ADE_train_00016869_parts_1.png", ade20k_colours(ids))
    write(folder / "ADE_train_00016869/instance_000_ADE_train_00016869.png", ids.astype(np.uint8))
    data = build_dataset("ade20k_full_847", root=tmp_path, split="train")
    assert [data.name(i) for i in range(len(data))] == ["urban/street/ADE_train_00016869"]
    assert data.read(0)[1].tolist() == [[0, 1, 65535], [846, 150, 65535]]
    few = build_dataset("ade20k_full_150", root=tmp_path, split="train")
    assert few.read(0)[1].tolist() == [[0, 1, 65535], [65535, 65535, 65535]]


def test_full_ade20k_as_16_bit_tiff(tmp_path):
    write(tmp_path / "images_detectron2/validation/ADE_val_00000001.jpg", COLOUR)
    ids = np.array([[0, 1, 846], [65535, 299, 300]], dtype=np.uint16)
    write(tmp_path / "annotations_detectron2/validation/ADE_val_00000001.tif", ids)
    data = build_dataset("ade20k_full_847_tif", root=tmp_path, split="val")
    assert data.read(0)[1].tolist() == ids.tolist()
    few = build_dataset("ade20k_full_300_tif", root=tmp_path, split="val")
    assert few.read(0)[1].tolist() == [[0, 1, 65535], [65535, 299, 65535]]


def test_prepare_full_ade20k(tmp_path):
    rng = np.random.default_rng(0)
    raw_ids = np.array([2978, 312, 3148, 1])
    for split, place, size in (
        ("training", "urban/street/ADE_train_00000001", (520, 1040)),
        ("validation", "outliers/ADE_val_00000002", (30, 40)),
    ):
        blocks = rng.integers(0, 4, (size[0] // 10, size[1] // 10)).repeat(10, 0).repeat(10, 1)
        write(
            tmp_path / f"images/ADE/{split}/{place}.jpg", (blocks[..., None] * [60, 50, 40]).astype(np.uint8)
        )
        write(tmp_path / f"images/ADE/{split}/{place}_seg.png", ade20k_colours(raw_ids[blocks]))
    calls: list[tuple[int, int]] = []
    assert prepare_ade20k_full(tmp_path, on_progress=lambda *now: calls.append(now)) == 2
    assert calls == [(1, 2), (2, 2)]
    for split, size in (("train", (512, 1024)), ("val", (30, 40))):
        image, label = build_dataset("ade20k_full_847_tif", root=tmp_path, split=split).read(0)
        assert label.shape == size
        # ids as in the release, at the pixel under each centre of the new grid
        raw = build_dataset("ade20k_full_847", root=tmp_path, split=split).read(0)[1]
        rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, raw.shape))
        assert np.array_equal(label, raw[rows][:, columns])
        level = {0: 0, 1: 60, 846: 120, 65535: 180}
        expected = np.vectorize(level.get)(label.numpy())
        assert (np.abs(image[0].numpy() - expected) < 12).mean() > 0.8
    assert prepare_ade20k_full(tmp_path) == 0
    written = tmp_path / "annotations_detectron2/training/ADE_train_00000001.tif"
    before = written.read_bytes()
    written.unlink()
    assert prepare_ade20k_full(tmp_path) == 1
    assert written.read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))
    (tmp_path / "images/ADE/validation/outliers/ADE_val_00000002_seg.png").unlink()
    with pytest.raises(UserError, match=r"1 image.s. without label .*ADE_val_00000002.jpg"):
        prepare_ade20k_full(tmp_path)


def test_raw_ids_need_an_id_for_every_class() -> None:
    with pytest.raises(UserError, match=r"data\.label_map: no id of the files leads to class building"):
        export_ids(["road", "building"], {0: IGNORE, 1: 0})
