"""`predict`: label images, folders, patterns, videos, a webcam.

Reading, the model and writing go on at the same time: images are decoded and results encoded in threads.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from protoseg.commands.arguments import add_protocol, protocol_of
from protoseg.commands.parser import parser_of
from protoseg.commands.prediction_files import (
    READERS,
    WRITERS,
    Outputs,
    Source,
    ahead,
    attempt,
    find_sources,
    write_maps,
)
from protoseg.commands.video import VideoWriter, pyav, read_frames
from protoseg.config import Config, merge_into_trained
from protoseg.data.classes.palette import overlay
from protoseg.data.datasets import dataset_spec, image_reader, model_tree
from protoseg.data.reading.label_ids import export_ids
from protoseg.evaluation.inference import InferenceSettings, Prediction, segment
from protoseg.models.checkpoint import load_segmenter
from protoseg.models.segmenter import Segmenter, autocast
from protoseg.runtime import distributed
from protoseg.runtime.console import progress
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import make_folder


def main(arguments: Sequence[str]) -> int:
    """Label images, folders, videos or a webcam."""
    parser = parser_of("predict", "Write labels and overlays of images, videos or a webcam.")
    parser.add_argument("run", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, folder, pattern, video, webcam number"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_protocol(parser)
    parser.add_argument("--confidence", action="store_true", help="also the probability of the class, 0…255")
    parser.add_argument("--prototypes", action="store_true", help="also the nearest prototype of the class")
    parser.add_argument(
        "--raw-ids", action="store_true", help="labels hold the dataset's own ids, as test servers want them"
    )
    parser.add_argument("--level", type=int, metavar="N", help="of the label tree, from 1 at its top")
    parser.add_argument("--page", type=int, metavar="N", help="of files with several pages, from 1")
    parser.add_argument(
        "--bands", nargs=3, type=int, metavar=("R", "G", "B"), help="of files with more than three, from 1"
    )
    parser.add_argument(
        "--value-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values that become black and white (default: as in training)",
    )
    args = parser.parse_intermixed_args(arguments)
    sources = find_sources(args.inputs, args.out)
    model, config, content = load_segmenter(args.run)
    given = {"page": args.page, "bands": args.bands, "value_range": args.value_range}
    overrides = [f"data.{key}={value}" for key, value in given.items() if value is not None]
    config = merge_into_trained(config, overrides)
    if args.prototypes:
        model.require_prototypes(f"--prototypes: {args.run}")
    device = distributed.setup()
    outputs = outputs_of(args, config, content)
    make_folder(args.out)
    with progress("predict") as on_progress, autocast(config, device):
        failures = predict_sources(
            model.to(device),
            sources,
            outputs,
            device,
            protocol_of(args, config),
            on_progress,
            image_reader(config.data),
        )
    return report(failures, len(sources), args.out)


def outputs_of(args: argparse.Namespace, config: Config, content: dict[str, Any]) -> Outputs:
    """What is written, in which ids and colours. Errors: UserError for options that do not go together."""
    ids, nodes, palette = None, None, [(r, g, b) for r, g, b in content["palette"]]
    if args.raw_ids:
        spec = dataset_spec(config.data)
        if list(spec.classes) != content["classes"]:
            raise UserError(f"--raw-ids: {args.run} has other classes than its dataset; leave the option out")
        ids = export_ids(content["classes"], spec.label_map)
    if args.level is not None:
        if args.raw_ids:
            raise UserError("--raw-ids: nodes of a label tree have none; leave --level or --raw-ids out")
        tree = model_tree(config.data, content["classes"])
        if tree is None:
            raise UserError(f"--level: {args.run} has no label tree; train with data.tree, or leave it out")
        if not 1 <= args.level <= tree.height:
            raise UserError(f"--level: the tree of {args.run} has levels 1-{tree.height}, got {args.level}")
        nodes, palette = tree.level_of_classes(args.level), tree.colours(palette)
        print("in labels/: " + ", ".join(f"{v} {tree.names[v]}" for v in nodes.unique().tolist()), flush=True)
    return Outputs(args.out, palette, ids, args.confidence, args.prototypes, nodes)


def report(failures: Sequence[str], count: int, out: Path) -> int:
    """Say how `count` inputs went; returns the exit code. Errors: UserError where all failed."""
    if len(failures) == count == 1:
        raise UserError(failures[0])
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if len(failures) == count:
        raise UserError(f"all {count} inputs failed, the last with: {failures[-1]}")
    if failures:
        print(f"error: {len(failures)} of {count} inputs failed; the others are in {out}", file=sys.stderr)
        return 1
    print(f"{count} done: results are in {out}")
    return 0


def predict_sources(
    model: Segmenter,
    sources: Sequence[Source],
    outputs: Outputs,
    device: torch.device,
    protocol: InferenceSettings,
    on_progress: Callable[[int, int | None], None],
    read_image: Callable[[Path], Tensor],
) -> list[str]:
    """Predicts every source and writes the results; returns one message for each that failed in some way.

    on_progress(images and frames done, how many there are, or None for videos) is called after each.
    Errors: UserError if the disk is full or a library for videos is missing.
    """
    failures: dict[Source, UserError] = {}
    images = [source for source in sources if not source.is_video]
    videos = [source for source in sources if source.is_video]
    for source in videos[:1]:
        pyav(source.path)  # if it is missing, say so before any work is done
    total = None if videos else len(images)
    done = itertools.count(1)

    def tick() -> None:
        on_progress(next(done), total)

    def run(source: Source, image: Tensor) -> Prediction:
        with too_large_explained(source):
            prediction = segment(
                model,
                image.to(device),
                protocol=protocol,
                confidence=outputs.confidence,
                prototypes=outputs.prototypes,
            )
        found = Prediction(*(None if each is None else each.cpu() for each in prediction))  # type: ignore
        return found if outputs.nodes is None else found._replace(classes=outputs.nodes[found.classes])

    def read(source: Source) -> Tensor | UserError:
        return attempt(read_image, Path(source.path))

    def predicted() -> Iterator[tuple[Source, Any, Prediction | UserError]]:
        for source, image in zip(images, ahead(readers, read, images)):
            yield source, image, image if isinstance(image, UserError) else attempt(run, source, image)

    def write(item: tuple[Source, Any, Prediction | UserError]) -> tuple[Source, UserError | None]:
        source, image, prediction = item
        if isinstance(prediction, UserError):
            return source, prediction
        return source, attempt(write_maps, source.name, image, prediction, outputs, True)

    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers:
        for source, error in ahead(writers, write, predicted()):
            if error is not None:
                failures[source] = error
            tick()
    for source in videos:
        error = attempt(_predict_video, source, run, outputs, tick)
        if error is not None:
            failures[source] = error
    return [str(failures[source]) for source in sources if source in failures]


@contextmanager
def too_large_explained(source: Source) -> Iterator[None]:
    """Errors: UserError where memory does not suffice for one input."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        raise UserError(f"{source.path}: memory does not suffice; use a smaller --window") from None


