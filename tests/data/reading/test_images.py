"""Images as people have them: turned by a tag, of any depth, with pages and bands."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from tiny import CLASSES

from protoseg.config import DataConfig
from protoseg.data.datasets import build_dataset
from protoseg.data.doctor.check import check_dataset
from protoseg.data.reading.decode import read_image, read_label_ids
from protoseg.data.reading.value_range import Extremes, common_range, measure_range
from protoseg.runtime.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (16, 24, 3)).astype(np.uint8)
BLOCKS = COLOUR[::8, ::8].repeat(8, 0).repeat(8, 1)  # survives JPEG


def hwc(path: Path, **options) -> np.ndarray:
    return read_image(path, **options).permute(1, 2, 0).numpy()


def save(path: Path, array: np.ndarray, orientation: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}
    Image.fromarray(array).save(path, exif=exif, **options.get(path.suffix, {}))
    return path


def folder(root: Path, images: dict[str, np.ndarray], split: str = "train", **tags) -> dict:
    """Writes images and labels of their sizes; returns the data section."""
    for name, image in images.items():
        path = root / "images" / split / name
        if path.suffix == ".tif":
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, image)
        else:
            save(path, image, tags.get("orientation"))
        label = RNG.integers(0, 3, tags.get("label", image.shape[:2])).astype(np.uint8)
        save(root / "labels" / split / (path.stem + ".png"), label)
    return {"root": root, "classes": CLASSES}


# ---- turned


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_images_are_turned_as_viewers_turn_them(tmp_path, orientation, ending):
    path = save(tmp_path / f"a{ending}", BLOCKS, orientation)
    with Image.open(path) as file:
        shown = np.asarray(ImageOps.exif_transpose(file).convert("RGB")).astype(int)
    assert hwc(path).shape == shown.shape
    assert np.abs(hwc(path) - shown).max() <= 8
    stored = hwc(path, upright=False).astype(int)
    assert stored.shape == BLOCKS.shape
    assert np.abs(stored - BLOCKS).max() <= 8


def test_turned_by_hand(tmp_path):
    """The first row and column of what is stored, as EXIF 2.32 names them."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 20
    expected = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T,
        6: stored[::-1].T, 7: stored[::-1, ::-1].T, 8: stored.T[::-1],
    }  # fmt: skip
    for tag, shown in expected.items():
        for ending in (".png", ".tif"):
            path = save(tmp_path / f"a{tag}{ending}", stored, tag)
            assert np.array_equal(read_image(path)[0], shown), (tag, ending)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_labels_are_turned_alike(tmp_path, ending, tag):
    ids = RNG.integers(0, 9, (5, 8)).astype(np.uint8)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(save(tmp_path / "shown.png", ids, tag))))
    assert np.array_equal(read_label_ids(save(tmp_path / f"a{ending}", ids, tag)), shown)
    assert np.array_equal(read_image(tmp_path / f"a{ending}")[0], shown)


def test_a_label_that_fits_the_stored_image_alone_says_which_setting(tmp_path):
    data = folder(tmp_path, {"a.jpg": BLOCKS, "b.jpg": BLOCKS[::-1]}, orientation=6)
    data_set = build_dataset("folder", split="train", **data)
    with pytest.raises(UserError, match=r"label is 24 x 16 .* is 16 x 24; .*say data.exif: ignore"):
        data_set.read(0)
    assert build_dataset("folder", split="train", exif="ignore", **data).read(0)[0].shape == (3, 16, 24)
    report = check_dataset(DataConfig(val_split="train", **data))
    finding = next(f for f in report.findings if f.kind == "size mismatch")
    assert "say data.exif: ignore" in finding.message
    data = folder(tmp_path / "upright", {"a.jpg": BLOCKS}, orientation=8, label=(24, 16))
    with pytest.raises(UserError, match=r"say data.exif: apply"):
        build_dataset("folder", split="train", exif="ignore", **data).read(0)


