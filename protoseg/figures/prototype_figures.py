"""Figures of the prototypes themselves: cosines, shares, and where they stand among their pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from protoseg.core.health import perplexity
from protoseg.data.tree import LabelTree
from protoseg.figures.pictures import (
    DPI,
    HEAT,
    Colours,
    bare,
    class_legend,
    plain_axes,
    shades,
)
from protoseg.figures.survey import Survey

NEIGHBOURS = 5  # pixels between which t-SNE shows a prototype


def project(emb_ND: NDArray, protos_MD: NDArray, seed: int = 0) -> dict[str, tuple[NDArray, NDArray]]:
    """t-SNE (cosine distances) and PCA of pixels, with prototypes → name: ((N, 2), (M, 2)).

    Prototypes are means, nearer to each other than to any pixel: laid out together with the pixels, t-SNE
    would put them on an island of their own. So each stands at the median place of its nearest pixels.
    """
    from sklearn.decomposition import PCA  # slow to load, and training needs the other figures alone
    from sklearn.manifold import TSNE

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
    palette: Colours,
) -> Figure:
    """One column per model (name, what `project` gave, label of each pixel, class of each prototype and its
    share of the class's pixels), one row per projection: pixels as dots, prototypes as diamonds, the larger
    the more pixels they have, both in the class's colour."""
    kinds = list(columns[0][1])
    several = len(columns) > 1
    figure = Figure(figsize=(7.0, 3.1 * len(kinds) if several else 3.3), layout="constrained", dpi=DPI)
    grid = figure.subplots(*((len(kinds), len(columns)) if several else (1, len(kinds))), squeeze=False)
    grid = grid.T if several else grid
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
    bare(grid)
    present = sorted({c for column in columns for c in column[2].tolist()})
    diamond = Line2D(
        [], [], marker="D", markersize=5, color="none", markerfacecolor="0.8", markeredgecolor="black",
        label="prototype (size: share of the class's pixels)",
    )  # fmt: skip
    class_legend(figure, present, classes, palette, [diamond])
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
    plain_axes(right)
    return figure


def distance_figure(
    emb_ND: NDArray,
    label_N: NDArray,
    protos_CKD: NDArray,
    live_C: NDArray[np.bool_],
    classes: Sequence[str],
    palette: Colours,
) -> Figure:
    """Pixels (N, D) by their cosine with the nearest prototype of their own and of any other class, and per
    class the difference of the two: a pixel's signed distance from the border, negative on the wrong side.
    Only classes in `live_C` have prototypes; there have to be two of them, and a pixel of one."""
    keep_N = live_C[label_N]
    emb_ND, label_N = emb_ND[keep_N], label_N[keep_N]
    cosine_NC = np.stack([(emb_ND @ protos_KD.T).max(1) for protos_KD in protos_CKD], axis=1)
    cosine_NC[:, ~live_C] = -np.inf
    mine_NC = np.arange(len(classes)) == label_N[:, None]
    own_N = np.where(mine_NC, cosine_NC, -np.inf).max(1)
    other_N = np.where(mine_NC, -np.inf, cosine_NC).max(1)
    present = np.unique(label_N).tolist()
    figure = Figure(figsize=(7.0, max(3.3, 0.6 + 0.2 * len(present))), layout="constrained", dpi=DPI)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    left.scatter(own_N, other_N, s=4, c=np.array(palette)[label_N] / 255, linewidths=0, alpha=0.7)
    lowest = float(min(own_N.min(), other_N.min()))
    left.plot([lowest, 1], [lowest, 1], color="0.3", linewidth=0.8)
    left.set_aspect("equal", adjustable="datalim")
    left.set_xlabel("cosine with the nearest prototype of its class", fontsize=7)
    left.set_ylabel("cosine with the nearest of another class", fontsize=7)
    boxes = right.boxplot(
        [(own_N - other_N)[label_N == c] for c in present],
        orientation="horizontal", patch_artist=True, widths=0.7, flierprops={"markersize": 1.5},
        medianprops={"color": "black"},
    )  # fmt: skip
    for box, c in zip(boxes["boxes"], present):
        box.set_facecolor(np.array(palette[c]) / 255)
    right.axvline(0, color="0.3", linewidth=0.8)
    right.set_yticks(range(1, len(present) + 1), [classes[c] for c in present], fontsize=6)
    right.invert_yaxis()
    right.set_xlabel("signed distance: own − other cosine", fontsize=7)
    for axes in (left, right):
        plain_axes(axes)
    return figure


def tree_figure(tree: LabelTree, palette: Colours, survey: Survey) -> Figure:
    """The label tree from left to right; each class with its prototypes: the nearest training pixel of each,
    and the share of the class's pixels, the largest first. Units: inches."""
    leaves, colours, count = tree.leaves(), np.array(tree.colours(palette)) / 255, survey.share_CK.shape[1]
    pitch, step, top = min(0.5, 30 / len(leaves)), 1.15, 0.1
    height_of = {c: top + (i + 0.5) * pitch for i, c in enumerate(leaves)}
    for node in (*reversed(tree.depth_first()), -1):
        if node not in height_of:
            height_of[node] = float(np.mean([height_of[child] for child in tree.children(node)]))
    left, bottom = (tree.height + 1) * step, 2 * top + len(leaves) * pitch
    right = left + count * pitch + top
    figure = Figure(figsize=(right, bottom), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    for node in tree.depth_first():
        x, y, parent = (tree.depths[node] - 0.8) * step, height_of[node], tree.parents[node]
        trunk, end = x - 0.12 * step, left if node in leaves else x
        start = trunk if parent < 0 else x - step
        line_y = (height_of[parent], height_of[parent], y, y)
        axes.plot((start, trunk, trunk, end), line_y, color="0.75", linewidth=0.8, zorder=1)
        axes.text(
            x, y, tree.names[node], fontsize=min(7, 16 * pitch), va="center",
            bbox={"facecolor": "white", "edgecolor": colours[node], "linewidth": 1.6, "pad": 1.5},
        )  # fmt: skip
    for c in leaves:
        order = np.argsort(-survey.share_CK[c], kind="stable").tolist()
        for column, k in enumerate(k for k in order if survey.patches[c * count + k]):
            side = 0.94 * pitch
            x, y = left + column * pitch, height_of[c] - side / 2
            axes.imshow(survey.patches[c * count + k][0].picture, extent=(x, x + side, y + side, y))
            note = f"{survey.share_CK[c, k]:.0%}"
            text = axes.text(x + 0.05 * side, y + 0.93 * side, note, fontsize=10 * pitch, color="white")
            text.set_path_effects([patheffects.withStroke(linewidth=1, foreground="black")])
    axes.set(xlim=(0, right), ylim=(bottom, 0), aspect="auto")
    axes.set_axis_off()
    return figure


def prototypes_in_use(share_CK: NDArray) -> NDArray:
    """How many prototypes share each class's pixels out: perplexity of the shares, 1 to K; 0 if none."""
    return perplexity(torch.from_numpy(share_CK)).nan_to_num(0).numpy()


def assignment_figure(share_CK: NDArray, classes: Sequence[str], palette: Colours) -> Figure:
    """How each class's pixels are shared out among its prototypes, one bar per class, largest share first;
    beside it how many are in use."""
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
    right.plot(prototypes_in_use(share_CK), places, "o", color="0.25", markersize=3.5)
    right.set_xlim(0.9, count + 0.1)
    right.set_xlabel(f"in use (of {count})", fontsize=7)
    right.grid(axis="x", color="0.9", linewidth=0.6)
    for axes in (left, right):
        plain_axes(axes)
        axes.tick_params(axis="y", length=0)
    return figure
