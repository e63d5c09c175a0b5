"""Which files are predicted, and what is written for each."""

import glob
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from protoseg.commands.video import VIDEO_ENDINGS
from protoseg.data.classes.palette import default_palette, overlay
from protoseg.data.reading.decode import IMAGE_ENDINGS
from protoseg.data.reading.text_lists import is_hidden
from protoseg.evaluation.inference import Prediction
from protoseg.figures.pictures import Colours
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import DiskError, safe_name, whole_file

ENDINGS = (*IMAGE_ENDINGS, *VIDEO_ENDINGS)
READERS = WRITERS = 2  # threads
LONGEST_JPEG = 65500  # pixels along a side that the format holds
AHEAD = 4  # images read before their turn, and results waiting to be written
T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Source:
    """One image file, or one video or webcam, and the name of its results relative to the output folder."""

    path: str
    name: str
    is_video: bool = False


@dataclass(frozen=True)
class Outputs:
    """What is written to `folder` for each image or frame: labels and overlays always, the rest on demand."""

    folder: Path
    palette: Colours
    raw_ids: NDArray[np.int64] | None = None  # (C,) ids to write in place of class ids
    confidence: bool = False
    prototypes: bool = False
    nodes: Tensor | None = (
        None  # (C,) nodes of a label tree to show in place of classes; the palette is theirs
    )


def find_sources(inputs: Sequence[str], out: Path) -> list[Source]:
    """Files behind paths, folders (searched with their subfolders), patterns and webcam numbers.

    Results of earlier runs, in the folder `out`, are no sources. Errors: UserError for an input that is not
    there, holds no image, or is of an unknown kind.
    """
    found = [each for given in inputs for each in _behind(given, out.resolve())]
    stems = [os.path.splitext(name)[0] for _, name in found]
    count = Counter(stems)
    sources: dict[str, Source] = {}
    for stem, (path, full) in zip(stems, found):
        # a.jpg and a.png beside each other keep their endings; names that are still the same get a number.
        name = "/".join(map(safe_name, (full if count[stem] > 1 else stem).split("/")))
        numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
        unique = next(each for each in numbered if each not in sources)
        sources[unique] = Source(path, unique, full.lower().endswith(VIDEO_ENDINGS))
    return list(sources.values())


def _behind(given: str, out: Path) -> list[tuple[str, str]]:
    """(path, name relative to what was given, with its ending) of each file behind one input."""
    path = Path(given)
    if path.is_dir():
        files = [file for file in path.rglob("*") if not file.resolve().is_relative_to(out)]
    elif path.is_file():
        files = [path]
    elif given.isdecimal():
        return [(given, f"webcam{given}.mp4")]
    elif glob.has_magic(given):
        files = [Path(file) for file in glob.glob(given, recursive=True)]
    else:
        raise UserError(f"{given}: no such file or folder, and no webcam number; check the path")
    images = sorted(file for file in files if _is_known(file, given) and file.is_file())
    if not images:
        raise UserError(f"{given}: no image or video there; known are {' '.join(ENDINGS)}")
    base = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in images]))
    return [(str(file), file.relative_to(base).as_posix()) for file in images]


def _is_known(path: Path, given: str) -> bool:
    """Whether it is an image or video; not one in a hidden folder, unless that is what was given."""
    hidden = any(is_hidden(part) for part in path.parts if part not in Path(given).parts)
    return path.suffix.lower() in ENDINGS and not hidden


def ahead(pool: ThreadPoolExecutor, work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """work(item) of each item in order, some of them being made while the caller is busy.

    Where the items end with a UserError or Ctrl-C, what came before is given first, then that is raised.
    """
    pending: deque[Future[T]] = deque()
    items, end = iter(items), None
    while end is None:
        try:
            pending.append(pool.submit(work, next(items)))
        except (StopIteration, UserError, KeyboardInterrupt) as error:
            end = error
        while len(pending) > (AHEAD if end is None else 0):
            yield pending.popleft().result()
    if not isinstance(end, StopIteration):
        raise end


def attempt(work: Callable[..., T], *arguments: Any) -> T | UserError:
    """work(*arguments), or what went wrong with it; a full disk is raised: nothing else will fare better."""
    try:
        return work(*arguments)
    except DiskError:
        raise
    except UserError as error:
        return error


def write_maps(
    name: str, image: Tensor, prediction: Prediction, outputs: Outputs, with_overlay: bool
) -> None:
    """labels/NAME.png, overlays/NAME.jpg and what else is wanted, for one image (3, H, W).

    Errors: UserError for the first that cannot be written, after all others are.
    """
    classes = prediction.classes.numpy()
    raw = outputs.raw_ids
    label = id_image(classes, outputs.palette) if raw is None else id_image(raw[classes], None)
    pictures = {f"labels/{name}.png": label}
    if with_overlay:
        blend = overlay(rearrange(image.numpy(), "c h w -> h w c"), classes, outputs.palette)
        ending = "jpg" if max(classes.shape) <= LONGEST_JPEG else "png"
        pictures[f"overlays/{name}.{ending}"] = Image.fromarray(blend)
    if prediction.confidence is not None:
        grey = (prediction.confidence.numpy() * 255).round().astype(np.uint8)
        pictures[f"confidence/{name}.png"] = Image.fromarray(grey)
    if prediction.prototypes is not None:
        index = prediction.prototypes.numpy()
        pictures[f"prototypes/{name}.png"] = id_image(index, default_palette(int(index.max()) + 1))
    saved = [attempt(_save, picture, outputs.folder / path) for path, picture in pictures.items()]
    for error in filter(None, saved):
        raise error


def id_image(ids: NDArray[np.integer], palette: Colours | None) -> Image.Image:
    """Ids (H, W) as an image with indexed colours, or grey without palette; 16-bit grey above 256 ids."""
    if (ids.max() if palette is None else len(palette) - 1) > 255:
        return Image.fromarray(ids.astype(np.uint16))
    picture = Image.fromarray(ids.astype(np.uint8))
    if palette is not None:
        picture.putpalette(np.array(palette, np.uint8).tobytes())
    return picture


def _save(picture: Image.Image, path: Path) -> None:
    with whole_file(path) as part:
        picture.save(part, format="PNG" if path.suffix == ".png" else "JPEG", quality=92)
