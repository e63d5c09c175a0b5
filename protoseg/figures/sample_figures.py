"""Figures of images: label and prediction, which prototype wins where, patches, two models side by side."""

from collections.abc import Sequence

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from scipy import ndimage

from protoseg.data.classes.palette import colourise
from protoseg.data.tree import LabelTree
from protoseg.figures.pictures import (
    BOTH_WRONG,
    DPI,
    HEAT,
    ONLY_FIRST,
    ONLY_SECOND,
    RIGHT,
    Colours,
    bare,
    class_legend,
    difference_map,
    error_map,
    outlined,
    resized,
    shades,
    swatch,
)
from protoseg.figures.survey import Survey


def sample_figure(
    image: NDArray[np.uint8],
    label: NDArray,
    prediction: NDArray,
    classes: Sequence[str],
    palette: Colours,
    ignore_index: int,
    tree: LabelTree | None = None,
) -> Figure:
    """Image (H, W, 3), label, prediction and errors side by side, with a legend of the classes that occur.

    Labels may be inner nodes of the tree: a class below is then right.
    """
    label, prediction = label.astype(np.int64), prediction.astype(np.int64)
    right = label
    if tree is not None:
        right, classes, palette = tree.settled(label, prediction), tree.names, tree.colours(palette)
    panels = {
        "image": image,
        "label (white: ignored)": colourise(label, palette),
        "prediction": colourise(prediction, palette),
        "errors (red)": error_map(right, prediction, ignore_index),
    }
    height = 2.6 * image.shape[0] / image.shape[1] + 0.9
    figure = Figure(figsize=(10.4, height), layout="constrained", dpi=120)
    for axes, (title, picture) in zip(figure.subplots(1, 4), panels.items()):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    present = [c for c in range(len(classes)) if (label == c).any() or (prediction == c).any()]
    handles = [swatch(palette[c], classes[c]) for c in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(present), 11) or 1, fontsize=7)
    return figure


SMALLEST_NUMBERED = 0.015  # of the cells: smaller regions of the which-prototype map carry no number


def patches_figure(title: str, rows: Sequence[tuple[str, Sequence[tuple[NDArray, str]]]]) -> Figure:
    """One row per prototype: a caption, then its nearest patches (picture, note above it). Units: inches."""
    columns = max([len(patches) for _, patches in rows] + [6])
    left, pitch = 1.15, 5.85 / 6
    width = left + columns * pitch
    heights = [pitch + 0.1 if patches else 0.2 for _, patches in rows]
    figure = Figure(figsize=(width, 0.3 + sum(heights)), dpi=DPI)
    # One frame for all: a frame for each of the many patches takes matplotlib seconds.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.text(width / 2, 0.15, title, fontsize=9, ha="center", va="center")
    top = 0.3
    for (caption, patches), height in zip(rows, heights):
        axes.text(0.06, top + height / 2, caption, fontsize=7, va="center", linespacing=1.5)
        for column, (picture, note) in enumerate(patches):
            x, y, side = left + column * pitch, top + 0.14, pitch - 0.07
            axes.imshow(picture, extent=(x, x + side, y + side, y))
            axes.text(x + side / 2, y - 0.03, note, fontsize=6, ha="center", va="bottom")
        top += height
    axes.set(xlim=(0, width), ylim=(top, 0), aspect="auto")
    axes.set_axis_off()
    return figure


def patch_rows(
    survey: Survey, c: int, classes: Sequence[str], side: int
) -> list[tuple[str, list[tuple[NDArray, str]]]]:
    """What `patches_figure` shows of a class: its prototypes by share, idle ones last; patches of `side`."""
    rows, num_prototypes = [], survey.share_CK.shape[1]
    for k in np.lexsort((-survey.share_CK[c], survey.won_CK[c] == 0)).tolist():
        share, precision, cosine = (
            table[c, k] for table in (survey.share_CK, survey.precision_CK, survey.cosine_CK)
        )
        caption = f"prototype {k + 1}\nshare {share:.0%}\nprecision {precision:.0%}\ncosine {cosine:.2f}"
        patches = [
            (
                outlined(patch.picture, patch.matched, side),
                f"{patch.cosine:.2f}" + (f"  is {classes[patch.label]}" if patch.label != c else ""),
            )
            for patch in survey.patches[c * num_prototypes + k]
        ]
        if not patches:
            caption = f"prototype {k + 1}: wins no pixel of the images looked at"
        rows.append((caption.replace("nan%", "–").replace("nan", "–"), patches))
    return rows


