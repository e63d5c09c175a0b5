"""Joint augmentation of image and label for training: uint8 in, uint8 out, all chance from torch's RNG."""

import math

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

MEAN_COLOUR = (124, 116, 104)  # of ImageNet: about zero after normalisation, so padding looks like nothing
CROP_TRIES = 10
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


class TrainTransform:
    """Random scale, crop, flip and photometric distortion (method.md section 4, "Augmentation").

    image (3, H, W) uint8 and label (H, W) → image (3, *crop) uint8 and label (*crop) of the dtype it came in.
    A scaled image smaller than the crop is padded at the right and bottom, the label with `ignore_index`.
    Each step can be switched off: scale=(1, 1), cat_max_ratio=1, flip=0, photometric=False.

    cat_max_ratio: no class may cover a larger share of the crop's labelled pixels (best of ten crops: the
    first that obeys, else the last); flip: probability of a horizontal mirror.
    """

    def __init__(
        self,
        *,
        crop: tuple[int, int],
        ignore_index: int,
        scale: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
    ) -> None:
        self.crop = crop
        self.ignore_index = ignore_index
        self.scale = scale
        self.cat_max_ratio = cat_max_ratio
        self.photometric = photometric
        self.mirror = v2.RandomHorizontalFlip(flip)

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.scale
        image, label = self._scale_and_crop(image, label, low + (high - low) * float(torch.rand(())))
        image, label = self.mirror(tv_tensors.Image(image), tv_tensors.Mask(label))
        image, label = image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)
        if self.photometric:
            image = distort_colours(image, *_random_distortion())
        return image, label

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
            part = _resize_label(label[top : top + box_h, left : left + box_w], size)
            if self.cat_max_ratio >= 1 or self._mixed(part):
                break
        image = F.resize(image[:, top : top + box_h, left : left + box_w], size, antialias=True)
        if size != [height, width]:
            canvas = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
            canvas[:, : size[0], : size[1]] = image
            padded = torch.full((height, width), self.ignore_index, dtype=label.dtype)
            padded[: size[0], : size[1]] = part
            image, part = canvas, padded
        return image.contiguous(), part.contiguous()

    def _mixed(self, label: torch.Tensor) -> bool:
        """Whether something is labelled and no class covers more than `cat_max_ratio` of it."""
        counts = torch.bincount(label.flatten(), minlength=self.ignore_index + 1)
        counts[self.ignore_index] = 0
        return 0 < int(counts.max()) <= self.cat_max_ratio * int(counts.sum())


def _random_distortion() -> tuple[float, float, float, float]:
    """Factors of brightness, contrast, saturation and the turn of hue, each left out half of the time.

    The ranges are those of SSD (Liu et al., ECCV 2016), without its channel swap: colour tells sky from road.
    """
    chosen = (torch.rand(4) < 0.5).float()
    brightness, contrast, saturation, hue = (chosen * (2 * torch.rand(4) - 1)).tolist()
    return 1 + 0.125 * brightness, 1 + 0.5 * contrast, 1 + 0.5 * saturation, 0.05 * hue


def distort_colours(
    image: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> torch.Tensor:
    """The four colour changes in one affine map of RGB, (3, H, W) uint8 → uint8.

    Factors 1 and hue 0 (in turns) change nothing. The first three are those of torchvision's ColorJitter;
    hue turns the chroma plane of YIQ, which for small turns is close to the turn of HSV. One pass instead of
    four: about ten times as fast, and rounded once.
    """
    turn = -2 * math.pi * hue  # hue of HSV runs against the angle of (I, Q)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    chroma = torch.linalg.inv(_YIQ) @ rotation @ _YIQ
    grey = _LUMA.expand(3, 3)  # every channel becomes the luma
    matrix = brightness * chroma @ (saturation * torch.eye(3) + (1 - saturation) * grey)
    # Contrast is about the image's mean grey, which the grey-keeping maps only scale.
    offset = brightness * (1 - contrast) * (_LUMA @ image.mean((1, 2), dtype=torch.float32))
    changed = torch.empty_like(image)
    # In strips: float copies of the whole image would be fresh memory, and its page faults cost the most.
    rows = max(1, (1 << 16) // image.shape[2])
    for part, target in zip(image.split(rows, dim=1), changed.split(rows, dim=1)):
        colours = torch.addmm(offset.expand(3, 1), matrix, part.flatten(1).float(), alpha=contrast)
        target.copy_(colours.add_(0.5).clamp_(0, 255).view(part.shape))
    return changed


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def _resize_label(label: torch.Tensor, size: list[int]) -> torch.Tensor:
    # Exact nearest: torchvision's own mask resize is off by half a pixel against the image's bilinear grid.
    return F.resize(label[None], size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
