"""Pictures: functions that take arrays and return images or figures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch as LegendPatch
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from protoseg.core.losses import nearest_cells
from protoseg.data.classes.palette import IGNORED_COLOUR
from protoseg.runtime.files import whole_file

Colours = Sequence[tuple[int, int, int]]
RIGHT, WRONG = (222, 226, 230), (200, 30, 60)
# Where two models differ: told apart by every eye and in grey.
ONLY_FIRST, ONLY_SECOND, BOTH_WRONG = (0, 114, 178), (240, 170, 20), (90, 90, 90)


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


def shades(palette: Colours, num_prototypes: int) -> NDArray[np.uint8]:
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


def resized(array: NDArray, size: tuple[int, int]) -> NDArray:
    """(H, W, …) → (*size, …), each value that of one place: no colours or ids that were not there."""
    rows, columns = (nearest_cells(new, old).numpy() for new, old in zip(size, array.shape))
    return array[np.ix_(rows, columns)]


def outlined(picture: NDArray[np.uint8], matched: NDArray[np.bool_], side: int) -> NDArray[np.uint8]:
    """A picture (s, s, 3) at `side` pixels with the matched pixels (s, s) outlined in white on black."""
    large = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)).copy()
    inside = resized(matched, (side, side))
    white = inside & ~ndimage.binary_erosion(inside, border_value=1)
    near = ndimage.binary_dilation(white, structure=np.ones((3, 3)))
    large[near] = (large[near] * 0.25).astype(np.uint8)
    large[white] = 255
    return large


DPI = 160
HEAT = "cividis"  # made for red-green blind eyes, and even in grey


def class_legend(
    figure: Figure,
    shown: Sequence[int],
    classes: Sequence[str],
    palette: Colours,
    more: Sequence[Any] = (),
    left: bool = False,
) -> None:
    """Classes and what else is drawn, below the figure; `left` leaves the right half to another legend."""
    handles = [*(swatch(palette[c], classes[c]) for c in shown), *more]
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


def swatch(colour: Sequence[int], label: str) -> LegendPatch:
    red, green, blue = (c / 255 for c in colour)
    return LegendPatch(facecolor=(red, green, blue), edgecolor="0.4", linewidth=0.4, label=label)


def bare(grid: NDArray) -> None:
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)


def plain_axes(axes: Axes) -> None:
    axes.tick_params(labelsize=6)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix chooses the format."""
    with whole_file(path) as part, rc_context({"pdf.fonttype": 42}):  # text stays text
        without_maths(figure).savefig(part, format=path.suffix[1:])


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    without_maths(figure).savefig(buffer, format="png")
    return buffer.getvalue()


def without_maths(figure: Figure) -> Figure:
    """Names of classes and runs are shown as they are: a "$" in them begins no formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure
