"""What a sweep ends with: results.csv, a Markdown table, and a figure, all from the runs' own folders."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from protoseg.visualize import mean_of_known

COLUMNS = ("mIoU", "effective_k", "mean_intra_cosine", "churn", "parameters", "seconds_per_step")
LINEAR, PROTOTYPES = "#d55e00", "#0072b2"  # vermilion and blue: apart for every eye, and in grey


@dataclass(frozen=True)
class Record:
    """One finished run. Health is NaN for a linear classifier; `num_per_class` is None there."""

    row: str
    seed: int
    num_per_class: int | None
    values: dict[str, float]


def read_record(row: str, seed: int, folder: Path) -> Record:
    """The numbers of a finished run; errors: OSError or ValueError if it is not one."""
    results = json.loads((folder / "results.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    linear = config["classifier"] == "linear"
    health = results.get("prototype_health", {})
    values = {
        "mIoU": results["mIoU"],
        **{key: mean_of_known(health.get(key, [])) for key in ("effective_k", "mean_intra_cosine", "churn")},
        "parameters": results["parameters"],
        "seconds_per_step": results["seconds"] / results["step"],
    }
    return Record(row, seed, None if linear else config["prototypes"]["num_per_class"], values)


def to_csv(records: Sequence[Record]) -> str:
    """One line per run; an undefined value is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "seed", *COLUMNS])
    for record in records:
        cells = [record.values[name] for name in COLUMNS]
        writer.writerow([record.row, record.seed, *("" if cell != cell else cell for cell in cells)])
    return text.getvalue()


def to_markdown(rows: Sequence[str], records: Sequence[Record]) -> str:
    """One line per row of the sweep: mean ± sample standard deviation over its seeds."""
    lines = [
        "| | mIoU % | effective K | intra-class cosine | churn | parameters (M) | s/step | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = [record.values for record in records if record.row == row]
        cells = [
            mean_sd([100 * run["mIoU"] for run in runs], 1),
            mean_sd([run["effective_k"] for run in runs], 1),
            mean_sd([run["mean_intra_cosine"] for run in runs], 2),
            mean_sd([run["churn"] for run in runs], 4, spread=False),
            mean_sd([run["parameters"] / 1e6 for run in runs], 3, spread=False),
            mean_sd([run["seconds_per_step"] for run in runs], 3, spread=False),
            str(len(runs)),
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_sd(values: Sequence[float], digits: int, spread: bool = True) -> str:
    """`mean ± sample standard deviation`; a dash where nothing is known."""
    known = [value for value in values if value == value]
    if not known:
        return "–"
    text = f"{statistics.mean(known):.{digits}f}"
    return f"{text} ± {statistics.stdev(known):.{digits}f}" if spread and len(known) > 1 else text


def sweep_figure(rows: Sequence[str], records: Sequence[Record]) -> Figure:
    """mIoU against K (log axis, linear classifiers as lines) or, if K does not vary, row by row; and against
    the number of learnable parameters. Error bars: sample standard deviation over seeds."""
    rows = [row for row in rows if any(record.row == row for record in records)]
    figure = Figure(figsize=(7.0, 2.7), layout="constrained", dpi=200)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    ks = {record.num_per_class for record in records} - {None}
    one_row_per_k = all(
        len({r.row for r in records if r.num_per_class == k}) == 1 for k in ks
    )  # several rows per K would hide each other
    if len(ks) > 1 and one_row_per_k:
        _against_k(left, rows, records)
    else:
        _row_by_row(left, rows, records)
    for row in rows:
        runs = [record for record in records if record.row == row]
        mean, sd = _score(runs)
        linear = runs[0].num_per_class is None
        colour = LINEAR if linear else PROTOTYPES
        marker = "s" if linear else "o"
        millions = runs[0].values["parameters"] / 1e6
        right.errorbar(millions, mean, sd, color=colour, marker=marker, markersize=4, capsize=2, linewidth=1)
        right.annotate(row, (millions, mean), (5, 0), textcoords="offset points", fontsize=6, va="center")
    right.margins(x=0.35)
    right.set_xlabel("learnable parameters (M)", fontsize=8)
    right.ticklabel_format(axis="x", useOffset=False)
    for axes in (left, right):
        axes.set_ylabel("mIoU (%)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _against_k(axes: Axes, rows: Sequence[str], records: Sequence[Record]) -> None:
    by_k: dict[int, list[Record]] = {}
    for record in records:
        if record.num_per_class is not None:
            by_k.setdefault(record.num_per_class, []).append(record)
    ks = sorted(by_k)
    means, sds = zip(*(_score(by_k[k]) for k in ks))
    axes.errorbar(
        ks,
        means,
        sds,
        color=PROTOTYPES,
        marker="o",
        markersize=4,
        capsize=3,
        linewidth=1.2,
        label="prototypes",
    )
    for row in rows:
        runs = [record for record in records if record.row == row and record.num_per_class is None]
        if runs:
            mean, sd = _score(runs)
            axes.axhline(mean, color=LINEAR, linewidth=1.2, linestyle="--", label=row)
            axes.axhspan(mean - sd, mean + sd, color=LINEAR, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(ks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("prototypes per class K", fontsize=8)
    axes.legend(fontsize=7, frameon=False)


def _row_by_row(axes: Axes, rows: Sequence[str], records: Sequence[Record]) -> None:
    for place, row in enumerate(rows):
        runs = [record for record in records if record.row == row]
        mean, sd = _score(runs)
        colour = LINEAR if runs[0].num_per_class is None else PROTOTYPES
        axes.errorbar(place, mean, sd, color=colour, marker="o", markersize=4, capsize=3, linewidth=1.2)
    long = max(map(len, rows)) * len(rows) > 50
    axes.set_xticks(
        range(len(rows)), rows, rotation=30 if long else 0, ha="right" if long else "center", fontsize=7
    )
    axes.margins(x=0.1)


def _score(runs: Sequence[Record]) -> tuple[float, float]:
    """Mean and sample standard deviation of mIoU in per cent; 0 for a single seed."""
    scores = [100 * run.values["mIoU"] for run in runs]
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
