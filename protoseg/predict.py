"""Prediction on anyone's files: images, folders, patterns, videos, a webcam.

Reading, the model and writing go on at the same time: images are decoded and results encoded in threads.
"""

import glob
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from protoseg.config import UserError
from protoseg.data.decode import IMAGE_ENDINGS, read_image
from protoseg.data.palette import default_palette
from protoseg.inference import Prediction, Protocol, segment
from protoseg.model import Segmenter
from protoseg.video import VIDEO_ENDINGS, VideoWriter, pyav, read_frames
from protoseg.visualize import Palette, colourise

# Beyond this many pixels an image goes through in windows, unless the protocol names them.
WHOLE_PIXELS = 2048 * 1024
LARGE_IMAGE_WINDOW = (1024, 1024)
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
                if _is_known(file) and not file.is_dir() and not file.resolve().is_relative_to(out)
            )
            if not inside:
                raise UserError(f"{given}: no image or video in this folder; known are {_endings()}")
            found += [(str(file), file.relative_to(path).as_posix()) for file in inside]
        elif path.is_file():
            if not _is_known(path):
                raise UserError(f"{given}: not a known kind of file; known are {_endings()}")
            found.append((given, path.name))
        elif given.isdecimal():
            found.append((given, f"webcam{given}.mp4"))
        elif glob.has_magic(given):
            matches = [
                Path(file) for file in sorted(glob.glob(given, recursive=True)) if _is_known(Path(file))
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


def predict_sources(
    model: Segmenter,
    sources: Sequence[Source],
    outputs: Outputs,
    device: torch.device,
    protocol: Protocol,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> list[str]:
    """Predicts every source and writes the results; returns one message for each that could not be read.

    on_progress(images and frames done, how many there are, or None for videos) is called after each.
    Raises UserError if a result cannot be written or a library for videos is missing.
    """
    failures: list[str] = []
    images = [source for source in sources if not source.is_video]
    videos = [source for source in sources if source.is_video]
    for source in videos[:1]:
        pyav(source.path)  # if it is missing, say so before any work is done
    total = None if videos else len(images)
    done = 0

    def run(image: Tensor) -> Prediction:
        return segment(
            model,
            image.to(device),
            protocol=protocol_for(image, protocol),
            confidence=outputs.confidence,
            prototypes=outputs.prototypes,
        )

    def tick() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    with ThreadPoolExecutor(READERS) as readers, Writers() as writers:
        for source, image in zip(images, ahead(readers, _read_or_message, images)):
            if isinstance(image, str):
                failures.append(image)
            else:
                writers.submit(write_maps, source.name, image, on_cpu(run(image)), outputs, True)
            tick()
    for source in videos:
        failures += _predict_video(source, run, outputs, tick)
    return failures


def protocol_for(image: Tensor, protocol: Protocol) -> Protocol:
    """The protocol, with windows if it names none and the image at its largest scale is too large for one."""
    pixels = image.shape[-2] * image.shape[-1] * max(protocol.scales) ** 2
    if protocol.window is None and pixels > WHOLE_PIXELS:
        return replace(protocol, window=LARGE_IMAGE_WINDOW)
    return protocol


def on_cpu(prediction: Prediction) -> Prediction:
    return Prediction(*(None if each is None else each.cpu() for each in prediction))  # type: ignore[arg-type]


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
        _save(id_image(outputs.raw_ids[classes], None), outputs.folder / "labels", f"{name}.png")
    else:
        _save(id_image(classes, outputs.palette), outputs.folder / "labels", f"{name}.png")
    if with_overlay:
        blend = overlay(image.permute(1, 2, 0).numpy(), classes, outputs.palette)
        _save(Image.fromarray(blend), outputs.folder / "overlays", f"{name}.jpg", quality=92)
    if prediction.confidence is not None:
        grey = (prediction.confidence.numpy() * 255).round().astype(np.uint8)
        _save(Image.fromarray(grey), outputs.folder / "confidence", f"{name}.png")
    if prediction.prototypes is not None:
        index = prediction.prototypes.numpy()
        palette = default_palette(int(index.max()) + 1)
        _save(id_image(index, palette), outputs.folder / "prototypes", f"{name}.png")


def overlay(picture: NDArray[np.uint8], classes: NDArray, palette: Palette) -> NDArray[np.uint8]:
    """(H, W, 3): half the picture, half the classes' colours."""
    return ((picture.astype(np.uint16) + colourise(classes, palette)) // 2).astype(np.uint8)


def id_image(ids: NDArray[np.integer], palette: Palette | None) -> Image.Image:
    """Ids (H, W) as an image with indexed colours, or grey without palette; 16-bit grey above 256 ids."""
    if (ids.max() if palette is None else len(palette) - 1) > 255:
        return Image.fromarray(ids.astype(np.uint16))
    picture = Image.fromarray(ids.astype(np.uint8))
    if palette is not None:
        picture.putpalette(np.array(palette, np.uint8).tobytes())
    return picture


def _predict_video(
    source: Source, run: Callable[[Tensor], Prediction], outputs: Outputs, tick: Callable[[], None]
) -> list[str]:
    """Labels of every frame as NAME/000000.png …, overlays as the video overlays/NAME.mp4."""
    try:
        rate, frames = read_frames(source.path)
    except UserError as error:
        return [str(error)]
    target = outputs.folder / "overlays" / f"{source.name}.mp4"
    # One thread each: frames come and go in order.
    with (
        ThreadPoolExecutor(1) as reader,
        VideoWriter(target, rate) as video,
        ThreadPoolExecutor(1) as encoder,
        Writers() as writers,
    ):
        number = 0
        encoded: deque[Future[None]] = deque()
        coming = deque(reader.submit(next, frames, None) for _ in range(AHEAD))
        try:
            while (image := coming.popleft().result()) is not None:
                coming.append(reader.submit(next, frames, None))
                prediction = on_cpu(run(image))
                writers.submit(write_maps, f"{source.name}/{number:06d}", image, prediction, outputs, False)
                picture = image.permute(1, 2, 0).numpy()
                encoded.append(
                    encoder.submit(_encode, video, picture, prediction.classes.numpy(), outputs.palette)
                )
                if len(encoded) > AHEAD:
                    encoded.popleft().result()
                number += 1
                tick()
        except UserError as error:  # damaged in the middle: what came before is kept
            return [str(error)]
        except KeyboardInterrupt:  # the only end that a webcam has
            if not source.path.isdecimal():
                raise
        for future in encoded:
            future.result()
    return []


def _encode(video: VideoWriter, picture: NDArray[np.uint8], classes: NDArray, palette: Palette) -> None:
    video.add(overlay(picture, classes, palette))


def _read_or_message(source: Source) -> Tensor | str:
    try:
        return read_image(Path(source.path), upright=True)
    except UserError as error:
        return str(error)


def _save(picture: Image.Image, folder: Path, name: str, **options: int) -> None:
    """Under another name first: a file with its own name is always whole."""
    path = folder / name
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(part, format="PNG" if path.suffix == ".png" else "JPEG", **options)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error}); check --out") from None


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in (*IMAGE_ENDINGS, *VIDEO_ENDINGS) and not path.name.startswith(".")


def _endings() -> str:
    return " ".join((*IMAGE_ENDINGS, *VIDEO_ENDINGS))
