import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protoseg.data.classes.palette import default_palette
from protoseg.data.datasets import build_dataset
from protoseg.data.reading.decode import read_image, read_label_ids
from protoseg.data.reading.label_ids import LabelIds, id_ranges
from protoseg.data.specs import DATASETS
from protoseg.runtime.errors import UserError

RNG = np.random.default_rng(0)
CLASSES = ["sky", "road", "tree"]


def write_pair(
    root: Path, split: str, stem: str, label: np.ndarray | None = None, ending: str = ".png"
) -> None:
    label = RNG.integers(0, 3, (6, 8)).astype(np.uint8) if label is None else label
    image = RNG.integers(0, 256, (*label.shape, 3)).astype(np.uint8)
    for folder, array in (("images", image), ("labels", label)):
        path = root / folder / split / (stem + (ending if folder == "images" else ".png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            write_pair(tmp_path, split, f"{split}{i}")
    return tmp_path


def folder(root: Path, split: str = "train", **given):
    return build_dataset("folder", root=root, split=split, classes=CLASSES, **given)


# ---- images


@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg", ".jpeg", ".PNG"])
def test_colour_images_keep_their_pixels(tmp_path, ending):
    array = RNG.integers(0, 256, (9, 7, 3)).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / f"a{ending}", **({"quality": 98} if "jp" in ending else {}))
    image = read_image(tmp_path / f"a{ending}")
    assert image.shape == (3, 9, 7)
    assert image.dtype == torch.uint8
    if "jp" not in ending:
        assert np.array_equal(image.permute(1, 2, 0).numpy(), array)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "1"])
def test_other_images_become_rgb(tmp_path, mode, ending):
    grey = RNG.integers(0, 256, (5, 4)).astype(np.uint8)
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / f"a{ending}")
    elif mode == "1":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
        Image.fromarray(grey).convert("1", dither=Image.Dither.NONE).save(tmp_path / f"a{ending}")
    else:
        Image.fromarray(grey).convert(mode).save(tmp_path / f"a{ending}")
    assert np.array_equal(read_image(tmp_path / f"a{ending}").numpy(), np.stack([grey] * 3))


@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("fault", ["truncated", "empty", "text", "missing"])
def test_unreadable_image_is_named(tmp_path, ending, fault):
    path = tmp_path / f"broken{ending}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(path)
    content = {"truncated": path.read_bytes()[:1500], "empty": b"", "text": b"hello", "missing": b""}[fault]
    path.write_bytes(content)
    if fault == "missing":
        path.unlink()
    with pytest.raises(UserError, match=f"broken{ending}: cannot read this image") as error:
        read_image(path)
    assert "\n" not in str(error.value)


# ---- labels


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
def test_png_labels_of_few_bits_keep_their_ids(tmp_path, bits, palette):
    ids = RNG.integers(0, 2**bits, (5, 11)).astype(np.uint8)
    if palette:
        file = Image.fromarray(ids, mode="P")
        file.putpalette(RNG.integers(0, 256, 768).tolist())
        file.save(tmp_path / "a.png", bits=bits)
    else:
        write_grey_png(tmp_path / "a.png", ids, bits)
    assert np.array_equal(read_label_ids(tmp_path / "a.png"), ids)


