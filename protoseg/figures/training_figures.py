"""Curves of a run: losses, scores and the prototypes' health over its steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from protoseg.config import LossConfig
from protoseg.figures.pictures import DPI, plain_axes

LOSSES = ("loss", *LossConfig().by_term)  # the sum and its terms


def curves_figure(lines: Sequence[dict[str, Any]]) -> Figure:
    """Losses, validation mIoU and prototype health over the steps, from the lines of metrics.jsonl."""
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    with_health = [line for line in evaluations if "prototype_health" in line]
    figure = Figure(figsize=(4 * (3 if with_health else 2), 3), layout="constrained", dpi=120)
    axes = figure.subplots(1, 3 if with_health else 2)
    for name in LOSSES:
        points = [(line["step"], line[name]) for line in train if name in line]
        if points:
            axes[0].plot(*zip(*points), label=name, linewidth=1)
    axes[0].set(title="training loss (terms before weighting)", xlabel="step", yscale="log")
    for formatter in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        formatter(LogFormatter())  # in figures, not in a formula: see `without_maths`
    axes[0].legend(fontsize=7)
    axes[1].plot(
        [line["step"] for line in evaluations],
        [line["mIoU"] for line in evaluations],
        marker="o",
        markersize=3,
    )
    axes[1].set(title="validation mIoU", xlabel="step", ylim=(0, 1))
    if with_health:
        steps = [line["step"] for line in with_health]
        for target, colour, title, names in (
            (axes[2], "C0", "effective K (dashed: of the nearest)", ("effective_k", "in_use")),
            (axes[2].twinx(), "C1", "mean intra-class cosine", ("mean_intra_cosine",)),
        ):
            for name, dashes in zip(names, ("-", "--")):
                values = [mean_of_known(line["prototype_health"][name]) for line in with_health]
                target.plot(steps, values, dashes, marker="o", markersize=3, color=colour)
            target.set_ylabel(title, color=colour)
            top = target.dataLim.y1
            target.set_ylim(0, 1.1 * top if 0 < top < np.inf else 1.1)
        axes[2].set(title="prototypes (mean over classes)", xlabel="step")
    for each in axes:
        each.spines[["top"]].set_visible(False)
    return figure


def mean_of_known(values: Sequence[float | None]) -> float:
    """Mean of the values that are defined; NaN if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def health_figure(lines: Sequence[dict[str, Any]]) -> Figure:
    """State of the prototypes at each evaluation (lines of metrics.jsonl): mean and range over classes."""
    lines = [line for line in lines if "prototype_health" in line]
    titles = {
        "effective_k": "effective K\nin clustering",
        "in_use": "effective K\nof the nearest",
        "mean_intra_cosine": "intra-class\ncosine",
        "churn": "churn",
        "dead": "dead\nprototypes",
    }
    figure = Figure(figsize=(7.0, 1.9), layout="constrained", dpi=DPI)
    for axes, (key, title) in zip(figure.subplots(1, len(titles)), titles.items()):
        values = np.array([line["prototype_health"][key] for line in lines], dtype=np.float64)
        known = ~np.isnan(values).all(1)
        values, steps = values[known], np.array([line["step"] for line in lines])[known]
        axes.fill_between(
            steps, np.nanmin(values, 1), np.nanmax(values, 1), color="#0072b2", alpha=0.2, linewidth=0
        )
        axes.plot(
            steps,
            np.nanmean(values, 1),
            color="#0072b2",
            marker="o",
            markersize=3,
            linewidth=1.2,
            clip_on=False,
        )
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("step", fontsize=7)
        axes.set_ylim(0, 1.05 * np.nanmax(values, initial=1.0) if key == "dead" else None)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        plain_axes(axes)
    return figure
