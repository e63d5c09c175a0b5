"""Lists, names and folders as people, editors and file systems write them."""

import codecs
import os
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from protoseg.commands.prediction_files import find_sources
from protoseg.config import DataConfig
from protoseg.data.datasets import build_dataset
from protoseg.data.doctor.check import check_dataset
from protoseg.data.reading.text_lists import is_hidden, read_excluded, read_lines
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import write_text

CLASSES = ["sky", "road", "tree"]
RNG = np.random.default_rng(0)


def write(path: Path, channels: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (4, 4, 3) if channels == 3 else (4, 4)
    Image.fromarray(RNG.integers(0, 256 if channels == 3 else 3, size).astype(np.uint8)).save(path)


def pair(root: Path, stem: str, image_form: str = "NFC", label_form: str = "NFC") -> None:
    write(root / "images" / (normalize(image_form, stem) + ".png"))
    write(root / "labels" / (normalize(label_form, stem) + ".png"), channels=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for stem in ("train/a b", "train/c", "train/träin", "val/c"):
        pair(tmp_path / "data", stem)
    return tmp_path / "data"


def names(root: Path, **given) -> list[str]:
    data = build_dataset("folder", root=root, split="train", classes=CLASSES, **given)
    return [data.name(i) for i in range(len(data))]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    (tmp_path / "list.txt").write_bytes(f"träin{end}two words{end}".encode(encoding))
    assert read_lines(tmp_path / "list.txt") == ["träin", "two words"]
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF16_BE + "ä".encode("utf-16-be"))
    assert read_lines(tmp_path / "list.txt") == ["ä"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "entry",
    [
        "images/train/träin.png", "labels/train/träin.png", "labels\\train\\träin.png",
        '"labels/train/träin.png"',
        "'labels\\train\\träin.png'", "  labels/train/träin.png ", "./labels/train/träin.png",
        "train/träin.png",
        "träin.png", "träin", "{root}/images/train/träin.png", "C:\\sets\\mine\\images\\train\\träin.png",
        "/home/me/mine/labels/train/träin.png", "labels/train/../train/träin.png",
    ],
)  # fmt: skip
def test_entries_of_an_exclude_list(root, tmp_path, entry, encoding):
    text = f"# made by hand\r\n\r\n{entry.format(root=root)}\r\n"
    (tmp_path / "bad.txt").write_bytes(text.encode(encoding))
    assert names(root, exclude=tmp_path / "bad.txt") == ["a b", "c"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("labels/train/trän.png", r"1: 'labels/train/trän.png' fits no file .*mean labels/train/träin.png"),
        ("images/train", "fits no file"),
        ("c.png", r"'c.png' fits images/train/c.png, images/val/c.png, labels.*; write the whole path"),
    ],
)  # fmt: skip
def test_an_entry_that_fits_no_file_or_several(root, tmp_path, entry, message):
    (tmp_path / "bad.txt").write_text(entry + "\n")
    with pytest.raises(UserError, match=message):
        names(root, exclude=tmp_path / "bad.txt")
    with pytest.raises(UserError, match=message):
        check_dataset(DataConfig(root=root, classes=CLASSES, exclude=tmp_path / "bad.txt"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize(
    "entry",
    [
        "träin",
        "träin  1",
        '"träin"',
        "träin.jpg",
        "JPEGImages/träin.jpg",
        "\\JPEGImages\\träin.jpg",
        "träin ",
    ],
)
def test_entries_of_a_split_list(tmp_path, entry, encoding):
    for stem in ("träin", "other"):
        write(tmp_path / f"JPEGImages/{stem}.jpg")
        write(tmp_path / f"SegmentationClass/{stem}.png", channels=1)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    listed = tmp_path / "ImageSets/Segmentation/train.txt"
    listed.write_bytes(f"{entry}\r\n".encode(encoding))
    data = build_dataset("voc", root=tmp_path, split="train")
    assert [data.name(i) for i in range(len(data))] == ["träin"]
    listed.write_bytes("träin\r\notehr\r\n".encode(encoding))
    with pytest.raises(UserError, match=r"1 listed name.s. without image .otehr; did you mean other\?"):
        build_dataset("voc", root=tmp_path, split="train")


HIDDEN = [
    ".ipynb_checkpoints", ".git", ".Trash-1000", ".AppleDouble", "@eaDir", "__MACOSX", "#recycle",
    "$RECYCLE.BIN", "System Volume Information", "lost+found",
]  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_folders_are_left_alone_everywhere(root, tmp_path, name):
    for place in (f"train/{name}", f"train/town/{name}/deep", name):
        pair(root, f"{place}/copy-checkpoint")
    write(root / f"images/train/{name}/alone.png")
    pair(root, "train/town/x")
    assert names(root) == ["a b", "c", "town/x", "träin"]
    report = check_dataset(DataConfig(root=root, classes=CLASSES))
    assert report.images == {"train": 4, "val": 1}
    with pytest.raises(UserError, match=r"has train, val; name one of these, or add it$"):
        build_dataset("folder", root=root, split="test", classes=CLASSES)
    for given in (str(root / "images"), f"{root}/images/**/*.png"):
        found = find_sources([given], tmp_path / "out")
        assert sorted(Path(each.path).stem for each in found) == ["a b", "c", "c", "träin", "x"], given
    # what is named is meant
    assert len(find_sources([str(root / f"images/train/{name}")], tmp_path / "out")) == 2


def test_what_is_no_hidden_name():
    assert not any(map(is_hidden, ["train", "@home", "_old", "#1", "$x", "MACOSX"]))


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_names_are_paired_in_any_unicode_form(tmp_path, forms):
    for stem in ("train/rue_é", "train/straße_ü", "train/Ångström/が"):
        pair(tmp_path, stem, *forms)
    assert names(tmp_path) == ["rue_é", "straße_ü", "Ångström/が"]
    for form in ("NFC", "NFD"):
        (tmp_path / "bad.txt").write_text(normalize(form, "images/train/rue_é.png"), encoding="utf-8")
        assert names(tmp_path, exclude=tmp_path / "bad.txt") == ["straße_ü", "Ångström/が"]
    report = check_dataset(DataConfig(root=tmp_path, classes=CLASSES, val_split="train"))
    assert report.ok


def test_two_forms_of_one_name_are_two_files_of_one_stem(tmp_path):
    pair(tmp_path, "train/é", "NFC", "NFC")
    pair(tmp_path, "train/é", "NFD", "NFC")
    with pytest.raises(UserError, match="has the same stem"):
        names(tmp_path)


def test_a_name_that_is_not_utf8_goes_through_the_list_of_bad_files(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"stra\xdfe.png")
    file.touch()
    write_text(tmp_path / "bad.txt", f"# bad\n{file.name}\n")
    assert read_excluded(tmp_path / "bad.txt", tmp_path) == {file}
