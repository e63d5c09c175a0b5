"""Scores as console tables, CSV, and one run beside another."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from protoseg.evaluation.scores import Scores
from protoseg.runtime.console import plain_console
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import write_text


@dataclass(frozen=True)
class RunScores:
    """The scores of one trained model and what they were made with."""

    title: str
    scores: Scores
    facts: dict[str, Any]  # run, step, split, images, protocol

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self.scores.to_plain(), **self.facts}


def print_run(run: RunScores) -> None:
    """Per-class table, means, boundary IoU and calibration."""
    print_scores(run.scores, run.title)
    plain = run.scores.to_plain()
    error = "–" if plain["ECE"] is None else f"{plain['ECE']:.4f}"
    print(f"boundary mIoU {_percent(plain['boundary_mIoU'])}  expected calibration error {error}", flush=True)
    if "inconsistent" in plain:
        print(
            f"inconsistent pixels {_percent(plain['inconsistent'])} % (each level by itself, by its leaves'"
            f" summed probability: {_percent(plain['inconsistent_by_sum'])} %)",
            flush=True,
        )


def print_comparison(first: RunScores, second: RunScores) -> None:
    """IoU of two runs class by class, largest gain of the second first, means below."""
    for letter, run in (("A", first), ("B", second)):
        print(f"{letter}: {run.title}")
    table = Table("class", show_edge=False, pad_edge=False)
    for name in ("IoU A", "IoU B", "B − A"):
        table.add_column(name, justify="right")
    rows = comparison(first, second)
    for name, a, b in sorted(rows, key=lambda row: -difference(row[1], row[2])):
        table.add_row(name, _percent(a), _percent(b), _signed(a, b))
    plain_console().print(table)
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
    a, b = (run.scores.to_plain()["IoU"] for run in (first, second))
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
        plain, confusion = runs[0].to_plain(), runs[0].scores.confusion
        table.writerow(("class", "IoU", "Acc", "boundary IoU", "labelled pixels", "predicted pixels"))
        for i, name in enumerate(plain["IoU"]):
            values = (plain[key][name] for key in ("IoU", "Acc", "boundary_IoU"))
            table.writerow((name, *values, int(confusion[i].sum()), int(confusion[:, i].sum())))
    write_text(path, text.getvalue())


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.2f}"


def _signed(a: float | None, b: float | None) -> str:
    return "–" if a is None or b is None else f"{100 * (b - a):+.2f}"


def print_scores(scores: Scores, title: str) -> None:
    """Per-class table with the means below it."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("class")
    for name in ("IoU", "Acc", "pixels"):
        table.add_column(name, justify="right")
    pixels = scores.confusion.sum(1).tolist()
    total = max(sum(pixels), 1)
    for name, iou, accuracy, count in zip(
        scores.classes, scores.iou.tolist(), scores.accuracy.tolist(), pixels
    ):
        table.add_row(name, _percent(iou), _percent(accuracy), f"{100 * count / total:.2f} %")
    plain = scores.to_plain()
    print(title)  # not the table's own, which would be folded to the table's width
    plain_console().print(table)
    absent = [name for name, iou in plain["IoU"].items() if iou is None]
    note = f"  (absent, left out of the mean: {', '.join(absent)})" if absent else ""
    print(
        "  ".join(f"{name} {_percent(plain[name])}" for name in ("mIoU", "aAcc", "mAcc")) + note, flush=True
    )
    if "levels" in plain:
        levels = "  ".join(f"{level}: {_percent(each['mIoU'])}" for level, each in plain["levels"].items())
        distance = plain["tree_distance"]
        far = "–" if distance is None else f"{distance:.2f}"
        print(f"mIoU by level of the tree  {levels}  mean tree distance of wrong pixels {far}", flush=True)
