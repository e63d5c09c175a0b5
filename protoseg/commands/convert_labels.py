"""`convert_labels`: other programs' annotations become a folder to train on, with its config."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from protoseg.commands.parser import parser_of
from protoseg.data.annotations import (
    OVERLAPS,
    UNLABELLED,
    Annotations,
    Overlap,
    image_size,
    read_coco,
    read_colours,
    read_labelme,
    read_yolo,
)
from protoseg.data.classes.palette import default_palette
from protoseg.runtime.console import progress
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import make_folder, whole_file, write_text

BACKGROUND = "background"


def main(arguments: Sequence[str]) -> None:
    """Convert annotations."""
    parser = parser_of(
        "convert_labels",
        "Make OUT/images, OUT/labels and OUT/data.yaml from COCO JSON (instances, stuff,"
        " panoptic), labelme JSON, YOLO-seg text, or colour-coded masks.",
    )
    parser.add_argument("format", choices=("coco", "labelme", "yolo", "colours"))
    parser.add_argument("annotations", type=Path, help="the JSON file (coco), else the folder")
    parser.add_argument("--images", type=Path, metavar="DIR", help="needed, except for labelme")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", default="train", help="run again with another one to add it")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="panoptic PNGs (default: beside the JSON)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="yolo: names, or a YAML with `names`")
    parser.add_argument("--colours", type=Path, metavar="YAML", help="colours: lines `name: [r, g, b]`")
    parser.add_argument(
        "--overlap", choices=OVERLAPS, default="later", help="which object is on top (default: the later)"
    )
    parser.add_argument(
        "--unlabelled",
        choices=(BACKGROUND, "ignore"),
        default=BACKGROUND,
        help="what pixels become that nobody drew: a class of its own (default), or ignored",
    )
    args = parser.parse_args(arguments)
    if args.images is None and args.format != "labelme":
        raise UserError("--images: where are they? Give their folder")
    if args.format == "coco":
        found = read_coco(args.annotations, args.images, args.masks)
    elif args.format == "labelme":
        found = read_labelme(args.annotations)
    elif args.format == "yolo":
        if not args.classes:
            raise UserError("--classes: YOLO's files hold numbers only; give the names or the data.yaml")
        is_file = len(args.classes) == 1 and args.classes[0].endswith((".yaml", ".yml"))
        found = read_yolo(args.annotations, args.images, Path(args.classes[0]) if is_file else args.classes)
    else:
        found = read_colours(args.annotations, args.images, args.colours)
        if found.found_colours:
            print("colours found (name them in a YAML file and run again with --colours):")
            for colour, pixels in found.found_colours.items():
                print(f"  {'{:02x}{:02x}{:02x}'.format(*colour)}: {list(colour)}  # {pixels} pixels")
    pixels_of = write_dataset(found, args.out, args.split, args.overlap, args.unlabelled == BACKGROUND)
    for what, count in found.skipped.items():
        print(f"left out: {count} {what}")
    for name, pixels in pixels_of.items():
        print(f"  {name}: {pixels} pixels")
    rules = (
        f" where objects overlap, the {args.overlap} one is on top; unlabelled pixels are {args.unlabelled};"
        if found.colours is None
        else ""
    )
    print(f"{args.out}: {len(found.images)} images of {args.split};{rules} config: {args.out / 'data.yaml'}")


def write_dataset(
    found: Annotations, out: Path, split: str, overlap: str, with_background: bool
) -> Counter[str]:
    """Write images, labels and data.yaml → pixels per class.

    With background, that is class 0 and the others follow in their order; colour-coded masks label every
    pixel and get none. Errors: UserError naming an image of another size than its annotation, or of a name
    that is there twice; and where data.yaml has other classes.
    """
    background = with_background and found.colours is None
    classes = [BACKGROUND, *found.classes] if background else found.classes
    if len(set(classes)) < len(classes):
        raise UserError(f"there is a class {BACKGROUND} already; give --unlabelled ignore or rename it")
    ignored = 255 if len(classes) <= 255 else 65535
    colours = found.colours or [*[(0, 0, 0)] * background, *default_palette(len(found.classes))]
    config = {
        "data": {
            "name": "folder",
            "root": str(out),
            "classes": classes,
            "palette": [list(colour) for colour in colours],
            "ignore_index": ignored,
        }
    }
    _same_classes(out / "data.yaml", classes)
    stems = Counter(each.image.stem for each in found.images)
    counts: Counter[str] = Counter(dict.fromkeys([*classes, "ignored"], 0))
    with progress("convert") as on_progress:
        for n, each in enumerate(found.images, 1):
            if stems[each.image.stem] > 1:
                raise UserError(f"{each.image}: two images are called {each.image.stem}; rename one")
            ids = _ids(each.read, OVERLAPS[overlap], each.image)
            ids = ids + 1 if background else np.where(ids == UNLABELLED, ignored, ids)
            label = ids.astype(np.uint8 if ignored == 255 else np.uint16)
            make_folder(out / "images" / split)
            shutil.copyfile(each.image, out / "images" / split / each.image.name)
            with whole_file(out / "labels" / split / f"{each.image.stem}.png") as part:
                Image.fromarray(label).save(part, format="PNG")
            present, pixels = np.unique(label, return_counts=True)
            for c, count in zip(present.tolist(), pixels.tolist()):
                counts["ignored" if c == ignored else classes[c]] += count
            on_progress(n, len(found.images))
    head = f"# Made by convert_labels. Train: protoseg train {out / 'data.yaml'}\n"
    write_text(out / "data.yaml", head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return counts


def _ids(read: Callable[[Overlap], NDArray[np.int64]], overlap: Overlap, image: Path) -> NDArray[np.int64]:
    ids = read(overlap)
    height, width = image_size(image)
    if ids.shape != (height, width):
        raise UserError(
            f"{image}: {height} × {width} pixels, its annotation {ids.shape[0]} × {ids.shape[1]};"
            " give the images that were annotated"
        )
    return ids


def _same_classes(path: Path, classes: Sequence[str]) -> None:
    """A second split must have the classes of the first."""
    if path.is_file():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["classes"]
        if before != list(classes):
            raise UserError(
                f"{path}: has the classes {', '.join(before)}, these annotations {', '.join(classes)};"
                " give another --out, or the same classes for all splits"
            )