def write_grey_png(path: Path, ids: np.ndarray, bits: int) -> None:
    """A grey PNG of any bit depth, written from the specification: Pillow cannot write 2 and 4 bits."""
    import struct
    import zlib

    rows = []
    for row in ids:
        text = "".join(f"{v:0{bits}b}" for v in row)
        text += "0" * (-len(text) % 8)
        rows.append(b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_of_8_and_16_bits(tmp_path, ending, dtype):
    ids = RNG.integers(0, np.iinfo(dtype).max + 1, (5, 7)).astype(dtype)
    Image.fromarray(ids).save(tmp_path / f"a{ending}")
    assert np.array_equal(read_label_ids(tmp_path / f"a{ending}"), ids)


@pytest.mark.parametrize(
    ("mode", "ending"), [("RGB", ".png"), ("RGBA", ".png"), ("LA", ".png"), ("RGB", ".tif")]
)
def test_colour_mask_is_called_one(tmp_path, mode, ending):
    Image.new(mode, (4, 4)).save(tmp_path / f"mask{ending}")
    with pytest.raises(UserError, match=f"mask{ending}: this label is a colour mask"):
        read_label_ids(tmp_path / f"mask{ending}")


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_unreadable_label_is_named(tmp_path, ending):
    path = tmp_path / f"broken{ending}"
    Image.fromarray(RNG.integers(0, 256, (64, 64)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=f"broken{ending}: cannot read this label"):
        read_label_ids(path)


# ---- ids


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_label_map_against_a_loop(dtype):
    raw = RNG.choice([0, 3, 7, 255, 40000 if dtype != np.uint8 else 7], (20, 30)).astype(dtype)
    label = LabelIds(3, 255, {0: "ignore", 3: 2, 7: 0, 40000: 1}).to_classes(raw, Path("a.png"))
    expected = [[{0: 255, 3: 2, 7: 0, 255: 255, 40000: 1}[int(v)] for v in row] for row in raw]
    assert label.dtype == np.uint8
    assert label.flags.writeable, "torch warns of arrays that are not"
    assert label.tolist() == expected


@pytest.mark.parametrize(
    ("count", "ignored", "dtype"),
    [
        (2, 255, np.uint8),
        (254, 255, np.uint8),
        (255, 255, np.int32),
        (19, 65535, np.int32),
        (847, 65535, np.int32),
    ],
)
def test_label_dtype_and_strange_ids_at_the_limits(count, ignored, dtype):
    ids = LabelIds(count, ignored, None)
    label = ids.to_classes(np.array([[0, count - 1, ignored]], dtype=np.uint16), Path("a.png"))
    assert label.dtype == dtype
    assert label.tolist() == [[0, count - 1, ignored]]
    for strange in {count, 254, 256, 65534} - {ignored}:
        if strange >= count:
            with pytest.raises(UserError, match=rf"a.png: label ids {strange} are neither"):
                ids.to_classes(np.array([[0, strange]], dtype=np.uint16), Path("a.png"))


def test_an_explicit_map_may_use_the_ignored_id():
    label = LabelIds(2, 255, {0: 0, 255: 1}).to_classes(np.array([[0, 255]], dtype=np.uint8), Path("a.png"))
    assert label.tolist() == [[0, 1]]


def test_ids_beyond_16_bits():
    with pytest.raises(UserError, match=r"a.tif: ids run from -1 to 70000"):
        LabelIds(2, 255, None).to_classes(np.array([[-1, 70000]], dtype=np.int32), Path("a.tif"))


def test_id_ranges():
    assert id_ranges([0, 1, 2, 5, 7, 8, 255]) == "0-2, 5, 7-8, 255"
    assert id_ranges(range(0, 60, 2), longest=3) == "0, 2, 4, … (30 ids)"


# ---- trees


def test_folder_reads_pairs(tree):
    data = folder(tree)
    assert len(data) == 3
    assert [data.name(i) for i in range(3)] == ["train0", "train1", "train2"]
    image, label = data.read(1)
    assert np.array_equal(label, np.asarray(Image.open(tree / "labels/train/train1.png")))
    assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(tree / "images/train/train1.png")))
    assert data.classes == ("sky", "road", "tree")
    assert data.palette == default_palette(3)
    assert data.ignore_index == 255


def test_joined_splits_and_subfolders(tree):
    write_pair(tree, "train", "town/a", ending=".jpg")
    write_pair(tree, "val", "town/a", ending=".tif")
    data = folder(tree, "train+val")
    names = [data.name(i) for i in range(len(data))]
    assert names == [
        *("train/town/a", "train/train0", "train/train1", "train/train2"),
        *("val/town/a", "val/val0", "val/val1"),
    ]
    assert data.read(4)[0].shape == (3, 6, 8)


def test_names_in_the_label_map(tree):
    data = folder(tree, label_map={0: "tree", 1: "ignore", 2: 0})
    raw = np.asarray(Image.open(tree / "labels/train/train0.png"))
    assert data.read(0)[1].tolist() == np.array([2, 255, 0])[raw].tolist()


