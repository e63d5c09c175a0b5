"""Joint augmentation of image and label for training: uint8 in, uint8 out, all chance from torch's RNG."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from protoseg.config import DataConfig
from protoseg.core.losses import nearest_cells

CROP_TRIES = 10
SAMPLES = 64  # along each side, where a share or a mean is estimated
STRIP = 1 << 15  # pixels changed at a time: their float copies stay in the cache
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB = np.linalg.inv(_YIQ)


class TrainTransform:
    """Random scale, crop, flip and photometric distortion.

    image (3, H, W) uint8 and label (H, W) → image (3, *crop) uint8 and label (*crop) of the dtype it came in.
    A scaled image smaller than the crop is padded at the right and bottom, the image with the colour `fill`,
    the label with `ignore_index`.
    Each step can be switched off: scale=(1, 1), cat_max_ratio=1, flip=0, photometric=False.

    cat_max_ratio: no class may cover a larger share of the crop's labelled pixels, estimated from a grid of
    them (best of ten crops: the first that obeys, else the last); flip: probability of a horizontal mirror.
    """

    def __init__(self, data: DataConfig, ignore_index: int, fill: tuple[int, ...] = (0, 0, 0)) -> None:
        self.crop = data.crop
        self.ignore_index = ignore_index
        self.scale = data.scale
        self.cat_max_ratio = data.cat_max_ratio
        self.flip = data.flip
        self.photometric = data.photometric
        self.fill = torch.tensor(fill, dtype=torch.uint8)

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.scale
        image, label = self._scale_and_crop(image, label, low + (high - low) * float(torch.rand(())))
        if float(torch.rand(())) < self.flip:
            image, label = image.flip(2), label.flip(1)
        if self.photometric:
            image = distort_colours(image, *_random_distortion())
        return self._pad(image, label)

    def _scale_and_crop(
        self, image: torch.Tensor, label: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cuts the part of the source that fills the crop and scales only that."""
        (rows, columns), (height, width) = label.shape, self.crop
        box_h, box_w = max(1, round(height / factor)), max(1, round(width / factor))
        # Where the source is too small to fill the crop, all of it is used and the rest padded.
        box_h, size_h = (box_h, height) if box_h <= rows else (rows, min(height, round(rows * factor)))
        box_w, size_w = (box_w, width) if box_w <= columns else (columns, min(width, round(columns * factor)))
        size = [max(1, size_h), max(1, size_w)]
        for _ in range(CROP_TRIES):
            top, left = _below(rows - box_h + 1), _below(columns - box_w + 1)
            part = label[top : top + box_h, left : left + box_w]
            if self.cat_max_ratio >= 1 or self._mixed(part):
                break
        image = image[:, top : top + box_h, left : left + box_w]
        if size != [box_h, box_w]:
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        return image.contiguous(), _resize_label(part, size)

    def _mixed(self, label: torch.Tensor) -> bool:
        """Whether something is labelled and no class covers more than `cat_max_ratio` of it."""
        counts = torch.bincount(_grid(label).flatten(), minlength=self.ignore_index + 1)
        counts[self.ignore_index] = 0
        return 0 < int(counts.max()) <= self.cat_max_ratio * int(counts.sum())

    def _pad(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if label.shape == self.crop:
            return image, label
        rows, columns = label.shape
        canvas = self.fill[:, None, None].repeat(1, *self.crop)
        canvas[:, :rows, :columns] = image
        padded = torch.full(self.crop, self.ignore_index, dtype=label.dtype)
        padded[:rows, :columns] = label
        return canvas, padded


def _random_distortion() -> tuple[float, float, float, float]:
    """Factors of brightness, contrast, saturation and the turn of hue, each left out half of the time.

    The ranges are those of SSD (Liu et al., ECCV 2016), without its channel swap: colour tells sky from road.
    """
    chosen, strength = torch.rand(2, 4).tolist()
    brightness, contrast, saturation, hue = (
        2 * each - 1 if chance < 0.5 else 0.0 for chance, each in zip(chosen, strength)
    )
    return 1 + 0.125 * brightness, 1 + 0.5 * contrast, 1 + 0.5 * saturation, 0.05 * hue


def distort_colours(
    image: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> torch.Tensor:
    """The four colour changes in one affine map of RGB, (3, H, W) uint8 → uint8.

    Factors 1 and hue 0 (in turns) change nothing. The first three are those of torchvision's ColorJitter, but
    contrast takes the mean grey from a grid of pixels; hue turns the chroma plane of YIQ, which for small
    turns is close to the turn of HSV. One pass instead of four, and rounded once.
    """
    if (brightness, contrast, saturation, hue) == (1, 1, 1, 0):
        return image
    turn = -2 * math.pi * hue  # hue of HSV runs against the angle of (I, Q)
    cos, sin = math.cos(turn), math.sin(turn)
    chroma = _RGB @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ
    # Saturation blends each channel with the luma, contrast with the image's mean grey, which the others
    # only scale.
    mixed = saturation * np.eye(3) + (1 - saturation) * _LUMA
    matrix = torch.from_numpy(brightness * contrast * chroma @ mixed).float()
    mean = _grid(image).mean((1, 2), dtype=torch.float32).numpy()
    offset = brightness * (1 - contrast) * float(_LUMA @ mean) + 0.5
    changed = torch.empty(image.shape, dtype=torch.uint8)
    for part, target in zip(image.flatten(1).split(STRIP, 1), changed.view(3, -1).split(STRIP, 1)):
        colours = (matrix @ part.float()).add_(offset).clamp_(0, 255)
        target.copy_(colours.short())  # by way of int16: twice as fast
    return changed


def _grid(values: torch.Tensor) -> torch.Tensor:
    """Every n-th row and column: all of a small map, 64 to 127 along the shorter side of a large one."""
    step = max(1, min(values.shape[-2:]) // SAMPLES)
    return values[..., ::step, ::step]


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def _resize_label(label: torch.Tensor, size: list[int]) -> torch.Tensor:
    """The nearest pixel of each new one: "nearest-exact" of torch, several times as fast by two look-ups."""
    rows, columns = (nearest_cells(new, old).numpy() for old, new in zip(label.shape, size))
    return torch.from_numpy(label.numpy()[rows][:, columns])
