"""Reading one image or label file: an image as 8-bit RGB, a label as the ids that it stores."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat
from torchvision import io

from protoseg.data.reading.pixels import (
    PNG_SIGNATURE,
    TIFF_SIGNATURES,
    StoredImage,
    full_pages,
    orientation_of,
    read_pixels,
    tiff_orientation,
    turned,
)
from protoseg.data.reading.value_range import Range, to_bytes
from protoseg.runtime.errors import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
LABEL_ENDINGS = (".png", ".tif", ".tiff")
_PNG_COLOUR = {2: "RGB", 4: "grey with alpha", 6: "RGBA"}


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of one dataset, all with the same settings: see `read_image`."""

    upright: bool = True
    value_range: Range | None = None
    bands: tuple[int, ...] | None = None
    page: int | None = None

    def __call__(self, path: Path) -> torch.Tensor:
        return read_image(path, **vars(self))

    def pixels(self, path: Path) -> StoredImage:
        """As stored in the file, in its depth. Raises UserError if it is unreadable."""
        with _one_line(path, "image"):
            return read_pixels(path, upright=self.upright, bands=self.bands, page=self.page)


def read_image(
    path: Path,
    *,
    upright: bool = True,
    value_range: Range | None = None,
    bands: Sequence[int] | None = None,
    page: int | None = None,
) -> torch.Tensor:
    """Image file as (3, H, W) uint8 RGB: grey is repeated, alpha dropped.

    `upright`: turned as its EXIF tag says, as viewers do. value_range: the values that become 0 and 255; by
    default 16 bits become the upper 8. bands, page: which of a TIFF, counted from 1. Raises UserError if the
    file is unreadable, or has several pages, more than three bands or an unknown range and nothing is chosen.
    """
    with _one_line(path, "image"):
        stored = read_pixels(path, upright=upright, bands=bands, page=page)
        return torch.from_numpy(to_bytes(stored.values, value_range))


def read_label_ids(path: Path) -> NDArray[np.integer]:
    """Label file as (H, W) raw ids, uint8 or wider, turned as its EXIF tag says, if it has one.

    A palette file gives its indices.
    Raises UserError for an unreadable file and for one that holds colours instead of ids.
    """
    with _one_line(path, "label"):
        content = path.read_bytes()
        if content[:8] == PNG_SIGNATURE and len(content) >= 26:
            depth, colour = struct.unpack("BB", content[24:26])
            if colour in _PNG_COLOUR:
                raise _colour_mask(path, _PNG_COLOUR[colour])
            ids = _png_ids(path, content, plain=colour == 0 and depth >= 8)
            if colour == 0 and depth in (2, 4):  # which Pillow stretches to 0-255; the ids are what is stored
                ids = ids // (255 // (2**depth - 1))
            return np.ascontiguousarray(turned(ids[None], orientation_of(content))[0])
        if content[:3] == b"\xff\xd8\xff":
            raise ValueError("a JPEG file, whose compression changes ids: export labels as PNG")
        if content[:4] in TIFF_SIGNATURES:
            return _tiff_ids(path)
        return _pillow_ids(path)


def read_mat_ids(path: Path) -> NDArray[np.integer]:
    """Label map of a MATLAB file as (H, W) raw ids: field S (COCO-Stuff 10k) or LabelMap (PASCAL-Context)."""
    with _one_line(path, "label"):
        fields = loadmat(str(path), variable_names=["S", "LabelMap"])
        ids = fields["S"] if "S" in fields else fields["LabelMap"]
        return ids.astype(np.uint16)  # stored as doubles by some files


def read_ade20k_ids(path: Path) -> NDArray[np.integer]:
    """`*_seg.png` of the full ADE20K as (H, W) raw object ids: red // 10 · 256 + green.

    Source: utils/utils_ade20k.py of github.com/CSAILVision/ADE20K.
    """
    with _one_line(path, "label"):
        red, green, _ = io.decode_image(io.read_file(str(path)), mode=io.ImageReadMode.RGB).numpy()
    return (red // 10).astype(np.uint16) * 256 + green


def _png_ids(path: Path, content: bytes, plain: bool) -> NDArray[np.integer]:
    if plain:
        try:
            return io.decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8))[0].numpy()
        except RuntimeError:
            pass  # broken: Pillow says why
    return _pillow_ids(path)


def _tiff_ids(path: Path) -> NDArray[np.integer]:
    """Not by Pillow, which scrambles some TIFF files that are to be turned."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page, *more = full_pages(tiff)
        if more:
            raise ValueError(f"it holds {len(more) + 1} pages, wants one: split it")
        if page.samplesperpixel > 1 or page.photometric not in (0, 1, 3):
            raise _colour_mask(path, f"{page.samplesperpixel} bands")
        ids = page.asarray()
        if ids.dtype.kind == "f":
            raise ValueError("floating-point pixels: export ids as whole numbers of 8 or 16 bits")
        ids = ids.astype(np.uint8) if ids.dtype == bool else ids
        if page.photometric == 0:  # white is 0
            ids = 2**page.bitspersample - 1 - ids
        return np.ascontiguousarray(turned(ids[None], tiff_orientation(page))[0])


def _pillow_ids(path: Path) -> NDArray[np.integer]:
    with Image.open(path) as file:
        if file.mode not in ("1", "L", "P") and not file.mode.startswith("I"):
            raise _colour_mask(path, file.mode)
        ids = np.array(file)
    return ids.astype(np.uint8) if ids.dtype == bool else ids


def _colour_mask(path: Path, kind: str) -> UserError:
    return UserError(
        f"{path}: this label is a colour mask ({kind}), wants one channel of class ids; "
        "`protoseg convert_labels colours` makes them, or save it as a palette or grey PNG"
    )


@contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """Whatever a library raises about a file as one UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what they raise depends on where the file is broken
        raise UserError(
            f"{path}: cannot read this {what} ({_reason(error, path)}); mend, replace or remove it"
        ) from None


def _reason(error: Exception, path: Path) -> str:
    """The first line of a library's message, without the path it may repeat."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known kind" if path.stat().st_size else "the file is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