def _predict_video(
    source: Source, run: Callable[[Source, Tensor], Prediction], outputs: Outputs, tick: Callable[[], None]
) -> UserError | None:
    """Labels of every frame as NAME/000000.png …, overlays as the video overlays/NAME.mp4.

    Returns what could not be written first. Errors: UserError for a video that cannot be read, or not to its
    end: what came before is kept.
    """
    rate, frames = read_frames(source.path)
    errors: list[UserError] = []

    def predicted() -> Iterator[tuple[str, Tensor, Prediction]]:
        for number, image in enumerate(ahead(reader, lambda _: next(frames, None), itertools.count())):
            if image is None:
                return
            yield f"{source.name}/{number:06d}", image, run(source, image)
            tick()

    def write(frame: tuple[str, Tensor, Prediction]) -> tuple[Tensor, Prediction]:
        if (error := attempt(write_maps, *frame, outputs, False)) is not None:
            errors.append(error)
        return frame[1:]

    def encode(frame: tuple[Tensor, Prediction]) -> None:
        image, prediction = frame
        picture = rearrange(image.numpy(), "c h w -> h w c")
        video.add(overlay(picture, prediction.classes.numpy(), outputs.palette))

    # One thread to read and one to encode: frames come and go in order.
    with (
        ThreadPoolExecutor(1) as reader,
        VideoWriter(outputs.folder / "overlays" / f"{source.name}.mp4", rate) as video,
        ThreadPoolExecutor(1) as encoder,
        ThreadPoolExecutor(WRITERS) as writers,
    ):
        try:
            for _ in ahead(encoder, encode, ahead(writers, write, predicted())):
                pass
        except KeyboardInterrupt:  # the only end that a webcam has
            if not source.path.isdecimal():
                raise
    return errors[0] if errors else None