def test_exclude_takes_both_files(tree, tmp_path):
    (tree / "labels/train/train0.png").unlink()
    listing = tmp_path / "bad.txt"
    listing.write_text("# from check_data\nimages/train/train0.png\nlabels/train/train2.png\n")
    data = folder(tree, exclude=listing)
    assert [data.name(i) for i in range(len(data))] == ["train1"]
    with pytest.raises(UserError, match=r"data.exclude: cannot read .*nowhere"):
        folder(tree, exclude=tmp_path / "nowhere")


def test_linked_folders_are_followed(tree, tmp_path):
    for part in ("images", "labels"):
        (tree / part / "linked").mkdir()
        (tree / part / "linked" / "town").symlink_to(tree / part / "val")
    data = folder(tree, "linked")
    assert [data.name(i) for i in range(len(data))] == ["town/val0", "town/val1"]


def test_link_to_a_folder_around_it(tree):
    (tree / "images/train/again").symlink_to(tree / "images")
    with pytest.raises(UserError, match=r"train/again: links to a folder that it lies in; remove the link"):
        folder(tree)


def test_folder_that_cannot_be_read(tree, monkeypatch):
    scandir = os.scandir

    def locked(path):  # a mode of 000 does not stop root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (tree / "images/train/locked").mkdir()
    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UserError, match=r"train/locked: cannot read this folder \(Permission denied\)"):
        folder(tree)


def test_hidden_and_foreign_files_are_left_alone(tree):
    (tree / "images/train/._train0.png").write_bytes(b"junk of a file system")
    (tree / "images/train/Thumbs.db").write_bytes(b"junk")
    assert len(folder(tree)) == 3


def test_missing_root_and_split(tree):
    with pytest.raises(UserError, match=r"data.root: folder .*nowhere does not exist"):
        folder(tree / "nowhere")
    with pytest.raises(UserError, match=r"images/test does not exist; .* has train, val"):
        folder(tree, "test")
    with pytest.raises(UserError, match=r"no split 'minival'; use one of train, val, test"):
        build_dataset("camvid", root=tree, split="minival")
    with pytest.raises(UserError, match=r"images/training does not exist.*sceneparsing.csail.mit.edu"):
        build_dataset("ade20k", root=tree, split="train")
    with pytest.raises(UserError, match=r"data.root: folder data/voc does not exist; 'voc' belongs there"):
        build_dataset("voc", split="train")
    with pytest.raises(UserError, match=r"no dataset 'camvod'; use one of digits, folder, camvid"):
        build_dataset("camvod", root=tree, split="train")


def test_files_without_partner_are_counted_and_named(tree):
    for i in range(2):
        (tree / f"labels/train/train{i}.png").unlink()
    write_pair(tree, "train", "lonely")
    (tree / "images/train/lonely.png").unlink()
    with pytest.raises(
        UserError, match=r"2 image\(s\) without label \(.*train0.png, .*train1.png\)"
    ) as error:
        folder(tree)
    assert "1 label(s) without image" in str(error.value)
    assert "lonely.png" in str(error.value)


def test_two_images_of_one_stem(tree):
    write_pair(tree, "train", "train0", ending=".jpg")
    with pytest.raises(UserError, match=r"train0.png: has the same stem as train0.jpg"):
        folder(tree)


def test_empty_split(tree):
    for part in ("images", "labels"):
        (tree / part / "none").mkdir()
    with pytest.raises(UserError, match="split 'none': no images found"):
        folder(tree, "none")


def test_size_mismatch_names_both_files(tree):
    Image.new("L", (8, 7)).save(tree / "labels/train/train0.png")
    with pytest.raises(
        UserError, match=r"labels/train/train0.png: label is 8 x 7 .*train0.png is 8 x 6"
    ) as error:
        folder(tree).read(0)
    assert "EXIF" not in str(error.value)
    Image.new("L", (6, 8)).save(tree / "labels/train/train0.png")
    with pytest.raises(UserError, match="EXIF"):
        folder(tree).read(0)


