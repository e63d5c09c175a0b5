"""The embedded data set: real handwritten digits over dimmed photographs, composed on the fly.

Nothing is read from disk but what scikit-learn ships: `load_digits` (1,797 digits of 8×8 pixels, UCI "Optical
Recognition of Handwritten Digits") and `load_sample_images` (two photographs). Digits are drawn 28–36 pixels
high, so a stroke is about 6 pixels wide: wider than the stride 4 of the decode head.
"""

import colorsys
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from protoseg.data.classes.palette import Palette, hex_colours
from protoseg.runtime.errors import UserError

CLASSES = (*(str(digit) for digit in range(10)), "background")  # class id = the digit; background = 10
BACKGROUND = 10
IGNORE_INDEX = 255
PALETTE = hex_colours("e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c fabebe 000000")
LENGTHS = {"train": 4096, "val": 256}
CELL = 36  # one digit at most per square of this side, pixels
SMALLEST, LARGEST = 28, 36  # side of the 8×8 sample's square in the scene, pixels
_GLYPH = 64  # side of the stored, smoothly enlarged sample
_PHOTO_LIGHT = 0.45
# Coverage above _INSIDE is the digit, below _OUTSIDE background; between them nobody can say: ignored.
_OUTSIDE, _INSIDE = 64, 192


def known_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """The class names as a tuple. Errors: UserError unless they are digits and background, each once."""
    if not set(classes) <= set(CLASSES) or len(set(classes)) < len(classes):
        raise UserError(f"data.classes: digits has {', '.join(CLASSES)}, each once; got {', '.join(classes)}")
    if "background" not in classes or len(classes) < 2:
        raise UserError("data.classes: digits needs 'background' and at least one digit")
    return tuple(classes)


def colours(classes: Sequence[str]) -> Palette:
    """The palette of these classes."""
    return tuple(PALETTE[CLASSES.index(name)] for name in classes)


@cache
def _glyphs(
    split: str, classes: tuple[str, ...] = CLASSES
) -> tuple[tuple[Image.Image, ...], NDArray[np.int64]]:
    """Enlarged coverage maps of one split and their class ids. Every fifth sample of each digit is val."""
    from sklearn.datasets import load_digits  # slow to load, and a model needs the class names alone

    data = load_digits()
    keep = np.zeros(len(data.target), dtype=bool)
    for digit in range(10):
        keep[np.flatnonzero(data.target == digit)[::5]] = True
    if split == "train":
        keep = ~keep
    keep &= np.isin(data.target, [digit for digit in range(10) if str(digit) in classes])
    glyphs = []
    for sample in data.images[keep]:
        grey = Image.fromarray(np.round(sample * (255 / 16)).astype(np.uint8))
        large = np.asarray(grey.resize((_GLYPH, _GLYPH), Image.Resampling.BICUBIC), dtype=np.float32)
        # A soft threshold at half ink turns the blur of the 8×8 scan into a stroke with an anti-aliased edge.
        glyphs.append(Image.fromarray(np.clip((large - 70) * 2.5, 0, 255).astype(np.uint8)))
    return tuple(glyphs), np.array([classes.index(str(digit)) for digit in data.target[keep]])


@cache
def _photos() -> tuple[NDArray[np.uint8], ...]:
    from sklearn.datasets import load_sample_images

    return tuple(np.round(photo * _PHOTO_LIGHT).astype(np.uint8) for photo in load_sample_images().images)


