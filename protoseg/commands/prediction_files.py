"""Which files are predicted, and what is written for each."""

import glob
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from protoseg.commands.video import VIDEO_ENDINGS
from protoseg.data.classes.palette import default_palette, overlay
from protoseg.data.reading.decode import IMAGE_ENDINGS
from protoseg.data.reading.text_lists import is_hidden
from protoseg.evaluation.inference import Prediction
from protoseg.figures.pictures import Palette
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import whole_file

READERS = WRITERS = 2  # threads
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
    palette: Palette
    raw_ids: NDArray[np.int64] | None = None  # (C,) ids to write in place of class ids
    confidence: bool = False
    prototypes: bool = False


def find_sources(inputs: Sequence[str], out: Path) -> list[Source]:
    """Files behind paths, folders (searched with their subfolders), patterns and webcam numbers.

    Results of earlier runs, in the folder `out`, are no sources.

    Errors: UserError for an input that is not there, holds no image, or is of an unknown kind.
    """
    found: list[tuple[str, str]] = []  # path, name with its ending
    out = out.resolve()
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if _is_known(file, given) and not file.is_dir() and not file.resolve().is_relative_to(out)
            )
            if not inside:
                raise UserError(f"{given}: no image or video in this folder; known are {_endings()}")
            found += [(str(file), file.relative_to(path).as_posix()) for file in inside]
        elif path.is_file():
            if not _is_known(path, given):
                raise UserError(f"{given}: not a known kind of file; known are {_endings()}")
            found.append((given, path.name))
        elif given.isdecimal():
            found.append((given, f"webcam{given}.mp4"))
        elif glob.has_magic(given):
            matches = [
                Path(file)
                for file in sorted(glob.glob(given, recursive=True))
                if _is_known(Path(file), given)
            ]
            if not matches:
                raise UserError(f"{given}: no image or video matches this pattern; known are {_endings()}")
            base = Path(os.path.commonpath([file.parent for file in matches]))
            found += [(str(file), file.relative_to(base).as_posix()) for file in matches]
        else:
            raise UserError(f"{given}: no such file or folder, and no webcam number; check the path")
    stems = [os.path.splitext(name)[0] for _, name in found]
    count = Counter(stems)
    # a.jpg and a.png beside each other keep their endings; names that are still the same get a number.
    names = [name if count[stem] > 1 else stem for stem, (_, name) in zip(stems, found)]
    seen: dict[str, int] = {}
    sources = []
    for (path_text, full), name in zip(found, names):
        seen[name] = seen.get(name, 0) + 1
        unique = name if seen[name] == 1 else f"{name}_{seen[name]}"
        sources.append(Source(path_text, unique, full.lower().endswith(VIDEO_ENDINGS)))
    return sources


def ahead(pool: ThreadPoolExecutor, work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """work(item) of each item in order, some of them being made while the caller is busy."""
    pending: deque[Future[T]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class Writers:
    """Threads that write results; waits when too many are on the way; raises what went wrong in them."""

    def __enter__(self) -> "Writers":
        self.pool = ThreadPoolExecutor(WRITERS)
        self.pending: deque[Future[None]] = deque()
        return self

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        self.pending.append(self.pool.submit(work, *arguments))
        if len(self.pending) > AHEAD:
            self.pending.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown()
        if kind is None:
            for future in self.pending:
                future.result()


def write_maps(
    name: str, image: Tensor, prediction: Prediction, outputs: Outputs, with_overlay: bool
) -> None:
    """labels/NAME.png, overlays/NAME.jpg and what else is wanted, for one image (3, H, W)."""
    classes = prediction.classes.numpy()
    if outputs.raw_ids is not None:
        _save(id_image(outputs.raw_ids[classes], None), outputs.folder / f"labels/{name}.png")
    else:
        _save(id_image(classes, outputs.palette), outputs.folder / f"labels/{name}.png")
    if with_overlay:
        blend = overlay(image.permute(1, 2, 0).numpy(), classes, outputs.palette)
        _save(Image.fromarray(blend), outputs.folder / f"overlays/{name}.jpg", quality=92)
    if prediction.confidence is not None:
        grey = (prediction.confidence.numpy() * 255).round().astype(np.uint8)
        _save(Image.fromarray(grey), outputs.folder / f"confidence/{name}.png")
    if prediction.prototypes is not None:
        index = prediction.prototypes.numpy()
        palette = default_palette(int(index.max()) + 1)
        _save(id_image(index, palette), outputs.folder / f"prototypes/{name}.png")


def id_image(ids: NDArray[np.integer], palette: Palette | None) -> Image.Image:
    """Ids (H, W) as an image with indexed colours, or grey without palette; 16-bit grey above 256 ids."""
    if (ids.max() if palette is None else len(palette) - 1) > 255:
        return Image.fromarray(ids.astype(np.uint16))
    picture = Image.fromarray(ids.astype(np.uint8))
    if palette is not None:
        picture.putpalette(np.array(palette, np.uint8).tobytes())
    return picture


def _save(picture: Image.Image, path: Path, **options: int) -> None:
    with whole_file(path) as part:
        picture.save(part, format="PNG" if path.suffix == ".png" else "JPEG", **options)


def _is_known(path: Path, given: str) -> bool:
    """Whether it is an image or video; not one in a hidden folder, unless that is what was given."""
    hidden = any(is_hidden(part) for part in path.parts if part not in Path(given).parts)
    return path.suffix.lower() in (*IMAGE_ENDINGS, *VIDEO_ENDINGS) and not hidden


def _endings() -> str:
    return " ".join((*IMAGE_ENDINGS, *VIDEO_ENDINGS))
