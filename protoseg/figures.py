"""Figures about prototypes for papers and notebooks: functions that take arrays and return figures.

C classes, K prototypes per class, D channels; widths suit a double column of 7 inches.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch as LegendPatch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from protoseg.visualize import (
    BOTH_WRONG,
    ONLY_FIRST,
    ONLY_SECOND,
    RIGHT,
    Palette,
    colourise,
    difference_map,
    enlarged,
    shades,
)

DPI = 160
HEAT = "cividis"  # made for red-green blind eyes, and even in grey
SMALLEST_NUMBERED = 0.015  # of the cells: smaller regions of the which-prototype map carry no number
NEIGHBOURS = 5  # pixels between which t-SNE shows a prototype


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
    _bare(grid)
    bar = figure.colorbar(heat, ax=grid, shrink=0.7, pad=0.01, aspect=30)  # type: ignore[arg-type]
    bar.set_label("cosine", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return figure


def which_prototype_figure(
    rows: Sequence[tuple[NDArray, NDArray, NDArray, NDArray]],
    classes: Sequence[str],
    palette: Palette,
    num_prototypes: int,
) -> Figure:
    """One row per (image, label, prediction, nearest prototype c·K + k per cell): the last in shades of the
    class colours, with lines between classes and its larger regions numbered k + 1."""
    figure = _rows_figure(len(rows), 4, rows[0][0].shape)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    table = shades(palette, num_prototypes).reshape(-1, 3)
    for line, (image, label, prediction, nearest) in zip(grid, rows):
        size = image.shape[:2]
        line[0].imshow(image)
        line[1].imshow(colourise(label, palette), interpolation="nearest")
        line[2].imshow(colourise(prediction, palette), interpolation="nearest")
        line[3].imshow(enlarged(table[nearest], size), interpolation="nearest")
        _border_lines(line[3], nearest // num_prototypes, size)
        _number_regions(line[3], nearest, num_prototypes, size)
    for axes, title in zip(grid[0], ("image", "label (white: ignored)", "prediction", "which prototype")):
        axes.set_title(title, fontsize=8)
    _bare(grid)
    shown = {c for _, label, prediction, _ in rows for c in {*np.unique(label), *np.unique(prediction)}}
    _class_legend(figure, [c for c in sorted(shown) if c < len(classes)], classes, palette)
    return figure


def comparison_figure(
    rows: Sequence[tuple[NDArray, NDArray, NDArray, NDArray]],
    names: tuple[str, str],
    classes: Sequence[str],
    palette: Palette,
    ignore_index: int,
) -> Figure:
    """One row per (image, label, first prediction, second prediction), and where the two differ."""
    figure = _rows_figure(len(rows), 5, rows[0][0].shape)
    grid = figure.subplots(len(rows), 5, squeeze=False)
    for line, (image, label, first, second) in zip(grid, rows):
        line[0].imshow(image)
        for axes, ids in zip(line[1:4], (label, first, second)):
            axes.imshow(colourise(ids, palette), interpolation="nearest")
        line[4].imshow(difference_map(label, first, second, ignore_index), interpolation="nearest")
    for axes, title in zip(grid[0], ("image", "label (white: ignored)", *names, "where they differ")):
        axes.set_title(title, fontsize=8)
    _bare(grid)
    figure.legend(
        handles=[
            _swatch(ONLY_FIRST, f"only {names[0]} right"),
            _swatch(ONLY_SECOND, f"only {names[1]} right"),
            _swatch(BOTH_WRONG, "both wrong, differently"),
            _swatch(RIGHT, "the same"),
        ],
        loc="outside lower right",
        fontsize=7,
        frameon=False,
    )
    shown = {c for _, *maps in rows for ids in maps for c in np.unique(ids).tolist()}
    _class_legend(figure, [c for c in sorted(shown) if c < len(classes)], classes, palette, left=True)
    return figure


def project(emb_ND: NDArray, protos_MD: NDArray, seed: int = 0) -> dict[str, tuple[NDArray, NDArray]]:
    """t-SNE (cosine distances) and PCA of pixels, with prototypes → name: ((N, 2), (M, 2)).

    Prototypes are means, nearer to each other than to any pixel: laid out together with the pixels, t-SNE
    would put them on an island of their own. So each stands at the median place of its nearest pixels.
    """
    protos_MD = protos_MD.reshape(-1, emb_ND.shape[1])
    perplexity = min(30.0, (len(emb_ND) - 1) / 3)
    with threadpool_limits(1):  # on a busy machine its threads wait for each other many times longer
        layout = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
        tsne_N2 = layout.fit_transform(emb_ND)
    neighbours_MJ = np.argsort(-protos_MD @ emb_ND.T, axis=1)[:, :NEIGHBOURS]
    pca = PCA(2, random_state=seed).fit(emb_ND)
    protos_pca_M2 = pca.transform(protos_MD) if len(protos_MD) else np.zeros((0, 2))
    return {
        "t-SNE": (tsne_N2, np.median(tsne_N2[neighbours_MJ], axis=1)),
        "PCA": (pca.transform(emb_ND), protos_pca_M2),
    }


def embedding_figure(
    columns: Sequence[tuple[str, dict[str, tuple[NDArray, NDArray]], NDArray, NDArray, NDArray]],
    classes: Sequence[str],
    palette: Palette,
) -> Figure:
    """One column per model (name, what `project` gave, label of each pixel, class of each prototype and its
    share of the class's pixels), one row per projection: pixels as dots, prototypes as diamonds, the larger
    the more pixels they have, both in the class's colour."""
    kinds = list(columns[0][1])
    figure = Figure(
        figsize=(3.5 * max(len(columns), len(kinds) if len(columns) == 1 else 1), 3.3),
        layout="constrained",
        dpi=DPI,
    )
    if len(columns) > 1:
        figure.set_size_inches(7.0, 3.1 * len(kinds))
        grid = figure.subplots(len(kinds), len(columns), squeeze=False).T
    else:
        grid = figure.subplots(1, len(kinds), squeeze=False)
    table = np.array(palette) / 255
    for line, (name, projections, label_N, class_M, share_M) in zip(grid, columns):
        order_M = np.argsort(-share_M)  # the small ones above
        area_M, colour_M = (6 + 50 * share_M)[order_M], table[class_M][order_M]
        for axes, (kind, (pixels, prototypes)) in zip(line, projections.items()):
            axes.scatter(*pixels.T, s=4, c=table[label_N], linewidths=0, alpha=0.7)
            places = prototypes[order_M].T
            axes.scatter(*places, s=area_M, c=colour_M, marker="D", edgecolors="white", linewidths=1.8)
            axes.scatter(*places, s=area_M, c=colour_M, marker="D", edgecolors="black", linewidths=0.7)
            axes.set_title(f"{name}, {kind}", fontsize=8)
            axes.set_aspect("equal", adjustable="datalim")
    _bare(grid)
    present = sorted({c for column in columns for c in column[2].tolist()})
    diamond = Line2D(
        [], [], marker="D", markersize=5, color="none", markerfacecolor="0.8", markeredgecolor="black",
        label="prototype (size: share of the class's pixels)",
    )  # fmt: skip
    _class_legend(figure, present, classes, palette, [diamond])
    return figure


def cosine_figure(protos_CKD: NDArray, classes: Sequence[str]) -> Figure:
    """Cosines between all prototypes, class by class, and their histogram within and between classes."""
    num_classes, count, dim = protos_CKD.shape
    rows_MD = protos_CKD.reshape(-1, dim)
    cosines = (rows_MD @ rows_MD.T).clip(-1, 1)
    low = min(float(cosines.min()), 0.99)  # prototypes that are all the same still need a scale
    owner = np.repeat(np.arange(num_classes), count)
    figure = Figure(figsize=(7.0, 3.3), layout="constrained", dpi=DPI)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    shown = left.imshow(cosines, cmap=HEAT, vmin=low, vmax=1, interpolation="nearest")
    bar = figure.colorbar(shown, ax=left, shrink=0.8)
    bar.set_label("cosine", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    for edge in range(1, num_classes if num_classes <= 30 else 1):
        left.axhline(edge * count - 0.5, color="white", linewidth=0.6)
        left.axvline(edge * count - 0.5, color="white", linewidth=0.6)
    every = -(-num_classes // 25)
    places = np.arange(num_classes)[::every]
    names = [classes[c] for c in places]
    long = max(map(len, names)) > 2
    left.set_xticks((places + 0.5) * count - 0.5, names, rotation=90 if long else 0, fontsize=6)
    left.set_yticks((places + 0.5) * count - 0.5, names, fontsize=6)
    left.tick_params(length=0)
    upper = np.triu(np.ones_like(cosines, dtype=bool), 1)
    same = owner[:, None] == owner[None]
    bins = np.linspace(low, 1, 41).tolist()
    if num_classes > 1:
        right.hist(
            cosines[upper & ~same], bins, density=True, color="#d55e00", alpha=0.6, label="different classes"
        )
    if count > 1:
        right.hist(
            cosines[upper & same],
            bins,
            density=True,
            histtype="step",
            color="#0072b2",
            linewidth=1.4,
            label="same class",
        )
    right.set_xlabel("cosine of two prototypes", fontsize=8)
    right.set_ylabel("density", fontsize=8)
    right.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    _plain(right)
    return figure


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
        _plain(axes)
    return figure


def assignment_figure(share_CK: NDArray, classes: Sequence[str], palette: Palette) -> Figure:
    """How each class's pixels are shared out among its prototypes, one bar per class, largest share first;
    beside it the effective number exp(entropy)."""
    num_classes, count = share_CK.shape
    figure = Figure(figsize=(7.0, 0.6 + 0.2 * num_classes), layout="constrained", dpi=DPI)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    table = shades(palette, count) / 255
    places = np.arange(num_classes)
    order_CK = np.argsort(-share_CK, axis=1, kind="stable")
    start_C = np.zeros(num_classes)
    for rank in range(count):
        k_C = order_CK[:, rank]
        width_C = share_CK[places, k_C]
        left.barh(
            places,
            100 * width_C,
            left=100 * start_C,
            color=table[places, k_C],
            edgecolor="white",
            linewidth=0.5,
        )
        for c in places[width_C > 0.04]:
            light = table[c, k_C[c]] @ (0.299, 0.587, 0.114) > 0.55
            middle = 100 * (start_C[c] + width_C[c] / 2)
            ink = "black" if light else "white"
            left.text(middle, c, str(k_C[c] + 1), fontsize=5.5, ha="center", va="center", color=ink)
        start_C += width_C
    left.set_yticks(places, classes, fontsize=7)
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_xlabel("share of the class's pixels (%), number = prototype", fontsize=7)
    entropy_C = -(share_CK * np.log(np.maximum(share_CK, 1e-12))).sum(1)
    right.plot(np.exp(entropy_C), places, "o", color="0.25", markersize=3.5)
    right.set_xlim(0.9, count + 0.1)
    right.set_xlabel(f"effective number (of {count})", fontsize=7)
    right.grid(axis="x", color="0.9", linewidth=0.6)
    for axes in (left, right):
        _plain(axes)
        axes.tick_params(axis="y", length=0)
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


def _class_legend(
    figure: Figure,
    shown: Sequence[int],
    classes: Sequence[str],
    palette: Palette,
    more: Sequence[Any] = (),
    left: bool = False,
) -> None:
    """Classes and what else is drawn, below the figure; `left` leaves the right half to another legend."""
    handles = [*(_swatch(palette[c], classes[c]) for c in shown), *more]
    longest = max([len(classes[c]) for c in shown] + [4])
    columns = max(1, min(len(handles), (60 if left else 105) // (longest + 6)))
    figure.legend(
        handles=handles,
        loc="outside lower left" if left else "outside lower center",
        ncols=columns,
        fontsize=7,
        frameon=False,
        columnspacing=1,
        handlelength=1.2,
    )


def _swatch(colour: Sequence[int], label: str) -> LegendPatch:
    red, green, blue = (c / 255 for c in colour)
    return LegendPatch(facecolor=(red, green, blue), edgecolor="0.4", linewidth=0.4, label=label)


def _bare(grid: NDArray) -> None:
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=6)
    axes.spines[["top", "right"]].set_visible(False)
