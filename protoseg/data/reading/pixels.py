"""Pixels as an image file stores them, in any depth: JPEG and PNG by torchvision, TIFF by tifffile, the rest
by Pillow.
"""

import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from PIL import Image
from torchvision import io

Image.MAX_IMAGE_PIXELS = None  # a guard against uploads, but these are the user's own files
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112
_NODATA = 42113  # of GDAL: the value where nothing was measured, read as NaN here
_MARKS = (b"Exif\0\0", b"eXIf", b"EXIF", b"Raw profile type exif", b"tiff:Orientation")


class StoredImage(NamedTuple):
    """An image file's pixels."""

    values: NDArray  # (3, H, W) in the type of the file
    orientation: int  # its EXIF tag, 1 (upright) to 8


def read_pixels(
    path: Path, *, upright: bool = True, bands: Sequence[int] | None = None, page: int | None = None
) -> StoredImage:
    """An image file in three bands: grey is repeated, alpha dropped, the EXIF tag followed if `upright`.

    `bands`, `page`: which to take, counted from 1. Raises ValueError where a file has more than three bands
    or more than one page and none are named; OSError, SyntaxError, RuntimeError if it cannot be read.
    """
    content = path.read_bytes()
    if content[:4] in TIFF_SIGNATURES:
        values, orientation = _read_tiff(content, bands, page)
    else:
        values, orientation = _read_other(content, bands, page), orientation_of(content)
    return StoredImage(np.ascontiguousarray(turned(values, orientation) if upright else values), orientation)


def has_deep_pixels(path: Path) -> bool:
    """Whether an image file has more than 8 bits per band, from its head alone; False if it is unreadable."""
    if path.suffix.lower() not in (".png", ".tif", ".tiff"):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(26)
            if head[:4] not in TIFF_SIGNATURES:
                return head[:8] == PNG_SIGNATURE and head[24:25] == b"\x10"
            import tifffile

            file.seek(0)
            with tifffile.TiffFile(file) as tiff:
                dtype = tiff.pages.first.dtype
                return dtype is not None and dtype.itemsize > 1
    except Exception:  # reading it will say what is wrong
        return False


def full_pages(tiff: "tifffile.TiffFile") -> list:  # type: ignore[name-defined]  # noqa: F821
    """The pages of a TIFF but for the smaller copies and masks that some programs add."""
    return [page for page in tiff.pages if not page.is_reduced and not page.is_mask]


def tiff_orientation(page: "tifffile.TiffPage") -> int:  # type: ignore[name-defined]  # noqa: F821
    """The tag of a page, 1 where it has none or a wrong one."""
    tag = page.tags.get(_ORIENTATION)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def require_page(count: int, page: int | None) -> int:
    """The index of the page to read. Raises ValueError if none is named and there are several."""
    if page is None and count > 1:
        raise ValueError(f"it holds {count} pages: name one with data.page (predict: --page)")
    if page is not None and page > count:
        raise ValueError(f"there is no page {page}, it holds {count}")
    return (page or 1) - 1


def _read_other(content: bytes, bands: Sequence[int] | None, page: int | None) -> NDArray:
    """All that is no TIFF; as stored, not turned."""
    moving = content[:8] == PNG_SIGNATURE and b"acTL" in content[:4096]
    if (content[:3] == b"\xff\xd8\xff" or content[:8] == PNG_SIGNATURE) and not moving:
        require_page(1, page)
        mode = io.ImageReadMode.RGB if bands is None else io.ImageReadMode.UNCHANGED
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        try:
            return _three(io.decode_image(encoded, mode=mode).numpy(), bands)
        except RuntimeError:
            pass  # unknown to torchvision or broken: Pillow decides and says why
    with Image.open(BytesIO(content)) as file:
        # A JPEG of several pictures holds thumbnails and depth maps after the photograph.
        file.seek(require_page(1 if file.format in ("JPEG", "MPO") else getattr(file, "n_frames", 1), page))
        if file.mode.startswith("I") or file.mode == "F":
            return _three(np.array(file)[None], bands)
        colour = file.mode if file.mode in ("L", "RGB", "RGBA", "LA") and bands else "RGB"
        return _three(rearrange(np.atleast_3d(np.array(file.convert(colour))), "h w c -> c h w"), bands)


