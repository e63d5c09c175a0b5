"""What a sweep ends with: results.csv, a Markdown table, and a figure, all from the runs' own folders."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from protoseg.figures.training_figures import mean_of_known

HEALTH = ("in_use", "own_cosine", "agreement", "mean_intra_cosine", "churn")
COLUMNS = ("mIoU", *HEALTH, "parameters", "seconds_per_step")
LINEAR, PROTOTYPES = "#d55e00", "#0072b2"  # vermilion and blue: apart for every eye, and in grey


@dataclass(frozen=True)
class Record:
    """One finished run. Health is NaN for a learned classifier; `num_per_class` is None there."""

    row: str
    seed: int
    num_per_class: int | None
    values: dict[str, float]


def read_record(row: str, seed: int, folder: Path) -> Record:
    """The numbers of a finished run; errors: OSError or ValueError if it is not one."""
    results = json.loads((folder / "results.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    learned = config["classifier"] != "prototypes"
    health, levels = results.get("prototype_health", {}), results.get("levels", {})
    values = {
        "mIoU": mean_of_known([results["mIoU"]]),  # none where the labels are ignored everywhere
        **{key: mean_of_known(health.get(key, [])) for key in HEALTH},
        "parameters": results["parameters"],
        "seconds_per_step": results["seconds"] / results["step"],
    }
    if levels:  # of a label tree; the last level is that of the classes
        values |= {f"mIoU_level_{n}": mean_of_known([levels[n]["mIoU"]]) for n in list(levels)[:-1]}
        values["tree_distance"] = mean_of_known([results["tree_distance"]])
    return Record(row, seed, None if learned else config["prototypes"]["num_per_class"], values)


def to_csv(records: Sequence[Record]) -> str:
    """One line per run; an undefined value is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = (*COLUMNS, *_tree_columns(records))
    writer.writerow(["row", "seed", *columns])
    for record in records:
        cells = [record.values.get(name, math.nan) for name in columns]
        writer.writerow([record.row, record.seed, *("" if cell != cell else cell for cell in cells)])
    return text.getvalue()


