"""The commands on trained models and on data: evaluate, predict, import_weights, check_data."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from protoseg import distributed
from protoseg.checkpoint import load_segmenter, save_segmenter
from protoseg.config import UserError, load_config
from protoseg.data.check import check_dataset, print_report, write_bad_files
from protoseg.data.datasets import LabelMap, dataset_spec
from protoseg.data.label_ids import export_ids
from protoseg.data.prepare import prepare_ade20k_full
from protoseg.hrnet import HRNet
from protoseg.inference import Protocol
from protoseg.metrics import BOUNDARY_RATIO
from protoseg.model import autocast, build_model
from protoseg.predict import Outputs, find_sources, predict_sources
from protoseg.report import write_json
from protoseg.scoring import (
    print_comparison,
    print_run,
    score_run,
    write_class_csv,
    write_figures,
    write_scores,
)
from protoseg.segmenter_weights import load_segmenter_weights, require_complete, take_bgr_


def runs_and_overrides(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """One or two runs, and `key.sub=value` overrides, told apart from positional arguments.

    Errors: UserError for no run, or more than two.
    """
    overrides = [each for each in given if "=" in each and not Path(each).exists()]
    runs = [Path(each) for each in given if each not in overrides]
    if not 1 <= len(runs) <= 2:
        raise UserError(f"give one run, or two to compare; got {len(runs)}")
    return runs, overrides


def evaluate_command(arguments: Sequence[str]) -> None:
    """Score a trained model on a split, or compare two."""
    parser = argparse.ArgumentParser(
        prog="evaluate",
        description="Score a trained model on a labelled split; given two, compare them class by class.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_CHECKPOINT", help="one or two")
    parser.add_argument("--split", metavar="NAME", help="default: the run's validation split")
    add_protocol(parser)
    parser.add_argument(
        "--boundary",
        type=float,
        default=BOUNDARY_RATIO,
        metavar="RATIO",
        help="width of boundary IoU's region as a share of the diagonal (default 0.02)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all scores to FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the scores per class to FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write confusion.png and reliability.png")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as data.root=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    runs, overrides = runs_and_overrides(args.runs + args.overrides)
    if not 0 < args.boundary < 1:
        raise UserError(f"--boundary: wants a share of the diagonal between 0 and 1, got {args.boundary}")
    protocol = protocol_of(args)
    scores = [score_run(run, overrides, args.split, protocol, args.boundary) for run in runs]
    if not distributed.is_main():
        return
    if len(scores) == 2:
        print_comparison(*scores)
    else:
        print_run(scores[0])
    if args.json:
        write_scores(args.json, scores)
    if args.csv:
        write_class_csv(args.csv, scores)
    if args.out:
        for letter, each in zip("AB", scores):
            write_figures(args.out / letter if len(scores) == 2 else args.out, each)


def predict_command(arguments: Sequence[str]) -> None:
    """Label images, folders, videos or a webcam."""
    parser = argparse.ArgumentParser(
        prog="predict", description="Write labels and overlays of images, videos or a webcam."
    )
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
    args = parser.parse_intermixed_args(arguments)
    sources = find_sources(args.inputs, args.out)
    model, config, content = load_segmenter(args.run)
    if args.prototypes and model.prototypes is None:
        raise UserError(f"--prototypes: {args.run} has a linear classifier; leave the option out")
    device = distributed.setup()
    label_map: LabelMap | None = config.data.label_map
    if args.raw_ids:
        spec = dataset_spec(
            config.data.name,
            config.data.classes,
            ignore_index=config.data.ignore_index,
            label_map=label_map,
        )
        label_map = spec.label_map
        if list(spec.classes) != content["classes"]:
            raise UserError(f"--raw-ids: {args.run} has other classes than its dataset; leave the option out")
    outputs = Outputs(
        args.out,
        [(r, g, b) for r, g, b in content["palette"]],
        export_ids(content["classes"], label_map) if args.raw_ids else None,
        args.confidence,
        args.prototypes,
    )
    with (
        progress("predict") as on_progress,
        autocast(config, device),
    ):
        failures = predict_sources(model.to(device), sources, outputs, device, protocol_of(args), on_progress)
    if failures and len(sources) == 1:
        raise UserError(failures[0])
    for failure in failures:
        print(f"skipped: {failure}", file=sys.stderr)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(sources)} inputs could not be read; the others are in {args.out}"
        )
    print(f"{len(sources)} done: results are in {args.out}")


def import_weights_command(arguments: Sequence[str]) -> None:
    """Make a checkpoint of ours from another program's."""
    parser = argparse.ArgumentParser(
        prog="import_weights",
        description="Make a checkpoint from a whole segmenter of Hugging Face, mmsegmentation, or the"
        " releases of SegFormer and ProtoSeg.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="describes the same architecture")
    parser.add_argument("weights", metavar="CHECKPOINT", help=".pth, .safetensors or a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.pt")
    parser.add_argument(
        "--bgr",
        action="store_true",
        help="the network was trained on BGR images, as OpenSeg and ProtoSeg do (HRNet only)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as data.classes=[a,b]")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    d = config.data
    spec = dataset_spec(d.name, d.classes, d.palette, d.ignore_index, d.label_map)
    model = build_model(config)
    if args.bgr and not isinstance(model.backbone.net, HRNet):
        raise UserError(f"--bgr: is for HRNet, not for {config.backbone.name}; leave the option out")
    report = load_segmenter_weights(model, config.backbone.name, args.weights)
    print(report)
    require_complete(report)
    if args.bgr:
        take_bgr_(model.backbone.net)
    elif config.decode_head.name == "official":
        print("note: ProtoSeg's published code trains on BGR images; add --bgr if this file is from it")
    try:
        save_segmenter(args.out, model, config, spec.classes, spec.colours)
    except OSError as error:
        raise UserError(f"{args.out}: cannot write ({error.strerror}); choose another place") from None
    print(f"{args.out}: {len(spec.classes)} classes, {model.num_parameters:,} learnable parameters")


def check_data_command(arguments: Sequence[str]) -> int:
    """Find what is wrong with a dataset before training on it."""
    parser = argparse.ArgumentParser(
        prog="check_data", description="Check a config's dataset; exit code 1 if it has errors."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--bad-files", type=Path, metavar="FILE", help="write the list for data.exclude")
    parser.add_argument("--prepare", action="store_true", help="first convert a download that needs it")
    parser.add_argument("--threads", type=int, default=4, metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as data.root=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    if args.threads < 1:
        raise UserError(f"--threads: expected 1 or more, got {args.threads}")
    d = load_config(args.config, args.overrides).data
    root = d.root or Path("data") / d.name
    if args.prepare:
        if not d.name.startswith("ade20k_full"):
            raise UserError(f"--prepare: '{d.name}' is read as it was released, leave the option out")
        with progress("convert") as on_progress:
            written = prepare_ade20k_full(root, threads=args.threads, on_progress=on_progress)
        print(f"{written} images converted")
    with progress("check") as on_progress:
        report = check_dataset(
            d.name,
            root=root,
            splits=[d.train_split, d.val_split],
            classes=d.classes,
            palette=d.palette,
            ignore_index=d.ignore_index,
            label_map=d.label_map,
            exclude=d.exclude,
            threads=args.threads,
            on_progress=on_progress,
        )
    print_report(report)
    try:
        if args.json:
            write_json(args.json, report.to_plain())
        if args.bad_files:
            write_bad_files(report, args.bad_files)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot write ({error.strerror}); choose another place") from None
    return 0 if report.ok else 1


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """The options that say how an image goes through the model."""
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1.0], metavar="S", help="averaged over these"
    )
    parser.add_argument("--flip", action="store_true", help="averaged with the mirrored image")
    parser.add_argument("--window", nargs=2, type=int, metavar=("H", "W"), help="sliding window in pixels")
    parser.add_argument(
        "--step", nargs=2, type=int, metavar=("H", "W"), help="between windows (default: 2/3 of the window)"
    )


def protocol_of(args: argparse.Namespace) -> Protocol:
    """What `add_protocol` read."""
    return Protocol(
        tuple(args.window) if args.window else None,
        tuple(args.step) if args.step else None,
        tuple(args.scales),
        args.flip,
        batch=8 if torch.cuda.is_available() else 1,
    )


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar with rate and time left on a terminal: a function of (done, total or None)."""
    columns = (*Progress.get_default_columns(), TextColumn("{task.completed} {task.fields[rate]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, rate="")
        started = time.perf_counter()

        def show(done: int, total: int | None) -> None:
            rate = f"{done / max(time.perf_counter() - started, 1e-9):.1f}/s"
            bar.update(task, completed=done, total=total, rate=rate)

        yield show
