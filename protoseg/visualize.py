"""Pictures: functions that take arrays and return images or figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Palette = Sequence[tuple[int, int, int]]
IGNORED_COLOUR = (255, 255, 255)
RIGHT, WRONG = (222, 226, 230), (200, 30, 60)
# Where two models differ: told apart by every eye and in grey.
ONLY_FIRST, ONLY_SECOND, BOTH_WRONG = (0, 114, 178), (240, 170, 20), (90, 90, 90)


def colourise(label: NDArray, palette: Palette) -> NDArray[np.uint8]:
    """(H, W) class ids → (H, W, 3) colours; ids without a colour (ignored pixels) become white."""
    table = np.array([*palette, IGNORED_COLOUR], dtype=np.uint8)
    return table[np.where((label >= 0) & (label < len(palette)), label, len(palette))]


def error_map(label: NDArray, prediction: NDArray, ignore_index: int) -> NDArray[np.uint8]:
    """(H, W, 3): grey where the prediction is right, red where it is wrong, white where nobody knows."""
    picture = np.where((label == prediction)[..., None], np.array(RIGHT, np.uint8), np.array(WRONG, np.uint8))
    return np.where((label == ignore_index)[..., None], np.array(IGNORED_COLOUR, np.uint8), picture)


def difference_map(label: NDArray, first: NDArray, second: NDArray, ignore_index: int) -> NDArray[np.uint8]:
    """(H, W, 3): blue where only the first prediction is right, orange where only the second is, dark grey
    where both are wrong in different ways, pale where they agree, white where nobody knows."""
    picture = np.full((*label.shape, 3), RIGHT, np.uint8)
    differ = first != second
    picture[differ] = BOTH_WRONG
    picture[differ & (first == label)] = ONLY_FIRST
    picture[differ & (second == label)] = ONLY_SECOND
    picture[label == ignore_index] = IGNORED_COLOUR
    return picture


def shades(palette: Palette, num_prototypes: int) -> NDArray[np.uint8]:
    """(C, K, 3): each prototype its own shade of the class's colour, from dark to light.

    Dark colours have more room upwards, light ones downwards: no two shades are the same.
    """
    shades_CK3 = np.empty((len(palette), num_prototypes, 3), dtype=np.uint8)
    for colour, made_K3 in zip(np.array(palette, dtype=np.float64), shades_CK3):
        light = colour @ (0.299, 0.587, 0.114) / 255
        ends = (-min(1.0, 2 * light), min(1.0, 2 * (1 - light)))
        place_K1 = np.linspace(*ends, num_prototypes)[:, None] if num_prototypes > 1 else np.zeros((1, 1))
        darker = colour * (1 + 0.6 * np.minimum(place_K1, 0))
        made_K3[:] = np.round(darker + (255 - darker) * 0.65 * np.maximum(place_K1, 0))
    return shades_CK3


def enlarged(picture: NDArray, size: tuple[int, int]) -> NDArray:
    """(h, w, 3) → (*size, 3), every pixel a block: no colours that were not there."""
    rows = np.arange(size[0]) * picture.shape[0] // size[0]
    columns = np.arange(size[1]) * picture.shape[1] // size[1]
    return picture[np.ix_(rows, columns)]


def outlined(picture: NDArray[np.uint8], matched: NDArray[np.bool_], side: int) -> NDArray[np.uint8]:
    """A picture (s, s, 3) at `side` pixels with the matched pixels (s, s) outlined in white on black."""
    large = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)).copy()
    inside = enlarged(matched[..., None], (side, side))[..., 0]
    white = inside & ~ndimage.binary_erosion(inside, border_value=1)
    near = ndimage.binary_dilation(white, structure=np.ones((3, 3)))
    large[near] = (large[near] * 0.25).astype(np.uint8)
    large[white] = 255
    return large


def sample_figure(
    image: NDArray[np.uint8],
    label: NDArray,
    prediction: NDArray,
    classes: Sequence[str],
    palette: Palette,
    ignore_index: int,
) -> Figure:
    """Image (H, W, 3), label, prediction and errors side by side, with a legend of the classes that occur."""
    label, prediction = label.astype(np.int64), prediction.astype(np.int64)
    panels = {
        "image": image,
        "label (white: ignored)": colourise(label, palette),
        "prediction": colourise(prediction, palette),
        "errors (red)": error_map(label, prediction, ignore_index),
    }
    height = 2.6 * image.shape[0] / image.shape[1] + 0.9
    figure = Figure(figsize=(10.4, height), layout="constrained", dpi=120)
    for axes, (title, picture) in zip(figure.subplots(1, 4), panels.items()):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    present = [c for c in range(len(classes)) if (label == c).any() or (prediction == c).any()]
    handles = [
        Patch(
            facecolor="#{:02x}{:02x}{:02x}".format(*palette[c]),
            edgecolor="0.4",
            linewidth=0.4,
            label=classes[c],
        )
        for c in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(present), 11) or 1, fontsize=7)
    return figure


def curves_figure(lines: Sequence[dict[str, Any]]) -> Figure:
    """Losses, validation mIoU and prototype health over the steps, from the lines of metrics.jsonl."""
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    with_health = [line for line in evaluations if "prototype_health" in line]
    figure = Figure(figsize=(4 * (3 if with_health else 2), 3), layout="constrained", dpi=120)
    axes = figure.subplots(1, 3 if with_health else 2)
    for name in ("loss", "ce", "ppc", "ppd", "auxiliary", "contrast"):
        points = [(line["step"], line[name]) for line in train if name in line]
        if points:
            axes[0].plot(*zip(*points), label=name, linewidth=1)
    axes[0].set(title="training loss (terms before weighting)", xlabel="step", yscale="log")
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
