"""Colours of classes; those for classes that bring none are far apart, for red-green blind eyes too."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Palette = tuple[tuple[int, int, int], ...]
IGNORED_COLOUR = (255, 255, 255)
# Linear RGB seen by a deuteranope (Viénot, Brettel, Mollon 1999).
_DEUTERANOPE = np.array([[0.2928, 0.7072, 0.0], [0.2928, 0.7072, 0.0], [-0.0223, 0.0223, 1.0]])
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = np.array([0.9505, 1.0, 1.089])


def hex_colours(text: str) -> Palette:
    """RGB triples from "rrggbb rrggbb …"."""
    return tuple((r, g, b) for r, g, b in map(bytes.fromhex, text.split()))


@cache
def default_palette(count: int) -> Palette:
    """`count` RGB triples, always the same, each the farthest from those before it.

    Distance is the smaller of two CIELAB distances: as seen, and as a deuteranope sees it. Black and white
    are kept free for the ignored pixels and the text of a figure.
    """
    levels = np.linspace(0, 255, 12).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    linear = np.where(grid <= 10.3, grid / 255 / 12.92, ((grid / 255 + 0.055) / 1.055) ** 2.4)
    seen = (_lab(linear), _lab(linear @ _DEUTERANOPE.T))

    def apart(index: int) -> NDArray[np.float64]:
        return np.minimum(*(np.linalg.norm(lab - lab[index], axis=1) for lab in seen))

    nearest = np.minimum(apart(0), apart(len(grid) - 1))
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, apart(chosen[-1]))
    return tuple((int(r), int(g), int(b)) for r, g, b in grid[chosen])


def colourise(label: NDArray, palette: Sequence[tuple[int, int, int]]) -> NDArray[np.uint8]:
    """(H, W) class ids → (H, W, 3) colours; ids without a colour (ignored pixels) become white."""
    table = np.array([*palette, IGNORED_COLOUR], dtype=np.uint8)
    return table[np.where((label >= 0) & (label < len(palette)), label, len(palette))]


def overlay(
    picture: NDArray[np.uint8], classes: NDArray, palette: Sequence[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """(H, W, 3): half the picture, half the classes' colours."""
    return ((picture.astype(np.uint16) + colourise(classes, palette)) // 2).astype(np.uint8)


def _lab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio = (linear.clip(0, 1) @ _XYZ.T) / _WHITE
    root = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    x, y, z = root.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
