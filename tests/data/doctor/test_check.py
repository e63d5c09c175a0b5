"""The doctor on copies of a sound dataset with one fault each."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from protoseg.config import DataConfig
from protoseg.data.datasets import build_dataset
from protoseg.data.doctor.check import check_dataset
from protoseg.data.doctor.report import DataReport, print_report, write_bad_files
from protoseg.runtime.errors import UserError

CLASSES = ["sky", "road", "tree"]
PALETTE = [(0, 0, 200), (90, 90, 90), (0, 160, 0)]


def label_of(seed: int) -> np.ndarray:
    label = np.random.default_rng(seed).integers(0, 3, (12, 10)).astype(np.uint8)
    label[0] = 255
    return label


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    for s, (split, count) in enumerate((("train", 4), ("val", 2))):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            image = np.random.default_rng(100 * s + i).integers(0, 256, (12, 10, 3)).astype(np.uint8)
            Image.fromarray(image).save(root / f"images/{split}/{split}{i}.png")
            Image.fromarray(label_of(100 * s + i)).save(root / f"labels/{split}/{split}{i}.png")
    return root


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def doctor(root: Path, on_progress: Callable[[int, int], None] | None = None, **given) -> DataReport:
    data = DataConfig(root=root, **{"classes": CLASSES, "palette": PALETTE} | given)
    return check_dataset(data, on_progress=on_progress)


def relabel(change: Callable[[np.ndarray], np.ndarray], *names: str) -> Callable[[Path], None]:
    def fault(root: Path) -> None:
        for path in sorted(root.glob("labels/*/*.png")):
            if not names or path.name in names:
                Image.fromarray(change(np.array(Image.open(path)))).save(path)

    return fault


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:size])


def paint(label: np.ndarray) -> np.ndarray:
    return np.array([*PALETTE, *[(0, 0, 0)] * 253], dtype=np.uint8)[label]


def stretch(label: np.ndarray) -> np.ndarray:
    return np.where(label == 255, 255, label * 80).astype(np.uint8)


def photograph(label: np.ndarray) -> np.ndarray:
    return np.arange(label.size, dtype=np.uint8).reshape(label.shape)


def set_one(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(label: np.ndarray) -> np.ndarray:
        label[3, 4] = value
        return label

    return change


def as_float(path: Path) -> None:
    Image.fromarray(np.array(Image.open(path)).astype(np.float32)).save(path.with_suffix(".tif"))
    path.unlink()


T0, T1 = "labels/train/train0.png", "labels/train/train1.png"
ALL = ["labels/train/" + f"train{i}.png" for i in range(4)] + ["labels/val/val0.png", "labels/val/val1.png"]
# fault, kind it must be called, the words it must say, files it must name
FAULTS = {
    "wrong id": (relabel(set_one(7), "train0.png"), "unknown label id", "ids .*: 7 .allowed 0-2, 255", [T0]),
    "id one too high": (relabel(set_one(3), "train0.png"), "unknown label id", "one more than", [T0]),
    "missing label": (
        lambda r: (r / T0).unlink(),
        "image without label",
        "'train'",
        ["images/train/train0.png"],
    ),
    "missing image": (
        lambda r: (r / "images/val/val1.png").unlink(),
        "label without image",
        "'val'",
        ["labels/val/val1.png"],
    ),
    "truncated image": (
        truncate("images/train/train2.png", 200),
        "unreadable image",
        "cannot read this image",
        ["images/train/train2.png"],
    ),
    "truncated label": (truncate(T1, 60), "unreadable label", "cannot read this label", [T1]),
    "empty label file": (truncate(T1, 0), "unreadable label", "the file is empty", [T1]),
    "JPEG called PNG": (
        lambda r: Image.open(r / T0).save(r / T0, format="JPEG"),
        "unreadable label",
        "compression changes ids",
        [T0],
    ),
    "ids as floating-point numbers": (
        lambda r: as_float(r / T0),
        "unreadable label",
        "floating-point",
        ["labels/train/train0.tif"],
    ),
    "two files of one stem": (
        lambda r: Image.open(r / "images/train/train0.png").save(r / "images/train/train0.jpg"),
        "two files of one stem",
        "keep one of the two",
        ["images/train/train0.png"],
    ),
    "text for an image": (
        lambda r: (r / "images/val/val0.png").write_text("404"),
        "unreadable image",
        "no image of a known kind",
        ["images/val/val0.png"],
    ),
    "colour mask of the palette": (relabel(paint, "train0.png"), "colour mask", "those of the palette", [T0]),
    "grey saved as colour": (
        relabel(lambda a: np.stack([a] * 3, -1), "train0.png"),
        "colour mask",
        "three channels are equal",
        [T0],
    ),
    "colours from elsewhere": (relabel(lambda a: paint(a) ^ 9, "train0.png"), "colour mask", "some of", [T0]),
    "one row short": (relabel(lambda a: a[:-1], "train1.png"), "size mismatch", "10 x 11 for 10 x 12", [T1]),
    "turned": (relabel(lambda a: a.T.copy(), "train1.png"), "size mismatch", "EXIF", [T1]),
    "0/255 masks": (relabel(lambda a: (a > 0).astype(np.uint8) * 255), "binary mask", "0 and 255 only", ALL),
    "stretched for display": (relabel(stretch), "unknown label id", "multiples of 80", ALL),
    "stretched to 16 bits": (
        relabel(lambda a: np.where(a == 255, 255, a.astype(np.uint16) * 257).astype(np.uint16)),
        "unknown label id",
        "multiples of 257: 8-bit ids stretched to 16 bits",
        ALL,
    ),
    "stretched to 16 bits, void and all": (
        relabel(lambda a: a.astype(np.uint16) * 257),
        "unknown label id",
        "multiples of 257: 8-bit ids stretched to 16 bits",
        ALL,
    ),
    "16 bits among 8": (
        relabel(lambda a: a.astype(np.uint16), "train0.png"),
        "mixed bit depth",
        "16 bits",
        [T0],
    ),
    "ids from one": (
        relabel(lambda a: np.where(a == 255, 255, a + 1).astype(np.uint8)),
        "unknown label id",
        "ids run from 1",
        ALL,
    ),
    "a photograph for a label": (relabel(photograph, "train0.png"), "unknown label id", "photograph", [T0]),
    "all ignored": (relabel(lambda a: a * 0 + 255, "train0.png"), "all ignored", "teach nothing", [T0]),
    "val image in train": (
        lambda r: [
            shutil.copy(r / f"{p}/val/val0.png", r / f"{p}/train/extra.png") for p in ("images", "labels")
        ],
        "duplicate in more than one split",
        "images/train/extra.png = images/val/val0.png",
        ["images/val/val0.png"],
    ),
    "twice in train": (
        lambda r: [
            shutil.copy(r / f"{p}/train/train0.png", r / f"{p}/train/x.png") for p in ("images", "labels")
        ],
        "duplicate twice in one split",
        "keep one copy",
        ["images/train/x.png"],
    ),
    "empty split": (
        lambda r: [shutil.rmtree(r / p / "val") or (r / p / "val").mkdir() for p in ("images", "labels")],
        "empty split",
        "'val' has no image",
        [],
    ),
    "labels of the other split": (
        lambda r: (r / "labels/train").rename(r / "x") and (r / "labels/val").rename(r / "labels/train"),
        "",
        "",
        [],
    ),
}
WARNINGS = {"mixed bit depth", "all ignored", "duplicate twice in one split"}


def test_sound_dataset(sound):
    report = doctor(sound)
    assert report.ok
    assert report.findings == []
    assert report.bad_files == []
    assert report.advised_label_map is None
    assert report.images == {"train": 4, "val": 2}


@pytest.mark.parametrize("name", [name for name in FAULTS if FAULTS[name][1]])
def test_each_fault_is_named_with_its_files(copy, name):
    fault, kind, words, files = FAULTS[name]
    fault(copy)
    report = doctor(copy)
    found = [finding for finding in report.findings if finding.kind == kind]
    assert len(found) == 1, [f.message for f in report.findings]
    assert re.search(words, found[0].message), found[0].message
    assert list(found[0].files) == files
    assert "\n" not in found[0].message
    assert report.ok == (kind in WARNINGS)
    errors = {file for finding in report.findings if finding.severity == "error" for file in finding.files}
    assert set(report.bad_files) == errors
    others = {f.kind for f in report.findings} - {kind, "absent class"}
    assert not others, others


def test_labels_of_another_split(copy):
    FAULTS["labels of the other split"][0](copy)
    with pytest.raises(UserError, match="labels/val does not exist"):
        doctor(copy)
    kinds = {f.kind for f in doctor(copy, val_split="train").findings}
    assert {"image without label", "label without image", "empty split"} <= kinds


def move(pattern: str, change: Callable[[Path], Path]) -> Callable[[Path], None]:
    def fault(root: Path) -> None:
        for path in sorted(root.glob(pattern)):
            path.rename(change(path))

    return fault


def swap_labels(root: Path) -> None:
    (root / "labels/train").rename(root / "x")
    (root / "labels/val").rename(root / "labels/train")
    (root / "x").rename(root / "labels/val")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (swap_labels, "the partners lie in 'val': were the splits swapped?"),
        (
            move("labels/*/*.png", lambda p: p.with_suffix(".jpg")),
            "labels/train/train0.jpg is not read: a label ends in .png .tif .tiff (JPEG changes ids)",
        ),
        (
            move("labels/*/*.png", lambda p: p.with_stem(p.stem + "_mask")),
            "the names of the labels have '_mask' more: rename them",
        ),
        (
            move("images/*/*.png", lambda p: p.with_stem("rgb-" + p.stem)),
            "the names of the images have 'rgb-' more: rename them",
        ),
        (
            move("labels/*/*.png", lambda p: p.with_stem(p.stem.upper())),
            "the names differ in upper and lower case: make them alike",
        ),
        (move("labels/*/*.png", lambda p: p.with_stem("x" + p.stem[::-1])), "add the missing files or"),
    ],
)
def test_why_images_and_labels_do_not_meet(copy: Path, fault: Callable[[Path], None], words: str) -> None:
    fault(copy)
    report = doctor(copy)
    found = next(f for f in report.findings if f.kind == "image without label" and "'train'" in f.message)
    assert words in found.message
    assert str(copy) not in found.message
    with pytest.raises(UserError) as error:
        build_dataset("folder", root=copy, split="train", classes=CLASSES)
    if "swapped" not in words:
        assert words in str(error.value).replace(f"{copy}/", "")


def test_image_of_another_kind_is_named(copy: Path) -> None:
    (copy / "images/val/val1.png").rename(copy / "images/val/val1.gif")
    found = next(f for f in doctor(copy).findings if f.kind == "label without image")
    assert "images/val/val1.gif is not read: an image ends in .jpg" in found.message


def test_nothing_labelled_is_an_error(copy: Path) -> None:
    relabel(lambda a: a * 0 + 255)(copy)
    report = doctor(copy)
    assert not report.ok
    assert report.findings[0].message.startswith("train: every pixel is ignored and nothing can be learned")
    assert "absent class" not in {f.kind for f in report.findings}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions(copy):
    (copy / T0).chmod(0)
    finding = doctor(copy).findings[0]
    assert finding.kind == "unreadable label"
    assert "Permission denied" in finding.message


@pytest.mark.parametrize(
    ("name", "advised"),
    [
        ("0/255 masks", {0: 0, 255: 1}),
        ("stretched for display", {0: 0, 80: 1, 160: 2}),
        ("stretched to 16 bits", {0: 0, 257: 1, 514: 2}),
        ("stretched to 16 bits, void and all", {0: 0, 257: 1, 514: 2, 65535: "ignore"}),
        ("ids from one", {1: 0, 2: 1, 3: 2}),
        ("wrong id", {0: 0, 1: 1, 2: 2, 7: "ignore"}),
    ],
)
def test_advised_label_map_mends_the_dataset(copy, name, advised):
    FAULTS[name][0](copy)
    report = doctor(copy)
    assert report.advised_label_map == advised
    assert doctor(copy, label_map=advised).ok
    build_dataset("folder", root=copy, split="train", classes=CLASSES, label_map=advised).read(0)


def ids_become(*new: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: np.where(a == 255, 255, np.array([*new, *[0] * 253])[a]).astype(np.uint8)


@pytest.mark.parametrize(
    ("ids", "void", "advised"),
    [
        ((0, 7, 11), 255, {0: 0, 7: 1, 11: 2}),
        ((7, 8, 11), 255, {7: 0, 8: 1, 11: 2}),
        ((0, 128, 255), 0, {0: 0, 128: 1, 255: 2}),  # 255 may be a class
        ((100, 3, 50), 255, {3: 0, 50: 1, 100: 2}),
        ((0, 7, 9), 40, None),  # four ids for three classes
        ((5, 9, 9), 5, None),  # two
        ((0, 1, 3), 2, None),  # 0 to 3: which one is nothing? A third of the pixels would be lost
    ],
)
def test_advice_gives_each_id_its_class_or_none_is_given(copy, ids, void, advised):
    relabel(lambda a: np.where(a == 255, void, ids_become(*ids)(a)).astype(np.uint8))(copy)
    report = doctor(copy)
    assert report.advised_label_map == advised
    assert {row.raw_id for row in report.ids} == {*ids, void}
    assert sum(row.share for row in report.ids) == pytest.approx(1)
    text = io.StringIO()
    print_report(report, Console(file=text, width=200))
    for raw in {*ids, void}:
        assert re.search(rf"│ +{raw} +│|│ {raw} +│", text.getvalue())
    if advised is None:
        assert "no label_map is plain from these ids" in text.getvalue()
        assert "advised" not in text.getvalue()
    else:
        assert f"confirm this: {ids and min(advised)} is sky" in text.getvalue()
        pasted = doctor(copy, label_map=advised)
        assert pasted.ok
        assert all(row.pixels for row in pasted.classes)


def test_advice_says_how_many_pixels_it_ignores(copy):
    relabel(set_one(7), "train0.png")(copy)
    report = doctor(copy)
    assert report.advice_ignores == pytest.approx(1 / (6 * 120))
    text = io.StringIO()
    print_report(report, Console(file=text, width=200))
    assert "ignores 0.14% of the pixels" in text.getvalue()


def test_one_copy_of_each_image_stays_in_training(copy, tmp_path):
    """A blank tile twice in train and once in val, and a val image that is in train under another name."""
    for split, name in (("train", "t"), ("train", "u"), ("val", "v")):
        for part in ("images", "labels"):
            mode = "RGB" if part == "images" else "L"
            Image.new(mode, (9, 9)).save(copy / f"{part}/{split}/{name}.png")
    for part in ("images", "labels"):
        shutil.copy(copy / f"{part}/val/val0.png", copy / f"{part}/train/zz.png")
    report = doctor(copy)
    (finding,) = (f for f in report.findings if f.severity == "error")
    assert "(images/train/t.png = images/val/v.png)" in finding.message
    assert set(finding.files) == {"images/train/u.png", "images/val/v.png", "images/val/val0.png"}
    write_bad_files(report, tmp_path / "bad.txt")
    assert doctor(copy, exclude=tmp_path / "bad.txt").ok
    data = build_dataset("folder", root=copy, split="train", classes=CLASSES, exclude=tmp_path / "bad.txt")
    assert [data.name(i) for i in range(len(data))] == ["t", "train0", "train1", "train2", "train3", "zz"]


def test_excluding_the_bad_files_mends_the_dataset(copy, tmp_path):
    truncate("images/train/train2.png", 200)(copy)
    (copy / T0).unlink()
    report = doctor(copy)
    assert not report.ok
    write_bad_files(report, tmp_path / "bad.txt")
    assert doctor(copy, exclude=tmp_path / "bad.txt").ok
    data = build_dataset("folder", root=copy, split="train", classes=CLASSES, exclude=tmp_path / "bad.txt")
    assert [data.name(i) for i in range(len(data))] == ["train1", "train3"]


def test_class_table_and_weights_against_the_definitions(copy):
    relabel(lambda a: np.where(a == 2, 1, a), "train0.png")(copy)
    labels = [np.array(Image.open(copy / f"labels/train/train{i}.png")) for i in range(4)]
    report = doctor(copy)
    pixels = [sum(int((a == c).sum()) for a in labels) for c in range(3)]
    holders = [[a for a in labels if (a == c).any()] for c in range(3)]
    frequency = [pixels[c] / sum(int((a != 255).sum()) for a in holders[c]) for c in range(3)]
    for c, row in enumerate(report.classes):
        assert (row.name, row.pixels, row.images) == (CLASSES[c], pixels[c], len(holders[c]))
        assert row.share == pytest.approx(pixels[c] / sum(pixels))
        assert row.median_frequency_weight == pytest.approx(sorted(frequency)[1] / frequency[c], abs=1e-4)
        assert row.inverse_log_weight == pytest.approx(1 / np.log(1.02 + row.share), abs=1e-4)
    assert report.ignored_share == pytest.approx(sum(int((a == 255).sum()) for a in labels) / 480)


def test_absent_class_is_a_warning(copy):
    relabel(lambda a: np.where(a == 2, 1, a))(copy)
    report = doctor(copy)
    assert report.ok
    assert [f.message for f in report.findings] == ["1 class(es) have no pixel in train: tree"]
    assert report.classes[2].median_frequency_weight == 0


def test_report_as_json_and_as_text(copy):
    FAULTS["wrong id"][0](copy)
    report = doctor(copy)
    plain = json.loads(json.dumps(report.to_plain()))
    assert plain["ok"] is False
    assert plain["findings"][0]["files"] == [T0]
    assert plain["classes"][0]["name"] == "sky"
    text = io.StringIO()
    print_report(report, Console(file=text, width=120))
    for words in (
        "train0.png",
        "neither mapped nor ignored",
        "4 train, 2 val",
        "label_map: {0: 0, 1: 1, 2: 2, 7: ignore}",
        "errors",
    ):
        assert words in text.getvalue()


def test_progress_and_what_cannot_be_checked(sound):
    calls: list[tuple[int, int]] = []
    doctor(sound, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 6) for i in range(1, 7)]
    with pytest.raises(UserError, match="digits is composed on the fly"):
        check_dataset(DataConfig(name="digits"))
    with pytest.raises(UserError, match=r"data.root: folder .*nowhere"):
        doctor(sound / "nowhere")
