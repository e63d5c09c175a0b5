"""Reading one image or label file: JPEG and PNG by torchvision; the rest, palettes and few bits by Pillow."""

import struct
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.io import loadmat
from torchvision import io

from protoseg.runtime.errors import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
LABEL_ENDINGS = (".png", ".tif", ".tiff")
Image.MAX_IMAGE_PIXELS = None  # a guard against uploads, but these are the user's own files
_PNG_COLOUR = {2: "RGB", 4: "grey with alpha", 6: "RGBA"}


def read_image(path: Path, *, upright: bool = False) -> torch.Tensor:
    """Image file as (3, H, W) uint8 RGB. Grey is repeated, alpha dropped, 16 bits become 8.

    `upright` applies the EXIF rotation. A dataset's images are read without: its labels are taken to be drawn
    on the stored pixels. (TIFF is always turned, by Pillow.) Raises UserError if unreadable.
    """
    try:
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            try:
                content = io.read_file(str(path))
                image = io.decode_image(content, mode=io.ImageReadMode.RGB, apply_exif_orientation=upright)
            except RuntimeError:
                pass  # unknown to torchvision or broken: Pillow decides and says why
            else:
                return image if image.dtype == torch.uint8 else (image.int() >> 8).to(torch.uint8)
        return _pillow_rgb(path, upright)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for some broken PNGs
        raise UserError(
            f"{path}: cannot read this image ({_reason(error, path)}); replace or remove it"
        ) from None


def read_label_ids(path: Path) -> NDArray[np.integer]:
    """Label file as (H, W) raw ids, uint8 or wider. A palette file gives its indices.

    Raises UserError for an unreadable file and for one that holds colours instead of ids.
    """
    try:
        header = path.open("rb").read(26)
        if header[:8] == b"\x89PNG\r\n\x1a\n" and len(header) == 26:
            depth, colour = struct.unpack("BB", header[24:26])
            if colour in _PNG_COLOUR:
                raise _colour_mask(path, _PNG_COLOUR[colour])
            if colour == 0 and depth >= 8:
                try:
                    return io.decode_png(io.read_file(str(path)))[0].numpy()
                except RuntimeError:
                    pass  # broken: Pillow says why
            ids = _pillow_ids(path)
            # Pillow stretches grey of 2 and 4 bits to 0-255; the ids are the stored values.
            return ids // (255 // (2**depth - 1)) if colour == 0 and depth in (2, 4) else ids
        if header[:3] == b"\xff\xd8\xff":
            raise ValueError("a JPEG file, whose compression changes ids: export labels as PNG")
        return _pillow_ids(path)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path}: cannot read this label ({_reason(error, path)}); replace or remove it"
        ) from None


def read_mat_ids(path: Path) -> NDArray[np.integer]:
    """Label map of a MATLAB file as (H, W) raw ids: field S (COCO-Stuff 10k) or LabelMap (PASCAL-Context)."""
    try:
        fields = loadmat(str(path), variable_names=["S", "LabelMap"])
        ids = fields["S"] if "S" in fields else fields["LabelMap"]
        return ids.astype(np.uint16)  # stored as doubles by some files
    except Exception as error:  # what SciPy raises depends on where the file is broken
        raise UserError(
            f"{path}: cannot read this label ({_reason(error, path)}); replace or remove it"
        ) from None


def read_ade20k_ids(path: Path) -> NDArray[np.integer]:
    """`*_seg.png` of the full ADE20K as (H, W) raw object ids: red // 10 · 256 + green.

    Source: utils/utils_ade20k.py of github.com/CSAILVision/ADE20K.
    """
    try:
        red, green, _ = io.decode_image(io.read_file(str(path)), mode=io.ImageReadMode.RGB).numpy()
    except RuntimeError as error:
        raise UserError(
            f"{path}: cannot read this label ({_reason(error, path)}); replace or remove it"
        ) from None
    return (red // 10).astype(np.uint16) * 256 + green


def _pillow_rgb(path: Path, upright: bool) -> torch.Tensor:
    with Image.open(path) as opened:
        file = ImageOps.exif_transpose(opened) if upright else opened
        if file.mode.startswith("I"):  # 16-bit grey; convert() would clip, not scale
            grey = (np.asarray(file).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            array = np.repeat(grey[..., None], 3, axis=2)
        elif file.mode == "F":
            raise ValueError("floating-point pixels, wants 8 or 16 bits")
        else:
            array = np.array(file.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _pillow_ids(path: Path) -> NDArray[np.integer]:
    with Image.open(path) as file:
        if file.mode == "F":
            raise ValueError("floating-point pixels: export ids as whole numbers of 8 or 16 bits")
        if file.mode not in ("1", "L", "P") and not file.mode.startswith("I"):
            raise _colour_mask(path, file.mode)
        ids = np.array(file)
    return ids.astype(np.uint8) if ids.dtype == bool else ids


def _colour_mask(path: Path, kind: str) -> UserError:
    return UserError(
        f"{path}: this label is a colour mask ({kind}), wants one channel of class ids; "
        "convert colours to ids, or save it as a palette or grey PNG"
    )


def _reason(error: Exception, path: Path) -> str:
    """The first line of a library's message, without the path it may repeat."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known kind" if path.stat().st_size else "the file is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
