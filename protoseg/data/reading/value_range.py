"""From the values that files hold to 8 bits, alike for all images of a dataset."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protoseg.data.reading.pixels import StoredImage, has_deep_pixels
from protoseg.runtime.errors import UserError

Range = tuple[float, float]
SMALLEST_SHARE = 0.1  # of the range: an image that uses less of it is nearly one grey


class Extremes(NamedTuple):
    """What an image's finite values run from and to."""

    low: float
    high: float
    dtype: str
    whole: bool  # no fractions


def extremes(values: NDArray) -> Extremes:
    """Smallest and largest finite value."""
    whole = values.dtype.kind in "uib"
    finite = values if whole else values[np.isfinite(values)]
    if not finite.size:
        return Extremes(0.0, 0.0, values.dtype.name, whole)
    return Extremes(
        float(finite.min()),
        float(finite.max()),
        values.dtype.name,
        whole or bool((finite == np.floor(finite)).all()),
    )


def common_range(images: Iterable[Extremes]) -> Range | None:
    """The range for images with these extremes; None if all have 8 bits, which need none.

    From 0, or the smallest value if it is negative, to the largest value; whole numbers up to the next
    2ⁿ − 1, since that is what cameras fill. Raises UserError where images of 8 bits stand among deep ones
    with larger values: no one range is right for both.
    """
    known = list(images)
    deep = [each for each in known if each.dtype != "uint8"]
    if not deep:
        return None
    low, high = min(0.0, *(each.low for each in deep)), max(each.high for each in deep)
    whole = all(each.whole for each in deep)
    if len(deep) < len(known) and (high > 255 or low < 0 or not whole):
        raise UserError(
            f"data: {len(known) - len(deep)} image(s) have 8 bits and {len(deep)} hold values from {low:g} to"
            f" {high:g}; bring them to one depth, or say data.value_range: [low, high] for all of them"
        )
    if whole and low == 0:
        high = float(2 ** max(8, int(high).bit_length()) - 1)
    elif not whole and low == 0 and high <= 1:
        high = 1.0
    return low, max(high, low + 1e-6)


def measure_range(
    files: Sequence[Path], read: Callable[[Path], StoredImage], threads: int = 4
) -> Range | None:
    """`common_range` of image files. Only those with more than 8 bits are read, and broken ones left out."""
    with ThreadPoolExecutor(threads) as pool:
        deep = [file for file, is_deep in zip(files, pool.map(has_deep_pixels, files)) if is_deep]

        def measure(file: Path) -> Extremes | None:
            try:
                return extremes(read(file).values)
            except Exception:  # training reads it again and says what is wrong
                return None

        known = [each for each in pool.map(measure, deep) if each is not None]
    eight_bits = Extremes(0, 255, "uint8", True)
    return common_range(known + [eight_bits] * (len(files) - len(deep)))


def to_bytes(values: NDArray, value_range: Range | None) -> NDArray[np.uint8]:
    """Values of any type as 0…255: low becomes 0, high 255, what is beyond is cut off, NaN 0.

    Without a range 8 bits stay as they are and 16 become the upper 8. Raises ValueError for all others, and
    for 16 bits that fill less than a tenth of them: their range is not that of the type; with a range, for 8
    bits that cannot fill a tenth of it.
    """
    if value_range is None:
        if values.dtype == np.uint8:
            return values
        low, high, dtype, _ = extremes(values)
        if values.dtype != np.uint16 or high < SMALLEST_SHARE * 65535:
            raise ValueError(
                f"{dtype} values from {low:g} to {high:g}, and nothing says what is black and white: give"
                " data.value_range: [low, high] (predict: --value-range)"
            )
        return (values >> 8).astype(np.uint8)
    low, high = value_range
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values
    if values.dtype == np.uint8 and SMALLEST_SHARE * (high - low) > 255:
        raise ValueError(
            f"8 bits, but the range of the others is {low:g} to {high:g}: nearly one grey of it; give"
            " data.value_range: [0, 255] (predict: --value-range 0 255) if it is a picture like them"
        )
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.rint(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255)).astype(np.uint8)