def _read_tiff(content: bytes, bands: Sequence[int] | None, page: int | None) -> tuple[NDArray, int]:
    import tifffile  # only where there is a TIFF: it takes a third of a second to load

    with tifffile.TiffFile(BytesIO(content)) as tiff:
        pages = full_pages(tiff) or list(tiff.pages)
        number = require_page(len(pages), page)
        chosen = pages[number]
        orientation = tiff_orientation(chosen)
        if chosen.photometric not in (0, 1, 2, 3, 5):  # YCbCr and others: Pillow converts, and turns
            with Image.open(BytesIO(content)) as file:
                file.seek(number)
                converted = rearrange(np.array(file.convert("RGB")), "h w c -> c h w")
            back = {6: 8, 8: 6}.get(orientation, orientation)
            return _three(turned(converted, back), bands), orientation
        values = chosen.asarray()
        axes = chosen.axes.replace("S", "c").replace("Y", "h").replace("X", "w")
        if sorted(axes) not in (["c", "h", "w"], ["h", "w"]):
            raise ValueError(f"its pages have the axes {chosen.axes}, wants rows and columns")
        values = rearrange(values, f"{' '.join(axes)} -> {'c' if 'c' in axes else '1'} h w")
        bits = chosen.bitspersample
        if chosen.photometric == 3:
            colours = np.asarray(chosen.colormap)
            values = (colours[:, values[0]] >> (8 if colours.max() > 255 else 0)).astype(np.uint8)
        elif chosen.photometric == 5 and values.dtype == np.uint8 and len(values) == 4:  # inks on white
            *inks, black = 255 - values.astype(np.uint16)
            values = np.stack([(ink * black + 127) // 255 for ink in inks]).astype(np.uint8)
        elif bits < 8:
            values = values.astype(np.uint8) * np.uint8(255 // (2**bits - 1))
        if chosen.photometric == 0:
            top = 255 if values.dtype.kind not in "ui" else np.iinfo(values.dtype).max
            values = top - values if bits <= 8 or bits == 8 * values.dtype.itemsize else 2**bits - 1 - values
        nodata = chosen.tags.get(_NODATA)
        if nodata is not None and values.dtype.itemsize > 1:
            values = np.where(values == float(nodata.value), np.float32(np.nan), values.astype(np.float32))
        extra = tuple(chosen.extrasamples or ())
        colour_bands = len(values) - len(extra)
        alpha = [colour_bands + i for i, kind in enumerate(extra) if kind in (1, 2)]
        return _three(values, bands, alpha), orientation


def _three(values: NDArray, bands: Sequence[int] | None, alpha: Sequence[int] = ()) -> NDArray:
    """(3, H, W) from the bands that a file has. Raises ValueError where it is not plain which."""
    if bands is not None:
        if max(bands) > len(values):
            raise ValueError(f"there is no band {max(bands)}, it has {len(values)}")
        return values[[band - 1 for band in bands]]
    if len(values) == 3 and not alpha:
        return values
    kept = [i for i in range(len(values)) if i not in alpha]
    if len(kept) not in (1, 3):
        raise ValueError(
            f"it has {len(kept)} bands: name three, as in data.bands: [1, 2, 3] (predict: --bands)"
        )
    return repeat(values[kept[0]], "h w -> 3 h w") if len(kept) == 1 else values[kept]


def orientation_of(content: bytes) -> int:
    """The EXIF tag of a file's content, 1 where it has none or a wrong one."""
    if not any(mark in content for mark in _MARKS):  # asking Pillow takes as long as decoding, for PNG
        return 1
    try:
        with Image.open(BytesIO(content)) as file:
            tag = file.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, struct.error):  # damaged, like many; viewers pass over it too
        return 1
    return tag if tag in range(1, 9) else 1


def turned(image: NDArray, orientation: int) -> NDArray:
    """(C, H, W) as a viewer shows what was stored with this tag (EXIF 2.32, section 4.6.4.A)."""
    if orientation >= 5:
        image = image.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[:, ::-1]
    return image