def to_markdown(rows: Sequence[str], records: Sequence[Record]) -> str:
    """One line per row of the sweep: mean ± sample standard deviation over its seeds."""
    tree = _tree_columns(records)
    titles = ["", "mIoU %", *(f"level {name.removeprefix('mIoU_level_')} %" for name in tree[:-1])]
    titles += ["tree distance of wrong pixels"] * bool(tree)
    titles += ["in use", "own cosine", "agreement", "parameters (M)", "s/step", "seeds"]
    lines = [f"|{' |'.join(f' {title}' if title else '' for title in titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        runs = [record.values for record in records if record.row == row]
        cells = [
            mean_sd([100 * run["mIoU"] for run in runs], 1),
            *(mean_sd([100 * run.get(name, math.nan) for run in runs], 1) for name in tree[:-1]),
            *(mean_sd([run.get(name, math.nan) for run in runs], 2) for name in tree[-1:]),
            mean_sd([run["in_use"] for run in runs], 1),
            mean_sd([run["own_cosine"] for run in runs], 2),
            mean_sd([run["agreement"] for run in runs], 2),
            mean_sd([run["parameters"] / 1e6 for run in runs], 3, spread=False),
            mean_sd([run["seconds_per_step"] for run in runs], 3, spread=False),
            str(len(runs)),
        ]
        name = row.replace("|", "\\|")  # which would end the cell
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _tree_columns(records: Sequence[Record]) -> list[str]:
    """Scores on a label tree that some run has: of the levels above the classes, and the tree distance."""
    names = {name for record in records for name in record.values if name not in COLUMNS}
    return sorted(names)


def mean_sd(values: Sequence[float], digits: int, spread: bool = True) -> str:
    """`mean ± sample standard deviation`; a dash where nothing is known."""
    known = [value for value in values if value == value]
    if not known:
        return "–"
    text = f"{statistics.mean(known):.{digits}f}"
    return f"{text} ± {statistics.stdev(known):.{digits}f}" if spread and len(known) > 1 else text


def sweep_figure(rows: Sequence[str], records: Sequence[Record]) -> Figure:
    """mIoU against K (log axis, learned classifiers as lines) and against the number of learnable parameters;
    if K does not vary, or other things do, mIoU and parameters row by row. Error bars: sample standard
    deviation over seeds, none for a single seed."""
    runs = {row: [record for record in records if record.row == row] for row in rows}
    runs = {row: its for row, its in runs.items() if its}
    ks = {its[0].num_per_class for its in runs.values()} - {None}
    # Several rows with one K would hide each other.
    varies = len(ks) > 1 and len(ks) == sum(its[0].num_per_class is not None for its in runs.values())
    height = 2.7 if varies else 0.7 + 0.2 * len(runs)
    figure = Figure(figsize=(7.0, height), layout="constrained", dpi=200)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1) if varies else (2, 1), sharey=True)
    if varies:
        _against_k(left, runs)
        _against_parameters(right, runs)
    else:
        _row_by_row(left, right, runs)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _against_k(axes: Axes, runs: dict[str, list[Record]]) -> None:
    by_k = sorted((its[0].num_per_class, *_score(its)) for its in runs.values() if its[0].num_per_class)
    ks, means, sds = zip(*by_k)
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.2}
    axes.errorbar(ks, means, sds, color=PROTOTYPES, label="prototypes", **style)
    for row, its in runs.items():
        if its[0].num_per_class is None:
            mean, sd = _score(its)
            axes.axhline(mean, color=LINEAR, linewidth=1.2, linestyle="--", label=row)
            if len(its) > 1:
                axes.axhspan(mean - sd, mean + sd, color=LINEAR, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(ks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("prototypes per class K", fontsize=8)
    axes.set_ylabel("mIoU (%)", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _against_parameters(axes: Axes, runs: dict[str, list[Record]]) -> None:
    lowest, highest = axes.get_ylim()  # shared with the other panel
    label_at = dict.fromkeys((its[0].values["parameters"] for its in runs.values()), -math.inf)
    for row, its in sorted(runs.items(), key=lambda item: _score(item[1])):
        parameters, (mean, sd) = its[0].values["parameters"], _score(its)
        style: dict[str, Any] = {
            "marker": "s" if its[0].num_per_class is None else "o",
            "color": _colour(its),
        }
        axes.errorbar(parameters / 1e6, mean, sd, markersize=4, capsize=2, linewidth=1, **style)
        # From below: a label moves up where it would cover the one before.
        label_at[parameters] = max(mean, label_at[parameters] + 0.065 * (highest - lowest))
        at = (parameters / 1e6, label_at[parameters])
        axes.annotate(row, at, (6, 0), textcoords="offset points", fontsize=6, va="center")
    axes.margins(x=0.35)
    axes.set_xlabel("learnable parameters (M)", fontsize=8)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(3))


def _row_by_row(left: Axes, right: Axes, runs: dict[str, list[Record]]) -> None:
    for place, its in enumerate(runs.values()):
        mean, sd = _score(its)
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "color": _colour(its)}
        left.errorbar(mean, place, xerr=sd, capsize=3, linewidth=1.2, **style)
        right.plot(its[0].values["parameters"] / 1e6, place, **style)
    left.set_yticks(range(len(runs)), list(runs), fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("mIoU (%)", fontsize=8)
    right.set_xlabel("learnable parameters (M)", fontsize=8)
    right.ticklabel_format(axis="x", useOffset=False)
    right.xaxis.set_major_locator(MaxNLocator(3))
    for axes in (left, right):
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)


def _colour(runs: Sequence[Record]) -> str:
    return LINEAR if runs[0].num_per_class is None else PROTOTYPES


def _score(runs: Sequence[Record]) -> tuple[float, float]:
    """Mean and sample standard deviation of mIoU in per cent; NaN for a single seed."""
    scores = [100 * run.values["mIoU"] for run in runs]
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else math.nan