@pytest.mark.parametrize(("exif", "words"), [("apply", "turned as viewers"), ("ignore", "leaves them")])
def test_the_doctor_names_images_with_a_tag(tmp_path, exif, words):
    data = folder(tmp_path, {"a.png": COLOUR}, orientation=3)
    folder(tmp_path, {"b.png": COLOUR[:, ::-1]}, orientation=1)
    report = check_dataset(DataConfig(val_split="train", exif=exif, **data))
    (finding,) = (f for f in report.findings if f.kind == "orientation tag")
    assert finding.files == ("images/train/a.png",)
    assert words in finding.message
    assert report.ok


# ---- depth


def grey16(ending: str, dtype: str, factor: float) -> np.ndarray:
    grey = COLOUR[..., 0].astype(np.float64)
    grey[0, :2] = 0, 255
    values = grey * factor
    return (values if dtype.startswith("float") else values.round()).astype(dtype)


@pytest.mark.parametrize(
    ("ending", "dtype", "factor", "measured"),
    [
        (".png", "uint16", 16, (0, 4095)),  # 12 bits
        (".png", "uint16", 4, (0, 1023)),  # 10 bits
        (".png", "uint16", 257, (0, 65535)),
        (".tif", "uint16", 39, (0, 16383)),  # reflectance to 10,000
        (".tif", "int16", 16, (0, 4095)),
        (".tif", "int32", 1, (0, 255)),
        (".tif", "uint32", 65536, (0, 2**24 - 1)),
        (".tif", "float32", 1 / 255, (0, 1)),
        (".tif", "float64", 1, (0, 255)),
    ],
)
def test_deep_images_fill_the_range_of_their_values(tmp_path, ending, dtype, factor, measured):
    values = grey16(ending, dtype, factor)
    data = folder(tmp_path, {f"a{ending}": values, f"b{ending}": values // 2 if factor >= 1 else values / 2})
    images = build_dataset("folder", split="train", **data)
    assert images.read_image.value_range == pytest.approx(measured)
    high = measured[1]
    for index, scale in ((0, 1), (1, 2)):  # the darker image stays darker: one range for both
        expected = values.astype(np.float64) / scale / high * 255
        assert np.abs(images.read(index)[0].numpy() - expected).max() <= 1 + 0.5 * (dtype != "float32")
    assert len(np.unique(images.read(0)[0])) > 100
    report = check_dataset(DataConfig(val_split="train", **data))
    assert report.value_range == pytest.approx(measured)
    assert report.ok


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_colour_tiff_of_16_bits(tmp_path, compression, planar, bigtiff):
    values = COLOUR.astype(np.uint16) * 257
    stored = values if planar == "contig" else np.ascontiguousarray(values.transpose(2, 0, 1))
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, compression=compression,
        bigtiff=bigtiff,
    )  # fmt: skip
    assert np.array_equal(hwc(tmp_path / "a.tif"), COLOUR)
    assert np.array_equal(hwc(tmp_path / "a.tif", value_range=(0, 65535)), COLOUR)


def test_what_lies_beyond_the_range_and_is_no_number(tmp_path):
    values = np.array([[-5.0, 0.0, 5.0, 10.0, 99.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    got = read_image(tmp_path / "a.tif", value_range=(0, 10))[0, 0].tolist()
    assert got == [0, 0, 128, 255, 255, 0, 255, 0]


@pytest.mark.parametrize(("dtype", "nothing"), [("int16", -9999), ("uint16", 65535), ("float32", -3.4e38)])
def test_pixels_without_a_measurement_do_not_stretch_the_range(tmp_path, dtype, nothing):
    values = grey16(".tif", dtype, 16)
    data = folder(tmp_path, {"a.tif": values})
    values[:4] = nothing
    tag = (42113, "s", 0, str(nothing), True)
    tifffile.imwrite(tmp_path / "images/train/a.tif", values, extratags=[tag])
    images = build_dataset("folder", split="train", **data)
    assert images.read_image.value_range == (0, 4095)
    image = images.read(0)[0][0]
    assert (image[:4] == 0).all()
    assert np.abs(image[4:].numpy() - values[4:].astype(np.float64) / 4095 * 255).max() <= 0.51


def test_eight_bits_among_images_of_sixteen_are_refused(tmp_path):
    path = save(tmp_path / "a.png", COLOUR)
    with pytest.raises(
        UserError, match=r"8 bits, but the range of the others is 0 to 4095.*--value-range 0 255"
    ):
        read_image(path, value_range=(0, 4095))
    assert np.array_equal(hwc(path, value_range=(0, 255)), COLOUR)


@pytest.mark.parametrize(("dtype", "top"), [("uint16", 4000), ("int32", 200), ("float32", 0.5)])
def test_no_range_is_guessed_from_one_image(tmp_path, dtype, top):
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 4), top, dtype))
    with pytest.raises(UserError, match=rf"{dtype} values from {top} to.*data.value_range.*--value-range"):
        read_image(tmp_path / "a.tif")


def test_range_by_hand():
    whole = Extremes(3, 2500, "int16", True)
    assert common_range([whole, whole._replace(low=-100)]) == (-100, 2500)
    assert common_range([whole._replace(high=7)]) == (0, 255)
    assert common_range([Extremes(0.2, 3.5, "float32", False)]) == (0, 3.5)
    assert common_range([Extremes(0, 9, "uint8", True)]) is None
    assert common_range([Extremes(0, 9, "uint8", True), whole._replace(high=200)]) == (0, 255)
    with pytest.raises(UserError, match=r"1 image.s. have 8 bits and 1 hold values from 0 to 2500"):
        common_range([Extremes(0, 9, "uint8", True), whole])


def test_eight_bits_are_never_read_for_the_range(tmp_path):
    paths = [
        save(tmp_path / "a.png", COLOUR),
        save(tmp_path / "a.jpg", COLOUR),
        save(tmp_path / "a.tif", COLOUR),
    ]

    def read(path):
        raise AssertionError(path)

    assert measure_range(paths, read) is None


def test_mixed_depths_and_images_of_one_grey_are_found(tmp_path):
    data = folder(tmp_path, {"a.png": COLOUR, "b.png": COLOUR[..., 0].astype(np.uint16) * 257})
    (finding,) = (
        f for f in check_dataset(DataConfig(val_split="train", **data)).findings if f.severity == "error"
    )
    assert finding.kind == "mixed depths"
    assert finding.files == ("images/train/b.png",)
    with pytest.raises(UserError, match="bring them to one depth"):
        build_dataset("folder", split="train", **data)
    data = folder(tmp_path / "flat", {"a.png": COLOUR, "dark.png": COLOUR // 12})
    findings = check_dataset(DataConfig(val_split="train", **data)).findings
    assert [(f.kind, f.files) for f in findings] == [("little contrast", ("images/train/dark.png",))]
    data |= {"value_range": (0, 100)}
    kinds = {f.kind: f.files for f in check_dataset(DataConfig(val_split="train", **data)).findings}
    assert kinds["values cut off"] == ("images/train/a.png",)


# ---- pages and bands


def bands_by_hand(path: Path, values: np.ndarray) -> None:
    """(H, W, n) uint8 as a TIFF without a word on what its bands are: header, strip, one directory."""
    height, width, n = values.shape
    data = values.tobytes()
    at = 8 + len(data)
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, n, at + 2 + 12 * 9 + 4), (259, 3, 1, 1),
        (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, n), (278, 3, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<I", at) + data + struct.pack("<H", len(tags))
    path.write_bytes(
        head
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + b"\0" * 4
        + struct.pack(f"<{n}H", *[8] * n)
    )


def test_more_bands_than_three_are_chosen_or_refused(tmp_path):
    values = RNG.integers(0, 256, (8, 8, 5)).astype(np.uint8)
    bands_by_hand(tmp_path / "five.tif", values)
    with pytest.raises(UserError, match=r"five.tif: .*it has 5 bands: name three.*data.bands.*--bands"):
        read_image(tmp_path / "five.tif")
    assert np.array_equal(hwc(tmp_path / "five.tif", bands=(5, 1, 3)), values[..., [4, 0, 2]])
    with pytest.raises(UserError, match="there is no band 6, it has 5"):
        read_image(tmp_path / "five.tif", bands=(6, 1, 1))
    bands_by_hand(tmp_path / "three.tif", values[..., :3])
    assert np.array_equal(hwc(tmp_path / "three.tif"), values[..., :3])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_near_infrared_is_no_alpha(tmp_path, dtype):
    values = (RNG.integers(1, 256, (8, 8, 4)) * (257 if dtype == "uint16" else 1)).astype(dtype)
    for name, kind in (("nir", "unspecified"), ("alpha", "unassalpha")):
        tifffile.imwrite(tmp_path / f"{name}.tif", values, photometric="rgb", extrasamples=[kind])
    with pytest.raises(UserError, match="it has 4 bands"):
        read_image(tmp_path / "nir.tif")
    expected = values if dtype == "uint8" else values >> 8
    assert np.array_equal(hwc(tmp_path / "nir.tif", bands=(4, 1, 2)), expected[..., [3, 0, 1]])
    assert np.array_equal(hwc(tmp_path / "alpha.tif"), expected[..., :3])


def stack(path: Path, kind: str) -> list[np.ndarray]:
    pages = [RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(3)]
    first, *rest = (Image.fromarray(page) for page in pages)
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(path, format=kind, save_all=True, append_images=rest, **options)
    return pages


@pytest.mark.parametrize(("name", "kind"), [("a.tif", "TIFF"), ("a.png", "PNG"), ("a.webp", "WEBP")])
def test_pages_are_chosen_or_refused(tmp_path, name, kind):
    pages = stack(tmp_path / name, kind)
    with pytest.raises(
        UserError, match=rf"{name}: .*it holds 3 pages: name one with data.page .predict: --page"
    ):
        read_image(tmp_path / name)
    for number, page in enumerate(pages, 1):
        assert np.array_equal(hwc(tmp_path / name, page=number), page)
    with pytest.raises(UserError, match="there is no page 4, it holds 3"):
        read_image(tmp_path / name, page=4)


def test_overviews_are_no_pages_and_a_label_has_one(tmp_path):
    with tifffile.TiffWriter(tmp_path / "map.tif") as file:
        file.write(COLOUR, photometric="rgb")
        file.write(COLOUR[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(hwc(tmp_path / "map.tif"), COLOUR)
    data = folder(tmp_path / "d", {"a.png": COLOUR})
    (tmp_path / "d/labels/train/a.png").unlink()
    tifffile.imwrite(
        tmp_path / "d/labels/train/a.tif", np.zeros((2, 16, 24), np.uint8), photometric="minisblack"
    )
    with pytest.raises(UserError, match=r"a.tif: cannot read this label .it holds 2 pages, wants one"):
        build_dataset("folder", split="train", **data).read(0)


def test_bands_and_page_of_a_dataset(tmp_path):
    data = folder(tmp_path, {"a.tif": np.zeros((16, 24), np.uint8)})
    values = RNG.integers(0, 256, (2, 16, 24, 4)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "images/train/a.tif", values, photometric="rgb", extrasamples=["unspecified"])
    chosen = build_dataset("folder", split="train", bands=(4, 3, 2), page=2, **data)
    assert np.array_equal(chosen.read(0)[0].permute(1, 2, 0), values[1][..., [3, 2, 1]])
    other = build_dataset("folder", split="train", bands=(4, 3, 2), page=1, **data)
    assert chosen.stamp(0) != other.stamp(0), "what is kept of an image is kept of this reading of it"


def test_palette_inverted_grey_and_few_bits(tmp_path):
    grey = COLOUR[..., 0]
    tifffile.imwrite(tmp_path / "white.tif", grey, photometric="miniswhite")
    assert np.array_equal(read_image(tmp_path / "white.tif")[0], 255 - grey)
    tifffile.imwrite(tmp_path / "bits.tif", grey > 99, photometric="minisblack")
    assert np.array_equal(read_image(tmp_path / "bits.tif")[0], np.where(grey > 99, 255, 0))
    exif = Image.Exif()
    for tag, expected in ((1, BLOCKS), (6, BLOCKS[::-1].transpose(1, 0, 2))):
        exif[0x0112] = tag
        Image.fromarray(BLOCKS).convert("CMYK").save(tmp_path / "ink.tif", exif=exif)
        assert np.abs(hwc(tmp_path / "ink.tif").astype(int) - expected).max() <= 8
