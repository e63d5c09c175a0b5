"""What `tools/evaluate.py` does with one run, or with two: scores, tables, CSV and figures."""

import csv
import io
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from protoseg import distributed
from protoseg.checkpoint import load_segmenter
from protoseg.config import UserError, merge_into_trained
from protoseg.data.files import in_short, with_classes
from protoseg.data.loader import eval_loader
from protoseg.inference import Protocol, segment
from protoseg.metrics import Measures, measure
from protoseg.model import autocast
from protoseg.report import print_scores, save_figure, write_json, write_text
from protoseg.score_figures import confusion_figure, reliability_figure
from protoseg.trainer import open_dataset


@dataclass(frozen=True)
class RunScores:
    """The measures of one trained model and what they were made with."""

    title: str
    measures: Measures
    facts: dict[str, Any]  # run, step, split, images, protocol

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self.measures.to_plain(), **self.facts}


def score_run(
    path: Path, overrides: list[str], split: str | None, protocol: Protocol, boundary_ratio: float
) -> RunScores:
    """Measure a run or checkpoint on a split (default: its validation split), on all ranks.

    Errors: UserError for whatever is wrong with the checkpoint, the data or the class list.
    """
    model, config, content = load_segmenter(path)
    config = merge_into_trained(config, overrides)
    device = distributed.setup()
    split = split or config.data.val_split
    given = open_dataset(config, split)
    dataset = with_classes(given, content["classes"], content["palette"])
    ignored = [name for name in given.classes if name not in dataset.classes]
    if ignored and distributed.is_main():
        print(f"note: {path} has no class {in_short(ignored)}: these labels are ignored", flush=True)
    model = model.to(device)
    console = _console()
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    with (
        closing(eval_loader(dataset, workers=config.data.workers, **ranks)) as loader,
        autocast(config, device),
    ):
        measures = measure(
            lambda image, size: segment(model, image, size, protocol, confidence=True),
            track(
                loader,
                str(path),
                len(loader),
                transient=True,
                disable=not (distributed.is_main() and console.is_terminal),
                console=console,
            ),
            dataset.classes,
            dataset.ignore_index,
            device,
            boundary_ratio,
        )
    unlabelled = tuple(i for i, name in enumerate(dataset.classes) if name not in given.classes)
    measures = replace(measures, scores=replace(measures.scores, unlabelled=unlabelled))
    facts = {
        "run": str(path),
        "step": content["step"],
        "split": split,
        "images": len(dataset),
        "ignored_classes": ignored,
        "protocol": protocol.to_plain(),
        "boundary_ratio": boundary_ratio,
    }
    title = f"{path} (step {content['step']}) on {split}, {len(dataset)} images"
    return RunScores(title, measures, facts)


def print_run(run: RunScores) -> None:
    """Per-class table, means, boundary IoU and calibration."""
    print_scores(run.measures.scores, run.title)
    plain = run.measures.to_plain()
    error = "–" if plain["ECE"] is None else f"{plain['ECE']:.4f}"
    print(f"boundary mIoU {_percent(plain['boundary_mIoU'])}  expected calibration error {error}", flush=True)


def print_comparison(first: RunScores, second: RunScores) -> None:
    """IoU of two runs class by class, largest gain of the second first, means below."""
    for letter, run in (("A", first), ("B", second)):
        print(f"{letter}: {run.title}")
    table = Table("class", show_edge=False, pad_edge=False)
    for name in ("IoU A", "IoU B", "B − A"):
        table.add_column(name, justify="right")
    rows = comparison(first, second)
    for name, a, b in sorted(rows, key=lambda row: -difference(row[1], row[2])):
        table.add_row(escape(name), _percent(a), _percent(b), _signed(a, b))
    _console().print(table)
    plain = [run.to_plain() for run in (first, second)]
    if plain[0]["IoU"].keys() != plain[1]["IoU"].keys():
        print("note: the models have different classes, and so have the means below")
    for name in ("mIoU", "aAcc", "mAcc", "boundary_mIoU", "ECE"):
        a, b = (values[name] for values in plain)
        print(f"{name.replace('_', ' ')}: A {_percent(a)}  B {_percent(b)}  B − A {_signed(a, b)}")
    print(end="", flush=True)


def comparison(first: RunScores, second: RunScores) -> list[tuple[str, float | None, float | None]]:
    """(class, IoU of the first, IoU of the second), None where a model does not have the class.

    Errors: UserError if they share no class.
    """
    a, b = (run.measures.to_plain()["IoU"] for run in (first, second))
    if not a.keys() & b.keys():
        raise UserError(
            f"{first.facts['run']} and {second.facts['run']} have no class in common;"
            " compare models of the same classes"
        )
    return [(name, a.get(name), b.get(name)) for name in {**a, **b}]


def difference(a: float | None, b: float | None) -> float:
    """b − a, 0 where one of them is undefined."""
    return 0.0 if a is None or b is None else b - a


def write_class_csv(path: Path, runs: list[RunScores]) -> None:
    """One line per class: all scores of one run, or the IoU of two and their difference; empty: undefined."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    if len(runs) == 2:
        table.writerow(("class", "IoU A", "IoU B", "B - A"))
        for name, a, b in comparison(*runs):
            table.writerow((name, a, b, None if a is None or b is None else b - a))
    else:
        plain, confusion = runs[0].to_plain(), runs[0].measures.scores.confusion
        table.writerow(("class", "IoU", "Acc", "boundary IoU", "labelled pixels", "predicted pixels"))
        for i, name in enumerate(plain["IoU"]):
            values = (plain[key][name] for key in ("IoU", "Acc", "boundary_IoU"))
            table.writerow((name, *values, int(confusion[i].sum()), int(confusion[:, i].sum())))
    _writing(path, lambda: write_text(path, text.getvalue()))


def write_scores(path: Path, runs: list[RunScores]) -> None:
    """JSON of one run, or of two under the keys A and B."""
    plain = [run.to_plain() for run in runs]
    content = plain[0] if len(plain) == 1 else dict(zip("AB", plain))
    _writing(path, lambda: write_json(path, content))


def write_figures(folder: Path, run: RunScores) -> None:
    """confusion.png and reliability.png."""
    measures = run.measures
    figures = {
        "confusion": confusion_figure(measures.scores.confusion, measures.scores.classes),
        "reliability": reliability_figure(measures.bins, measures.calibration_error),
    }
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        _writing(path, lambda figure=figure, path=path: save_figure(figure, path))


def _writing(path: Path, write: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error}); choose another place") from None


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=100)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _signed(a: float | None, b: float | None) -> str:
    return "–" if a is None or b is None else f"{100 * (b - a):+.2f}"
