"""Annotations of other programs as class maps: COCO, labelme, YOLO, colour-coded masks.

A reader gives the classes and one `Annotated` per image, whose map holds class ids and −1 where nobody drew.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from protoseg.config import read_yaml
from protoseg.data.reading.decode import IMAGE_ENDINGS
from protoseg.data.reading.text_lists import visible_files
from protoseg.runtime.errors import UserError
from protoseg.runtime.extras import import_extra

UNLABELLED = -1
MOST_COLOURS = 256
CODER = ("pycocotools.mask", "protoseg[convert]")
Colour = tuple[int, int, int]
Drawn = tuple[int, NDArray[np.bool_]]  # class id and where
# The objects of one image in the order of their file → class ids (H, W).
Overlap = Callable[[Sequence[Drawn], tuple[int, int]], NDArray[np.int64]]


@dataclass(frozen=True)
class Annotated:
    """One image and what turns its annotation into a map (H, W)."""

    image: Path
    read: Callable[[Overlap], NDArray[np.int64]]


@dataclass(frozen=True)
class Annotations:
    """What a reader found; `skipped` says what was left out, with counts."""

    classes: list[str]
    images: list[Annotated]
    colours: list[Colour] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    found_colours: Mapping[Colour, int] = field(default_factory=dict)  # pixels, where no colours were given


def later_on_top(drawn: Sequence[Drawn], size: tuple[int, int]) -> NDArray[np.int64]:
    """Where objects overlap, the later one in the file wins."""
    ids = np.full(size, UNLABELLED)
    for c, where in drawn:
        ids[where] = c
    return ids


def smaller_on_top(drawn: Sequence[Drawn], size: tuple[int, int]) -> NDArray[np.int64]:
    """Where objects overlap, the one with fewer pixels wins; of two equal ones the later."""
    return later_on_top(sorted(drawn, key=lambda each: -int(each[1].sum())), size)


OVERLAPS: dict[str, Overlap] = {"later": later_on_top, "smaller": smaller_on_top}


def read_coco(file: Path, images: Path, masks: Path | None = None) -> Annotations:
    """COCO JSON: instances, stuff (polygons and RLE) or panoptic (with PNGs in `masks`).

    masks: by default the folder beside the file that is called like it. Errors: UserError naming file and id.
    """
    content = _json(file)
    try:
        categories = sorted(content["categories"], key=lambda each: each["id"])
        number = {each["id"]: i for i, each in enumerate(categories)}
        classes = [str(each["name"]) for each in categories]
        by_image: dict[Any, list[dict[str, Any]]] = {each["id"]: [] for each in content["images"]}
        for annotation in content["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
            for part in annotation.get("segments_info", [annotation]):
                number[part["category_id"]]
        found = []
        for each in content["images"]:
            annotations, size = by_image[each["id"]], (each["height"], each["width"])
            if any("segments_info" in a for a in annotations):
                folder = masks or file.with_suffix("")
                read = partial(_panoptic, annotations[0], folder, number, size)
            else:
                read = partial(_coco_objects, annotations, number, size, file)
            found.append(Annotated(_there(images / each["file_name"], file), read))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not COCO's form, or an id without its entry: {error}; mend the file"
        ) from None
    return Annotations(_distinct(classes, file), found)


def read_labelme(folder: Path) -> Annotations:
    """A folder of labelme JSON files beside their images; classes are its labels in alphabetical order.

    Polygons, rectangles and circles count; points and lines have no area and are skipped.
    """
    contents = {file: _json(file) for file in _files(folder, ".json")}
    skipped: Counter[str] = Counter()
    found = []
    try:
        areas = ("polygon", "rectangle", "circle")
        names: set[str] = set()
        for file in contents:
            shapes = contents[file]["shapes"]
            names |= {str(each["label"]) for each in shapes if each["shape_type"] in areas}
        classes = sorted(names)
        for file, content in contents.items():
            size = (content["imageHeight"], content["imageWidth"])
            shapes = []
            for shape in content["shapes"]:
                if shape["shape_type"] in areas:
                    shapes.append((classes.index(str(shape["label"])), _outline(shape)))
                else:
                    skipped[f"shapes of type {shape['shape_type']}"] += 1
            image = _there(file.parent / content["imagePath"].replace("\\", "/"), file)
            found.append(Annotated(image, partial(_polygons, shapes, size)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: not labelme's form ({error}); mend or remove the file") from None
    return Annotations(classes, found, skipped=skipped)


def read_yolo(folder: Path, images: Path, classes: Sequence[str] | Path) -> Annotations:
    """YOLO-seg text files: one object a line, its class and x y pairs between 0 and 1.

    classes: names in order, or a YAML file with `names`. An image without a text file has no objects.
    """
    if isinstance(classes, Path):
        names = read_yaml(classes).get("names")
        if not names:
            raise UserError(f"{classes}: no `names` in this file; give --classes")
        classes = [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    found = []
    for image in _files(images, *IMAGE_ENDINGS):
        file = (folder / image.relative_to(images)).with_suffix(".txt")
        height, width = image_size(image)
        shapes = []
        for n, line in enumerate(file.read_text().splitlines() if file.is_file() else (), 1):
            try:
                c, *xy = line.split()
                points = np.array(xy, dtype=float).reshape(-1, 2)
                if not 0 <= int(c) < len(classes) or len(points) < 3:
                    raise ValueError
            except ValueError:
                raise UserError(
                    f"{file}: line {n} is no class below {len(classes)} with three x y pairs or more:"
                    f" {line!r:.60}; mend it"
                ) from None
            shapes.append((int(c), points * (width, height)))
        found.append(Annotated(image, partial(_polygons, shapes, (height, width))))
    return Annotations(list(classes), found)


def read_colours(folder: Path, images: Path, colours: Path | None = None) -> Annotations:
    """Colour-coded masks, called like their images; `colours`: YAML, name: [red, green, blue].

    Without it every colour becomes a class, named by its code, the most frequent first. Errors: UserError
    naming file, colour and place, and above 256 colours.
    """
    masks = {path.relative_to(folder).with_suffix(""): path for path in _files(folder, ".png")}
    counts: Mapping[Colour, int] = {}
    if colours is not None:
        named = read_yaml(colours)
        try:
            table = {str(name): _colour(value) for name, value in named.items()}
        except (TypeError, ValueError):
            raise UserError(f"{colours}: expected lines `name: [red, green, blue]`; mend the file") from None
    else:
        counts = colour_counts(masks.values())
        table = {f"{r:02x}{g:02x}{b:02x}": (r, g, b) for r, g, b in counts}
    codes = {_code(np.array(colour)).item(): i for i, colour in enumerate(table.values())}
    found = []
    for image in _files(images, *IMAGE_ENDINGS):
        mask = masks.get(image.relative_to(images).with_suffix(""))
        if mask is None:
            raise UserError(f"{image}: no mask of this name in {folder}; add it or remove the image")
        found.append(Annotated(image, partial(_mask, mask, codes)))
    return Annotations(list(table), found, list(table.values()), found_colours=counts)


def colour_counts(masks: Iterable[Path]) -> dict[Colour, int]:
    """Pixels of each exact colour, the most frequent first. Errors: UserError above 256 colours."""
    counts: Counter[int] = Counter()
    for mask in masks:
        codes, pixels = np.unique(_code(_rgb(mask)), return_counts=True)
        counts.update(dict(zip(codes.tolist(), pixels.tolist())))
        if len(counts) > MOST_COLOURS:
            raise UserError(
                f"{mask}: more than {MOST_COLOURS} colours up to this file: no mask, or one compressed"
                " or smoothed? Give the list of colours (--colours) and clean masks"
            )
    return {(code >> 16, code >> 8 & 255, code & 255): n for code, n in counts.most_common()}


def _coco_objects(
    annotations: list[dict[str, Any]],
    number: dict[int, int],
    size: tuple[int, int],
    file: Path,
    overlap: Overlap,
) -> NDArray[np.int64]:
    coder = import_extra(*CODER)
    drawn = []
    for each in annotations:
        try:
            shape = each["segmentation"]
            # Compressed RLE is decoded as it is; polygons and lists of counts are compressed first.
            ready = isinstance(shape, dict) and not isinstance(shape["counts"], list)
            encoded = shape if ready else coder.frPyObjects(shape, *size)
            whole = coder.merge(encoded) if isinstance(encoded, list) else encoded
            drawn.append((number[each["category_id"]], coder.decode(whole).astype(bool)))
        except Exception as error:  # pycocotools raises whatever its C code meets
            raise UserError(
                f"{file}: annotation {each.get('id')} has no readable segmentation ({error}); mend the file"
            ) from None
    return overlap(drawn, size)


def _panoptic(
    annotation: dict[str, Any], folder: Path, number: dict[int, int], size: tuple[int, int], overlap: Overlap
) -> NDArray[np.int64]:
    red, green, blue = rearrange(_rgb(folder / annotation["file_name"]).astype(np.int64), "h w c -> c h w")
    segments = red + 256 * green + 256**2 * blue
    parts = annotation["segments_info"]
    return overlap([(number[each["category_id"]], segments == each["id"]) for each in parts], size)


def _polygons(
    shapes: Sequence[tuple[int, NDArray]], size: tuple[int, int], overlap: Overlap
) -> NDArray[np.int64]:
    coder = import_extra(*CODER)
    drawn = [
        (c, coder.decode(coder.frPyObjects([points.flatten().tolist()], *size))[..., 0].astype(bool))
        for c, points in shapes
    ]
    return overlap(drawn, size)


def _outline(shape: dict[str, Any]) -> NDArray[np.float64]:
    """The corners (N, 2) of a labelme shape; a circle is given by its middle and a point on it."""
    points = np.array(shape["points"], dtype=float)
    if shape["shape_type"] == "polygon":
        return points
    (x0, y0), (x1, y1) = points
    if shape["shape_type"] == "rectangle":
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    return points[0] + math.dist(*points) * np.stack([np.cos(angle), np.sin(angle)], 1)


def _mask(path: Path, codes: dict[int, int], _: Overlap) -> NDArray[np.int64]:
    codes_HW = _code(_rgb(path))
    found, inverse = np.unique(codes_HW, return_inverse=True)
    unknown = [code for code in found.tolist() if code not in codes]
    if unknown:
        y, x = np.argwhere(codes_HW == unknown[0])[0]
        colour = [unknown[0] >> 16, unknown[0] >> 8 & 255, unknown[0] & 255]
        raise UserError(f"{path}: colour {colour} at row {y}, column {x} is not in the list; add it")
    return np.array([codes[code] for code in found.tolist()])[inverse].reshape(codes_HW.shape)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image, without decoding it. Errors: UserError if it is none."""
    with _opened(path) as image:
        return image.height, image.width


def _rgb(path: Path) -> NDArray[np.uint8]:
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot read this image ({error}); replace it") from None


def _code(colours: NDArray) -> NDArray[np.int64]:
    return colours.astype(np.int64) @ np.array([65536, 256, 1])


def _colour(value: Sequence[int]) -> Colour:
    red, green, blue = (int(each) for each in value)
    return red, green, blue


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot read this JSON file ({error}); check the path") from None


def _files(folder: Path, *endings: str) -> list[Path]:
    found = sorted(path for path in visible_files(folder) if path.suffix.lower() in endings)
    if not found:
        raise UserError(f"{folder}: no {' '.join(endings)} file in this folder; check the path")
    return found


def _there(image: Path, file: Path) -> Path:
    if not image.is_file():
        raise UserError(f"{image}: no such image, named in {file}; check the folder of images")
    return image


def _distinct(classes: list[str], file: Path) -> list[str]:
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise UserError(f"{file}: two categories are called {twice[0]}; rename one")
    return classes
