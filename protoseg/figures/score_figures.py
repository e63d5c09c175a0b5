"""Figures of `tools/evaluate.py`: confusion matrix and reliability diagram.

C classes, J bins of confidence.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from protoseg.data.tree import LabelTree


def confusion_figure(confusion: Tensor, classes: Sequence[str], tree: LabelTree | None = None) -> Figure:
    """Pixel counts (C, C) as shares of each labelled class: row = label, column = prediction.

    With a label tree siblings stand side by side, and boxes frame the subtrees.
    """
    if tree is not None:
        order = tree.leaves()
        confusion, classes = confusion[order][:, order], [classes[c] for c in order]
    counts = confusion.double().numpy()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.28 * len(classes), 24)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained", dpi=120)
    axes = figure.subplots()
    image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the labelled pixels of the row's class", shrink=0.7)
    axes.set(xlabel="prediction", ylabel="label")
    every = -(-len(classes) // 170)  # more names would overlap
    places, names = range(0, len(classes), every), classes[::every]
    size = 8 if len(classes) <= 75 else 6
    axes.set_xticks(places, names, rotation=90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    if tree is not None:
        for node in range(tree.num_classes, len(tree.names)):
            mine = [tree.leaves().index(c) for c in tree.leaves(node)]
            corner, side = min(mine) - 0.5, len(mine)
            width = 2.4 / tree.depths[node]
            axes.add_patch(
                Rectangle((corner, corner), side, side, fill=False, edgecolor="#c8501e", linewidth=width)
            )
    if len(classes) <= 25:  # with more, the numbers could not be read
        for row, column in zip(*np.nonzero(share >= 0.005)):
            value = share[row, column]
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    return figure


def reliability_figure(bins: Tensor, calibration_error: float) -> Figure:
    """Accuracy against confidence in bins (3, J: pixels, sum of confidence, right), pixel shares below."""
    pixels, confidence, right = bins.numpy()
    used = pixels > 0
    mean_confidence, accuracy = confidence[used] / pixels[used], right[used] / pixels[used]
    figure = Figure(figsize=(4, 4.8), layout="constrained", dpi=120)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfect calibration")
    upper.plot(mean_confidence, accuracy, marker="o", markersize=4, label="this model")
    upper.set(ylabel="accuracy", ylim=(0, 1), title=f"expected calibration error {calibration_error:.4f}")
    upper.legend(fontsize=7, loc="upper left")
    width = 1 / len(pixels)
    lower.bar((np.arange(len(pixels)) + 0.5) * width, 100 * pixels / max(pixels.sum(), 1), width=0.9 * width)
    lower.set(xlabel="confidence", ylabel="% of pixels", xlim=(0, 1))
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