class Digits:
    """Scenes of digits on a loose grid, a pure function of (seed, split, index).

    No handwriting is in both splits. `read` gives an image (3, H, W) uint8 and a label (H, W) uint8 whose ids
    are those of `classes` (by default the digits 0–9, then 10 for background), and 255 on the ambiguous rim
    of the strokes. With fewer classes the scenes have these digits only. Errors: UserError for wrong
    arguments.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        length: int | None = None,
        size: tuple[int, int] = (72, 72),
        classes: Sequence[str] = CLASSES,
    ) -> None:
        if split not in LENGTHS:
            raise UserError(
                f"data.train_split or val_split: digits has no split '{split}';"
                f" use one of {', '.join(LENGTHS)}"
            )
        if min(size) < CELL + 8:  # a turned digit of the largest side needs 42
            raise UserError(f"data: a digits scene of {size} pixels is too small; use {CELL + 8} or more")
        self.classes = known_classes(classes)
        self.palette = colours(self.classes)
        self.split = split
        self.seed = seed
        self.size = size
        self.length = LENGTHS[split] if length is None else length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{self.split}_{index:05d}"

    def stamp(self, index: int) -> str:
        return f"digits {self.name(index)} of {self.seed}, {self.size}, {self.classes}"

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, list(LENGTHS).index(self.split), index))
        height, width = self.size
        image = _photo_crop(rng, height, width)
        label = np.full((height, width), self.classes.index("background"), dtype=np.uint8)
        glyphs, digits = _glyphs(self.split, self.classes)
        for top, left in _cells(rng, height, width):
            which = int(rng.integers(len(glyphs)))
            colour = _bright_colour(rng)
            cover = _turned(glyphs[which], rng.uniform(SMALLEST, LARGEST), math.radians(rng.uniform(-10, 10)))
            extent = cover.shape[0]
            slack = CELL - extent
            top += round(rng.uniform(min(0, slack), max(0, slack)))
            left += round(rng.uniform(min(0, slack), max(0, slack)))
            top, left = min(max(top, 0), height - extent), min(max(left, 0), width - extent)
            window = np.s_[top : top + extent, left : left + extent]
            alpha = cover[..., None].astype(np.int32)
            image[window] = (image[window] * (255 - alpha) + colour * alpha + 127) // 255
            part = label[window]
            part[cover > _OUTSIDE] = IGNORE_INDEX
            part[cover > _INSIDE] = digits[which]
        return rearrange(torch.from_numpy(image), "h w c -> c h w").contiguous(), torch.from_numpy(label)

    def label(self, index: int) -> torch.Tensor:
        return self.read(index)[1]


def _photo_crop(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    photos = _photos()
    photo = photos[int(rng.integers(len(photos)))]
    if photo.shape[0] < height or photo.shape[1] < width:  # scenes larger than the photograph mirror it
        grow = ((0, max(0, height - photo.shape[0])), (0, max(0, width - photo.shape[1])), (0, 0))
        photo = np.pad(photo, grow, mode="symmetric")
    top = int(rng.integers(photo.shape[0] - height + 1))
    left = int(rng.integers(photo.shape[1] - width + 1))
    step = 1 if rng.random() < 0.5 else -1
    return photo[top : top + height, left : left + width][:, ::step].copy()


def _cells(rng: np.random.Generator, height: int, width: int) -> list[tuple[int, int]]:
    """Top left corners of the cells that get a digit: five in six, in random order, never none.

    A loose grid instead of free places: many digits, and neighbours that only touch now and then.
    """
    rows, columns = height // CELL, width // CELL
    above, before = rng.integers(height - rows * CELL + 1), rng.integers(width - columns * CELL + 1)
    corners = [(int(above) + y * CELL, int(before) + x * CELL) for y in range(rows) for x in range(columns)]
    order = rng.permutation(len(corners))
    return [corners[i] for n, i in enumerate(order) if n == 0 or rng.random() < 5 / 6]


def _bright_colour(rng: np.random.Generator) -> NDArray[np.int32]:
    red_green_blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 0.9), rng.uniform(0.8, 1.0))
    return np.round(np.array(red_green_blue) * 255).astype(np.int32)


def _turned(glyph: Image.Image, side: float, angle: float) -> NDArray[np.uint8]:
    """The glyph at `side` pixels, turned by `angle` radians, in the square that holds it."""
    extent = math.ceil(side * (math.cos(angle) + abs(math.sin(angle))))
    zoom = _GLYPH / side
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    middle, origin = extent / 2, _GLYPH / 2
    # Pillow wants the map from output to input coordinates.
    matrix = (cos, -sin, origin - middle * (cos - sin), sin, cos, origin - middle * (sin + cos))
    turned = glyph.transform((extent, extent), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(turned)
