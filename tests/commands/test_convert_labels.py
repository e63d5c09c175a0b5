"""Other programs' annotations: each format, made here, against maps painted by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coder

from protoseg.commands.cli import execute
from protoseg.config import load_config
from protoseg.data import annotations
from protoseg.data.annotations import later_on_top, smaller_on_top
from protoseg.data.datasets import open_dataset

HEIGHT, WIDTH = 20, 30
BIG = [2, 2, 22, 2, 22, 14, 2, 14]  # x y pairs: columns 2-21, rows 2-13
SMALL = [6, 4, 12, 4, 12, 10, 6, 10]


def painted(*order: tuple[int, str], unlabelled: int) -> np.ndarray:
    ids = np.full((HEIGHT, WIDTH), unlabelled)
    places = {"big": np.s_[2:14, 2:22], "small": np.s_[4:10, 6:12]}
    for c, place in order:
        ids[places[place]] = c
    return ids


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos/a.png")
    return tmp_path / "photos"


def convert(*arguments: object) -> int:
    return execute("convert_labels", [str(each) for each in arguments])


def label(out: Path, split: str = "train") -> np.ndarray:
    return np.asarray(Image.open(out / f"labels/{split}/a.png")).astype(int)


def coco(folder: Path, annotations: list[dict[str, Any]]) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 5, "name": "tree"}, {"id": 3, "name": "car"}],  # by id: car 0, tree 1
        "annotations": [{"id": i, "image_id": 7, **each} for i, each in enumerate(annotations)],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json"


def rle(where: np.ndarray, compressed: bool) -> dict[str, Any]:
    made = coder.encode(np.asfortranarray(where.astype(np.uint8)))
    if compressed:
        return {"size": made["size"], "counts": made["counts"].decode()}
    flat = where.astype(int).flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": made["size"], "counts": ([0, *counts] if flat[0] else counts)}


@pytest.mark.parametrize("kind", ["polygons", "compressed", "counts"])
def test_coco_instances_and_stuff(images: Path, tmp_path: Path, kind: str) -> None:
    shapes = {
        "big": [BIG]
        if kind == "polygons"
        else rle(painted((1, "big"), unlabelled=0) > 0, kind == "compressed"),
        "small": [SMALL]
        if kind == "polygons"
        else rle(painted((1, "small"), unlabelled=0) > 0, kind == "compressed"),
    }
    file = coco(
        tmp_path,
        [
            {"category_id": 3, "segmentation": shapes["small"]},
            {"category_id": 5, "segmentation": shapes["big"]},
        ],
    )
    out = tmp_path / "out"
    assert convert("coco", file, "--images", images, "--out", out) == 0
    assert np.array_equal(label(out), painted((1, "small"), (2, "big"), unlabelled=0)), (
        "the later one is on top"
    )
    assert (
        convert("coco", file, "--images", images, "--out", out, "--split", "val", "--overlap", "smaller") == 0
    )
    assert np.array_equal(label(out, "val"), painted((2, "big"), (1, "small"), unlabelled=0))
    config = load_config(out / "data.yaml").data
    assert config.classes == ["background", "car", "tree"]
    assert (out / "images/val/a.png").read_bytes() == (images / "a.png").read_bytes()
    _, ids = open_dataset(load_config(out / "data.yaml"), "val").read(0)
    assert int(ids.max()) == 2
    other = tmp_path / "other"
    assert convert("coco", file, "--images", images, "--out", other, "--unlabelled", "ignore") == 0
    assert np.array_equal(label(other), painted((0, "small"), (1, "big"), unlabelled=255))


def test_coco_panoptic(images: Path, tmp_path: Path) -> None:
    ids = painted((70000, "big"), (300, "small"), unlabelled=0)
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)
    (tmp_path / "coco").mkdir()
    Image.fromarray(colours).save(tmp_path / "coco/a.png")
    segments = [{"id": 300, "category_id": 3}, {"id": 70000, "category_id": 5}]
    file = coco(tmp_path, [{"file_name": "a.png", "segments_info": segments}])
    given = ("coco", file, "--images", images, "--unlabelled", "ignore", "--out")
    assert convert(*given, tmp_path / "out") == 0
    assert np.array_equal(label(tmp_path / "out"), painted((1, "big"), (0, "small"), unlabelled=255))
    (tmp_path / "coco").rename(tmp_path / "elsewhere")
    assert convert(*given, tmp_path / "again", "--masks", tmp_path / "elsewhere") == 0
    assert np.array_equal(label(tmp_path / "again"), label(tmp_path / "out"))


def test_labelme(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pairs(flat: list[int]) -> list[list[int]]:
        return np.array(flat).reshape(-1, 2).tolist()

    shapes = [
        {"label": "tree", "shape_type": "polygon", "points": pairs(BIG)},
        {"label": "car", "shape_type": "rectangle", "points": [[6, 4], [12, 10]]},
        {"label": "sign", "shape_type": "point", "points": [[1, 1]]},
    ]
    content = {"imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": shapes}
    (images / "a.json").write_text(json.dumps(content))
    assert convert("labelme", images, "--out", tmp_path / "out") == 0
    assert np.array_equal(label(tmp_path / "out"), painted((2, "big"), (1, "small"), unlabelled=0))
    said = capsys.readouterr().out
    assert "left out: 1 shapes of type point" in said
    assert "tree: 204 pixels" in said
    assert "where objects overlap, the later one is on top; unlabelled pixels are background" in said
    shapes[1] = {"label": "car", "shape_type": "circle", "points": [[15, 10], [20, 10]]}
    (images / "a.json").write_text(json.dumps(content))
    assert convert("labelme", images, "--out", tmp_path / "round") == 0
    assert (label(tmp_path / "round") == 1).sum() == pytest.approx(np.pi * 25, rel=0.1)


def test_yolo(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(c: int, flat: list[int]) -> str:
        return f"{c} " + " ".join(str(value) for value in (np.array(flat) / np.tile([WIDTH, HEIGHT], 4)))

    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(f"{line(1, BIG)}\n{line(0, SMALL)}\n")
    (tmp_path / "yolo.yaml").write_text(yaml.safe_dump({"names": {0: "car", 1: "tree"}}))
    given = ("yolo", texts, "--images", images, "--out", tmp_path / "out")
    for classes in (("car", "tree"), (tmp_path / "yolo.yaml",)):
        assert (
            convert("yolo", texts, "--images", images, "--out", tmp_path / "out", "--classes", *classes) == 0
        )
        assert np.array_equal(label(tmp_path / "out"), painted((2, "big"), (1, "small"), unlabelled=0))
    (texts / "a.txt").write_text("0 0.5 0.5 0.6 0.6\n")
    capsys.readouterr()
    assert (
        convert("yolo", texts, "--images", images, "--out", tmp_path / "out", "--classes", "car", "tree") == 2
    )
    assert "a.txt: line 1 is no class below 2 with three x y pairs or more" in capsys.readouterr().err
    assert convert(*given) == 2
    assert "--classes: YOLO's files hold numbers only" in capsys.readouterr().err


def test_colours_given_and_found(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = painted((1, "big"), (2, "small"), unlabelled=0)
    table = np.array([(0, 0, 0), (0, 128, 0), (128, 0, 1)], np.uint8)
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(table[ids]).save(masks / "a.png")
    (tmp_path / "c.yaml").write_text("car: [128, 0, 1]\ntree: [0, 128, 0]\nsky: [0, 0, 0]\n")
    out = tmp_path / "out"
    assert convert("colours", masks, "--images", images, "--out", out, "--colours", tmp_path / "c.yaml") == 0
    assert np.array_equal(label(out), np.array([2, 1, 0])[ids])
    assert load_config(out / "data.yaml").data.palette == [(128, 0, 1), (0, 128, 0), (0, 0, 0)]
    capsys.readouterr()
    (masks / "a.png").rename(masks / "a.PNG")
    (masks / "._a.png").write_bytes(b"what a Mac leaves")
    (masks / ".cache").mkdir()
    (masks / ".cache/a.png").write_bytes(b"no mask")
    decoded: list[Path] = []
    monkeypatch.setattr(
        annotations, "_rgb", lambda path, read=annotations._rgb: decoded.append(path) or read(path)
    )
    assert convert("colours", masks, "--images", images, "--out", tmp_path / "found") == 0
    assert decoded == [masks / "a.PNG"] * 2, "once to count colours, once for its map"
    assert "  000000: [0, 0, 0]  # 360 pixels\n  008000: [0, 128, 0]  # 204 pixels" in capsys.readouterr().out
    assert load_config(tmp_path / "found/data.yaml").data.classes == ["000000", "008000", "800001"]
    assert np.array_equal(label(tmp_path / "found"), ids)
    (tmp_path / "c.yaml").write_text("car: [128, 0, 1]\nsky: [0, 0, 0]\n")
    other = ("--out", tmp_path / "other", "--colours", tmp_path / "c.yaml")
    assert convert("colours", masks, "--images", images, *other) == 2
    assert "colour [0, 128, 0] at row 2, column 2 is not in the list" in capsys.readouterr().err
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(masks / "a.PNG")
    assert convert("colours", masks, "--images", images, "--out", tmp_path / "found") == 2
    assert "more than 256 colours up to this file" in capsys.readouterr().err


def test_overlaps_by_hand() -> None:
    one, two = np.array([[True, True, True]]), np.array([[False, True, False]])
    assert later_on_top([(4, two), (5, one)], (1, 3)).tolist() == [[5, 5, 5]]
    assert smaller_on_top([(4, two), (5, one)], (1, 3)).tolist() == [[5, 4, 5]]
    assert smaller_on_top([(4, two), (5, two)], (1, 3)).tolist() == [[-1, 5, -1]], "of equal ones the later"


def test_mistakes_are_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def says(*arguments: object) -> str:
        assert convert(*arguments, "--out", out) == 2
        return capsys.readouterr().err

    file = coco(tmp_path, [{"category_id": 9, "segmentation": [BIG]}])
    assert "coco.json: not COCO's form, or an id without its entry: 9" in says(
        "coco", file, "--images", images
    )
    assert "--images: where are they?" in says("coco", file)
    file = coco(tmp_path, [{"category_id": 3, "segmentation": [[1, 2]]}])
    assert "coco.json: annotation 0 has no readable segmentation" in says("coco", file, "--images", images)
    assert "a.png: no such image, named in" in says("coco", file, "--images", tmp_path)
    assert "missing.json: cannot read this JSON file" in says(
        "coco", tmp_path / "missing.json", "--images", images
    )
    (images / "a.json").write_text('{"shapes": [{"shape_type": "polygon"}]}')
    assert "a.json: not labelme's form ('label'); mend or remove the file" in says("labelme", images)
    (images / "a.json").write_text("{}")
    assert "a.json: not labelme's form ('shapes'); mend" in says("labelme", images)
    file = coco(tmp_path, [{"category_id": 3, "segmentation": [BIG]}])
    Image.new("RGB", (9, 8)).save(images / "a.png")
    assert "a.png: 8 × 9 pixels, its annotation 20 × 30" in says("coco", file, "--images", images)
    (images / "a.png").write_bytes(b"no picture")
    for given in (("coco", file), ("yolo", tmp_path, "--classes", "car")):
        message = says(*given, "--images", images)
        assert "photos/a.png: cannot read this image (cannot identify image file" in message
        assert message.endswith("; replace it\n")
    out.mkdir(exist_ok=True)
    (out / "data.yaml").write_text("data: {classes: [cat]}")
    assert "data.yaml: has the classes cat, these annotations background, car, tree" in says(
        "coco", file, "--images", images
    )