def test_unknown_label_id_lists_found_and_allowed(tree):
    Image.fromarray(np.array([[0, 9] * 4] * 6, dtype=np.uint8)).save(tree / "labels/train/train0.png")
    with pytest.raises(UserError, match=r"train0.png: label ids 9 .*found 0, 9, ids allowed 0-2, 255"):
        folder(tree).read(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tree):
    (tree / "images/train/train0.png").chmod(0)
    with pytest.raises(UserError, match=r"train0.png: cannot read this image \(Permission denied\)"):
        folder(tree).read(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": None}, "data.classes: a folder dataset needs"),
        ({"classes": ["a", "a"]}, "names must differ"),
        ({"classes": ["a", "ignore"]}, "'ignore' is reserved"),
        ({"ignore_index": 1}, "data.ignore_index: 1 must be outside"),
        ({"palette": [(0, 0, 0)]}, "data.palette: wants 3 RGB"),
        ({"palette": [(0, 0, 0), (1, 1, 1), (2, 2, 256)]}, "data.palette: wants 3 RGB"),
        ({"label_map": {0: 3}}, "raw id 0 goes to 3"),
        ({"label_map": {0: "rode"}}, "raw id 0 goes to 'rode'"),
        ({"label_map": {0: True}}, "data.label_map: a name was read as True; put"),
        ({"label_map": {-1: 0}}, "raw id -1 must be"),
        ({"label_map": {70000: 0}}, "raw id 70000 must be"),
    ],
)
def test_wrong_descriptions_of_a_folder(tree, given, message):
    with pytest.raises(UserError, match=message):
        build_dataset("folder", root=tree, split="train", **({"classes": CLASSES} | given))


def test_other_datasets_bring_their_own_description(tree):
    with pytest.raises(UserError, match="'camvid' brings its own"):
        build_dataset("camvid", root=tree, split="train", ignore_index=11)
    assert build_dataset("digits", root=None, split="val").classes == DATASETS["digits"].classes


@pytest.mark.parametrize("count", [1, 11, 60, 300])
def test_default_palette_colours_differ(count):
    palette = np.array(default_palette(count))
    assert palette.shape == (count, 3)
    apart = np.abs(palette[:, None] - palette[None]).max(-1) + 999 * np.eye(count)
    assert apart.min() >= 20


# ---- published datasets


def test_ade20k_ids(tmp_path):
    for what, array in (
        ("images", np.zeros((2, 3, 3))),
        ("annotations", np.array([[0, 1, 2], [75, 149, 150]])),
    ):
        (tmp_path / what / "validation").mkdir(parents=True)
        ending = "jpg" if what == "images" else "png"
        Image.fromarray(array.astype(np.uint8)).save(
            tmp_path / what / f"validation/ADE_val_00000001.{ending}"
        )
    data = build_dataset("ade20k", root=tmp_path, split="val")
    assert data.read(0)[1].tolist() == [[255, 0, 1], [74, 148, 149]]
    assert len(data.classes) == len(data.palette) == len(set(data.classes)) == 150
    assert data.classes[:3] == ("wall", "building", "sky")
    assert [data.classes[i] for i in (12, 80, 149)] == ["person", "bus", "flag"]
    assert data.palette[0] == (120, 120, 120)


CAMVID = Path(os.environ.get("PROTOSEG_CAMVID", "data/camvid"))


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}: set PROTOSEG_CAMVID to test it")
def test_camvid_splits():
    sizes = {
        split: len(build_dataset("camvid", root=CAMVID, split=split)) for split in ("train", "val", "test")
    }
    assert sizes == {"train": 367, "val": 101, "test": 233}
    data = build_dataset("camvid", root=CAMVID, split="val")
    seen = np.zeros(256, dtype=np.int64)
    for i in range(0, len(data), 5):
        image, label = data.read(i)
        assert image.shape == (3, 360, 480)
        seen += np.bincount(label.numpy().ravel(), minlength=256)
    assert set(np.flatnonzero(seen)) == {*range(11), 255}
    assert data.classes[int(seen[:11].argmax())] in ("road", "building")
