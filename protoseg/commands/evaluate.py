"""`evaluate`: score a trained model on a split, or compare two."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from protoseg.commands.arguments import add_protocol, protocol_of, runs_and_overrides
from protoseg.commands.parser import parser_of
from protoseg.config import merge_into_trained
from protoseg.data.datasets import model_tree, open_dataset
from protoseg.data.file_dataset import with_classes
from protoseg.evaluation.level_scores import ConsistencyCount
from protoseg.evaluation.scores import BOUNDARY_RATIO, evaluate_segmenter
from protoseg.evaluation.tables import (
    RunScores,
    print_comparison,
    print_run,
    write_class_csv,
)
from protoseg.figures.pictures import save_figure
from protoseg.figures.score_figures import confusion_figure, reliability_figure
from protoseg.models.checkpoint import load_segmenter
from protoseg.runtime import distributed
from protoseg.runtime.errors import UserError, in_short
from protoseg.runtime.files import write_json


def score_run(path: Path, overrides: list[str], split: str | None, args: argparse.Namespace) -> RunScores:
    """Measure a run or checkpoint on a split (default: its validation split), on all ranks.

    Errors: UserError for whatever is wrong with the checkpoint, the data or the class list.
    """
    model, config, content = load_segmenter(path)
    config = merge_into_trained(config, overrides)
    protocol = protocol_of(args, config)
    device = distributed.setup()
    split = split or config.data.val_split
    given = open_dataset(config, split)
    dataset = with_classes(given, content["classes"], content["palette"])
    ignored = [name for name in given.classes if name not in dataset.classes]
    if ignored and distributed.is_main():
        print(f"note: {path} has no class {in_short(ignored)}: these labels are ignored", flush=True)
    tree = model_tree(config.data, dataset.classes)
    count = None if tree is None else ConsistencyCount(tree, device)
    scores = evaluate_segmenter(
        model.to(device),
        config,
        dataset,
        device,
        protocol,
        title=str(path),
        boundary_ratio=args.boundary,
        tree=tree,
        on_band=None if count is None else count.add,
    )
    unlabelled = tuple(i for i, name in enumerate(dataset.classes) if name not in given.classes)
    consistency = None if count is None else distributed.all_reduce(count.counts).cpu()
    scores = replace(scores, unlabelled=unlabelled, consistency=consistency)
    facts = {
        "run": str(path),
        "step": content["step"],
        "split": split,
        "images": len(dataset),
        "ignored_classes": ignored,
        "protocol": protocol.to_plain(),
        "boundary_ratio": args.boundary,
    }
    title = f"{path} (step {content['step']}) on {split}, {len(dataset)} images"
    return RunScores(title, scores, facts)


def write_figures(folder: Path, run: RunScores) -> None:
    """confusion.png and reliability.png."""
    scores = run.scores
    assert scores.bins is not None, "the command counts everything"
    figures = {
        "confusion": confusion_figure(scores.confusion, scores.classes, scores.tree),
        "reliability": reliability_figure(scores.bins, scores.calibration_error),
    }
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")


def main(arguments: Sequence[str]) -> None:
    """Score a trained model on a split, or compare two."""
    parser = parser_of(
        "evaluate", "Score a trained model on a labelled split; given two, compare them class by class."
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
    scores = [score_run(run, overrides, args.split, args) for run in runs]
    if not distributed.is_main():
        return
    if len(scores) == 2:
        print_comparison(*scores)
    else:
        print_run(scores[0])
    if args.json:
        plain = [run.to_plain() for run in scores]
        write_json(args.json, plain[0] if len(plain) == 1 else dict(zip("AB", plain)))
    if args.csv:
        write_class_csv(args.csv, scores)
    if args.out:
        for letter, each in zip("AB", scores):
            write_figures(args.out / letter if len(scores) == 2 else args.out, each)