def similarity_figure(rows: Sequence[tuple[NDArray, str, NDArray, Sequence[int]]]) -> Figure:
    """One row per (image (H, W, 3), class name, cosine maps (J, h, w), which prototypes k these are): the
    image, then a heat map for each, called k + 1; one colour scale for all."""
    count = max(len(maps) for _, _, maps, _ in rows)
    shape = rows[0][0].shape
    width = 6.1 / (count + 1)
    figure = Figure(
        figsize=(7.0, 0.1 + len(rows) * (0.95 * width * shape[0] / shape[1] + 0.2)),
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0.01),
        dpi=DPI,
    )
    grid = figure.subplots(len(rows), count + 1, squeeze=False)
    low = min(float(maps.min()) for _, _, maps, _ in rows)
    heat = None
    for line, (image, name, maps, numbers) in zip(grid, rows):
        line[0].imshow(image)
        line[0].set_ylabel(name, fontsize=7)
        for axes, heat_map, k in zip(line[1:], maps, numbers):
            extent = (0, image.shape[1], image.shape[0], 0)
            heat = axes.imshow(heat_map, cmap=HEAT, vmin=low, vmax=1, extent=extent, interpolation="bilinear")
            axes.set_title(f"prototype {k + 1}", fontsize=7, pad=2)
        for axes in line[1 + len(maps) :]:
            axes.set_visible(False)
    bare(grid)
    bar = figure.colorbar(heat, ax=grid, shrink=0.7, pad=0.01, aspect=30)  # type: ignore[arg-type]
    bar.set_label("cosine", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return figure


def which_prototype_figure(
    rows: Sequence[tuple[NDArray, NDArray, NDArray, NDArray]],
    classes: Sequence[str],
    palette: Colours,
    num_prototypes: int,
    tree: LabelTree | None = None,
) -> Figure:
    """One row per (image, label, prediction, nearest prototype c·K + k per cell): the last in shades of the
    class colours, with lines between classes and its larger regions numbered k + 1. Labels may be inner nodes
    of the tree."""
    if tree is not None:
        classes, palette = tree.names, tree.colours(palette)
    figure = _rows_figure(len(rows), 4, rows[0][0].shape)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    table = shades(palette, num_prototypes).reshape(-1, 3)
    for line, (image, label, prediction, nearest) in zip(grid, rows):
        size = image.shape[:2]
        line[0].imshow(image)
        line[1].imshow(colourise(label, palette), interpolation="nearest")
        line[2].imshow(colourise(prediction, palette), interpolation="nearest")
        line[3].imshow(resized(table[nearest], size), interpolation="nearest")
        _border_lines(line[3], nearest // num_prototypes, size)
        _number_regions(line[3], nearest, num_prototypes, size)
    for axes, title in zip(grid[0], ("image", "label (white: ignored)", "prediction", "which prototype")):
        axes.set_title(title, fontsize=8)
    bare(grid)
    shown = {c for _, label, prediction, _ in rows for c in {*np.unique(label), *np.unique(prediction)}}
    class_legend(figure, [c for c in sorted(shown) if c < len(classes)], classes, palette)
    return figure


def comparison_figure(
    rows: Sequence[tuple[NDArray, NDArray, NDArray, NDArray]],
    names: tuple[str, str],
    classes: Sequence[str],
    palette: Colours,
) -> Figure:
    """One row per (image, label, first prediction, second prediction), and where the two differ.

    Labels that are no class are shown as ignored.
    """
    figure = _rows_figure(len(rows), 5, rows[0][0].shape)
    grid = figure.subplots(len(rows), 5, squeeze=False)
    for line, (image, label, first, second) in zip(grid, rows):
        line[0].imshow(image)
        for axes, ids in zip(line[1:4], (label, first, second)):
            axes.imshow(colourise(ids, palette), interpolation="nearest")
        unknown = len(classes)
        differ = difference_map(label.clip(max=unknown), first, second, unknown)
        line[4].imshow(differ, interpolation="nearest")
    for axes, title in zip(grid[0], ("image", "label (white: ignored)", *names, "where they differ")):
        axes.set_title(title, fontsize=8)
    bare(grid)
    figure.legend(
        handles=[
            swatch(ONLY_FIRST, f"only {names[0]} right"),
            swatch(ONLY_SECOND, f"only {names[1]} right"),
            swatch(BOTH_WRONG, "both wrong, differently"),
            swatch(RIGHT, "the same"),
        ],
        loc="outside lower right",
        fontsize=7,
        frameon=False,
    )
    shown = {c for _, *maps in rows for ids in maps for c in np.unique(ids).tolist()}
    class_legend(figure, [c for c in sorted(shown) if c < len(classes)], classes, palette, left=True)
    return figure


def _rows_figure(rows: int, columns: int, shape: tuple[int, ...]) -> Figure:
    height = 0.6 + rows * (7.0 / columns * shape[0] / shape[1] + 0.05)
    return Figure(figsize=(7.0, height), layout="constrained", dpi=DPI)


def _border_lines(axes: Axes, owner: NDArray, size: tuple[int, int]) -> None:
    """Thin lines between cells of different owners, so that the map does not live from colour alone."""
    down, right = size[0] / owner.shape[0], size[1] / owner.shape[1]
    y, x = np.nonzero(owner[:, 1:] != owner[:, :-1])
    lines = [np.stack([(x + 1) * right, y * down, (x + 1) * right, (y + 1) * down], 1)]
    y, x = np.nonzero(owner[1:] != owner[:-1])
    lines.append(np.stack([x * right, (y + 1) * down, (x + 1) * right, (y + 1) * down], 1))
    segments = np.concatenate(lines).reshape(-1, 2, 2) - 0.5  # pixel 0 is centred at 0
    axes.add_collection(LineCollection(list(segments), colors="black", linewidths=0.4))


def _number_regions(axes: Axes, nearest: NDArray, num_prototypes: int, size: tuple[int, int]) -> None:
    """The prototype's number in the middle of each region that has room for it."""
    step = (size[0] / nearest.shape[0], size[1] / nearest.shape[1])
    for number in np.unique(nearest[nearest >= 0]).tolist():
        regions, count = ndimage.label(nearest == number)
        for region in range(1, count + 1):
            inside = regions == region
            if inside.sum() < SMALLEST_NUMBERED * nearest.size:
                continue
            # The cell farthest from the region's edge: the middle of mass may lie outside of it.
            depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
            row, column = np.unravel_index(depth.argmax(), depth.shape)
            text = axes.text(
                (column + 0.5) * step[1], (row + 0.5) * step[0], str(number % num_prototypes + 1),
                fontsize=5, ha="center", va="center", color="white",
            )  # fmt: skip
            text.set_path_effects([patheffects.withStroke(linewidth=1, foreground="black")])
