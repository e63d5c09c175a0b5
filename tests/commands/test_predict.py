"""The predict command: what it finds, what it writes, and that its parts overlap."""

import os
import re
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, PALETTE, SIZES, tiny_config, write_checkpoint, write_folder

from protoseg.commands import predict as predicting
from protoseg.commands.cli import execute as command
from protoseg.commands.prediction_files import AHEAD, ahead, attempt, find_sources, id_image
from protoseg.commands.video import read_frames
from protoseg.data.reading.decode import read_image
from protoseg.evaluation.inference import segment
from protoseg.models.segmenter import Segmenter
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import DiskError, safe_name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Segmenter]:
    """A checkpoint, three images below it, and the model in it."""
    root = tmp_path_factory.mktemp("predict")
    write_folder(root / "data", ("val",))
    (root / "data/images/val/deeper").mkdir()
    (root / "data/images/val/2.png").rename(root / "data/images/val/deeper/2.png")
    values = tiny_config(root / "data")
    values["data"]["label_map"] = {7: "road", 11: "car", 200: "tree", 255: "ignore"}
    return root, write_checkpoint(root / "last.pt", values)


def test_a_folder(model: tuple[Path, Segmenter], tmp_path: Path) -> None:
    root, segmenter = model
    images = root / "data/images/val"
    options = ["--out", str(tmp_path), "--confidence", "--prototypes"]
    assert command("predict", [str(root / "last.pt"), str(images), *options]) == 0
    for name, size in zip(("0", "1", "deeper/2"), SIZES):
        image = read_image(images / f"{name}.png")
        expected = segment(segmenter, image, confidence=True, prototypes=True)
        assert expected.confidence is not None
        assert expected.prototypes is not None
        with Image.open(tmp_path / f"labels/{name}.png") as label:
            assert label.mode == "P"
            assert label.size == size[::-1]
            assert np.array_equal(np.array(label), expected.classes.numpy())
            colours = np.array(label.convert("RGB"))
        assert np.array_equal(colours, np.array(PALETTE, np.uint8)[expected.classes.numpy()])
        overlay = np.array(Image.open(tmp_path / f"overlays/{name}.jpg")).astype(int)
        half = (image.permute(1, 2, 0).numpy().astype(int) + colours) // 2
        assert overlay.shape == half.shape
        assert abs(overlay - half).mean() < 12, "JPEG of the two halves"
        grey = np.array(Image.open(tmp_path / f"confidence/{name}.png"))
        assert abs(grey / 255 - expected.confidence.numpy()).max() < 0.0021
        index = np.array(Image.open(tmp_path / f"prototypes/{name}.png"))
        assert np.array_equal(index, expected.prototypes.numpy())
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 12, written


def test_raw_ids_are_the_datasets_own(model: tuple[Path, Segmenter], tmp_path: Path) -> None:
    root, segmenter = model
    file = root / "data/images/val/0.png"
    assert command("predict", [str(root / "last.pt"), str(file), "--out", str(tmp_path), "--raw-ids"]) == 0
    classes = segment(segmenter, read_image(file)).classes.numpy()
    label = np.array(Image.open(tmp_path / "labels/0.png"))
    assert np.array_equal(label, np.array([7, 11, 200])[classes])


def test_what_fails_does_not_stop_the_others(
    model: tuple[Path, Segmenter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An input that cannot be read, an output that cannot be written, and names that fit no file."""
    root, _ = model
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    good = (root / "data/images/val/0.png").read_bytes()
    long = "图" * 83  # 249 bytes
    names = ["a", "b", "c", "d", long, os.fsdecode(b"stra\xdfe")]
    for name in names:
        (inputs / f"{name}.png").write_bytes(good[:150] if name == "b" else good)
    Image.new("RGB", (65_600, 4)).save(inputs / "wide.png")
    (out / "labels/d.png").mkdir(parents=True)
    assert command("predict", [str(root / "last.pt"), str(inputs), "--out", str(out)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert "b.png" in lines[0]
    assert re.search(r"labels/d.png: cannot write \(Is a directory\)", lines[1])
    assert lines[2] == f"error: 2 of 7 inputs failed; the others are in {out}"
    labels = {path.name for path in (out / "labels").iterdir()}
    cut, turned = (safe_name(name) for name in (long, names[-1]))
    assert labels == {"a.png", "c.png", "d.png", "wide.png", f"{cut}.png", f"{turned}.png"}
    overlays = {path.name for path in (out / "overlays").iterdir()}
    assert overlays == {"a.jpg", "c.jpg", "d.jpg", "wide.png", f"{cut}.jpg", f"{turned}.jpg"}


def test_an_image_beyond_the_memory_and_a_full_disk(
    model: tuple[Path, Segmenter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first is counted; the second ends it, since no other image will fare better."""
    root, _ = model

    def too_large(network: Segmenter, image: torch.Tensor, **options: object) -> object:
        if image.shape[-1] == SIZES[0][1]:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return segment(network, image, **options)  # type: ignore[arg-type]

    arguments = [str(root / "last.pt"), str(root / "data/images/val"), "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(predicting, "segment", too_large)
        assert command("predict", arguments) == 1
    assert "0.png: memory does not suffice; use a smaller --window" in capsys.readouterr().err

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert command("predict", arguments) == 2
    error = capsys.readouterr().err
    assert "cannot write (No space left on device); make room" in error
    assert error.count("\n") == 1


def test_ctrl_c_keeps_what_was_predicted(
    model: tuple[Path, Segmenter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, _ = model
    calls: list[int] = []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return segment(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(predicting, "segment", interrupted)
    images = str(root / "data/images/val")
    assert command("predict", [str(root / "last.pt"), images, "--out", str(tmp_path)]) == 130
    assert "interrupted; what was written before is good" in capsys.readouterr().err
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert written == ["0.jpg", "0.png", "1.jpg", "1.png"]


def test_any_kind_of_image_at_its_upright_size(model: tuple[Path, Segmenter], tmp_path: Path) -> None:
    root, _ = model
    inputs = tmp_path / "my images"
    inputs.mkdir()
    picture = Image.open(root / "data/images/val/0.png")
    sixteen = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    for name, kind in (
        *(("größe 日本.png", "RGB"), ("grey.png", "L"), ("alpha.png", "RGBA"), ("palette.png", "P")),
        *(("grey.jpg", "L"), ("print.jpg", "CMYK"), ("print.tif", "CMYK")),
        *(("web.webp", "RGB"), ("old.bmp", "RGB")),
    ):  # fmt: skip
        picture.convert(kind).save(inputs / name)
    Image.fromarray(sixteen).save(inputs / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    for name in ("phone.jpg", "phone.webp"):
        picture.save(inputs / name, exif=exif)
    (inputs / "folder.png").mkdir()
    assert command("predict", [str(root / "last.pt"), str(inputs), "--out", str(tmp_path / "out")]) == 0
    labels = {path.name: Image.open(path).size for path in (tmp_path / "out/labels").iterdir()}
    assert len(labels) == 12, labels
    assert labels.pop("phone.jpg.png") == labels.pop("phone.webp.png") == picture.size[::-1]
    assert set(labels.values()) == {picture.size}
    assert Image.open(tmp_path / "out/overlays/phone.jpg.jpg").size == picture.size[::-1]
    assert "größe 日本.png" in labels


def test_no_webcam_is_one_line(
    model: tuple[Path, Segmenter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    root, _ = model
    assert command("predict", [str(root / "last.pt"), "97", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: webcam 97: cannot open it")
    assert error.count("\n") == 1, error


def test_names_of_results_never_meet(tmp_path: Path) -> None:
    for name in ("in/a.jpg", "in/a.png", "in/sub/b.png", "other/b.png", "in/.hidden.png", "in/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in/out/labels").mkdir(parents=True)
    (tmp_path / "in/out/labels/a.png").touch()
    given = [str(tmp_path / "in"), str(tmp_path / "other/b.png"), str(tmp_path / "*/b.png")]
    sources = find_sources(given, tmp_path / "in/out")
    names = [source.name for source in sources]
    assert names[:3] == ["a.jpg", "a.png", "sub/b"]
    assert len(set(names)) == len(names) == 5
    deep = find_sources([str(tmp_path / "**/b.png")], tmp_path / "out")
    assert [source.name for source in deep] == ["in/sub/b", "other/b"]
    assert find_sources(["0"], tmp_path)[0].is_video


def test_reading_goes_ahead_of_the_model() -> None:
    started, held = [], threading.Event()

    def read(item: int) -> int:
        started.append(item)
        if len(started) >= AHEAD:
            held.set()
        return item * item

    with ThreadPoolExecutor(1) as pool:
        results = ahead(pool, read, range(100))
        assert next(results) == 0
        assert held.wait(10), "nothing was read while the caller had the first item"
        assert len(started) <= AHEAD + 1, "reading must not run away from the model"
        assert list(results) == [item * item for item in range(1, 100)]


def test_what_came_before_an_error_is_given_and_a_full_disk_ends_all() -> None:
    def items(end: BaseException) -> Iterator[int]:
        yield from range(2)
        raise end

    with ThreadPoolExecutor(1) as pool:
        for end in (UserError("damaged"), KeyboardInterrupt()):
            results = ahead(pool, str, items(end))
            assert [next(results), next(results)] == ["0", "1"]
            with pytest.raises(type(end)):
                next(results)

    def fails(error: UserError) -> None:
        raise error

    assert str(attempt(fails, UserError("first"))) == "first"
    with pytest.raises(DiskError, match="full"):
        attempt(fails, DiskError("full"))


def test_more_classes_than_a_palette_holds() -> None:
    ids = np.arange(600).reshape(20, 30)
    picture = id_image(ids, [(0, 0, 0)] * 600)
    assert np.array_equal(np.array(picture), ids)
    assert np.array_equal(np.array(id_image(ids % 250, None)), ids % 250)


def write_video(path: Path, frames: int, size: tuple[int, int]) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((*size, 3), 20 * i, np.uint8)
            picture[:, : size[1] // 2] = PALETTE[i % len(CLASSES)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def test_a_video(model: tuple[Path, Segmenter], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    root, _ = model
    write_video(tmp_path / "drive.mp4", 9, (48, 64))
    arguments = [str(root / "last.pt"), str(tmp_path / "drive.mp4"), "--out", str(tmp_path / "out")]
    assert command("predict", arguments) == 0
    labels = sorted((tmp_path / "out/labels/drive").iterdir())
    assert [path.stem for path in labels] == [f"{i:06d}" for i in range(9)]
    assert Image.open(labels[0]).size == (64, 48)
    with av.open(str(tmp_path / "out/overlays/drive.mp4")) as written:
        stream = written.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 10
        assert sum(1 for _ in written.decode(video=0)) == 9


def test_a_video_from_a_telephone_is_turned(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:24] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # of the display, ISO 14496-12: here a turn by 90° clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    _, frames = read_frames(str(path))
    frame = next(frames)
    assert frame.shape == (3, 64, 48)
    assert frame[:, :, 26:].float().mean() > 240, "the upper half is now on the right"
    assert frame[:, :, :22].float().mean() < 15


def test_a_broken_video_is_named_and_the_part_before_is_kept(
    model: tuple[Path, Segmenter],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    av = pytest.importorskip("av")
    (tmp_path / "drive.mp4").write_bytes(b"no video" * 100)
    root, _ = model
    arguments = [str(root / "last.pt"), str(tmp_path / "drive.mp4"), "--out", str(tmp_path / "out")]
    assert command("predict", arguments) == 2
    assert "drive.mp4: cannot open this video" in capsys.readouterr().err

    def damaged(path: str) -> tuple[Fraction, Iterator[torch.Tensor]]:
        def frames() -> Iterator[torch.Tensor]:
            yield from torch.zeros(7, 3, 48, 64, dtype=torch.uint8)
            raise UserError(f"{path}: damaged video; its first part was used")

        return Fraction(10), frames()

    monkeypatch.setattr(predicting, "read_frames", damaged)
    assert command("predict", arguments) == 2
    assert "damaged video; its first part was used" in capsys.readouterr().err
    assert len(list((tmp_path / "out/labels/drive").iterdir())) == 7
    with av.open(str(tmp_path / "out/overlays/drive.mp4")) as written:
        assert sum(1 for _ in written.decode(video=0)) == 7


def test_missing_video_library_is_named(
    model: tuple[Path, Segmenter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "drive.mp4").touch()
    root, _ = model
    arguments = [str(root / "last.pt"), str(tmp_path / "drive.mp4"), "--out", str(tmp_path / "out")]
    assert command("predict", arguments) == 2
    error = capsys.readouterr().err
    assert "drive.mp4: for videos, av is not installed; run: pip install 'protoseg[video]'" in error
    assert error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["{root}/none*.png"], "no image or video there"),
        (["{root}/data/labels/empty"], "no image or video there"),
        (["{root}/last.pt"], "known are .jpg"),
        (["{root}/data", "--scales", "-1"], "scales"),
        (["{root}/data", "--out", "{root}/last.pt/out"], "no folder can be made there"),
    ],
)
def test_mistakes_are_one_line(
    model: tuple[Path, Segmenter],
    inputs: list[str],
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, _ = model
    (root / "data/labels/empty").mkdir(exist_ok=True)
    filled = [each.format(root=root) for each in inputs]
    assert command("predict", [str(root / "last.pt"), "--out", str(tmp_path), *filled]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert part in error[-1]


def test_a_learned_classifier_has_no_prototypes(
    model: tuple[Path, Segmenter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = model
    write_checkpoint(tmp_path / "last.pt", tiny_config(root / "data", classifier="cosine"))
    image = str(root / "data/images/val/0.png")
    arguments = [str(tmp_path / "last.pt"), image, "--out", str(tmp_path / "out")]
    assert command("predict", [*arguments, "--prototypes"]) == 2
    assert "last.pt has a learned classifier and no prototypes; use one" in capsys.readouterr().err
    assert command("predict", [*arguments, "--confidence"]) == 0
