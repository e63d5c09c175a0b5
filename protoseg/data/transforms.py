"""Joint augmentation of image and label for training. uint8 in, uint8 out; all chance from torch's global RNG."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

MEAN_COLOUR = (124, 116, 104)  # of ImageNet: about zero after normalisation, so padding looks like nothing
CROP_TRIES = 10


class TrainTransform:
    """Random scale, crop, flip and photometric distortion (method.md section 4, "Augmentation").

    image (3, H, W) uint8 and label (H, W) → image (3, *crop) uint8 and label (*crop), same dtype as it came.
    Every step can be switched off: `scale` None, `max_share` None, `flip` False, `photometric` False, and `crop`
    None keeps the size of the (scaled) image. Where the image is smaller than the crop it is padded at the right
    and bottom, the label with `ignore_index`.
    """

    def __init__(
        self,
        crop: tuple[int, int] | None,
        ignore_index: int,
        *,
        scale: tuple[float, float] | None = (0.5, 2.0),
        max_share: float | None = 0.75,
        flip: bool = True,
        photometric: bool = True,
    ) -> None:
        self.crop = crop
        self.ignore_index = ignore_index
        self.scale = scale
        self.max_share = max_share
        steps: list[torch.nn.Module] = [v2.RandomHorizontalFlip()] if flip else []
        if photometric:
            # Each with probability one half, as in SSD (Liu et al., ECCV 2016) but without its channel swap:
            # colour tells sky from road.
            steps += [
                v2.RandomApply([jitter], p=0.5)
                for jitter in (
                    v2.ColorJitter(brightness=0.125),
                    v2.ColorJitter(contrast=0.5),
                    v2.ColorJitter(saturation=0.5),
                    v2.ColorJitter(hue=0.05),
                )
            ]
        self.last = v2.Compose(steps) if steps else None

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.scale or (1.0, 1.0)
        factor = low + (high - low) * float(torch.rand(()))
        image, label = self._scale_and_crop(image, label, factor)
        if self.last is not None:
            image, label = self.last(tv_tensors.Image(image), tv_tensors.Mask(label))
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)

    def _scale_and_crop(
        self, image: torch.Tensor, label: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cuts the part of the source that fills the crop and scales only that: no large intermediate image."""
        rows, columns = label.shape
        height, width = self.crop or (round(rows * factor), round(columns * factor))
        box_h, box_w = min(rows, round(height / factor)), min(columns, round(width / factor))
        size = [min(height, round(box_h * factor)), min(width, round(box_w * factor))]
        # A box that was not clipped fills the crop exactly; rounding must not leave a padded line.
        size = [height if box_h < rows else size[0], width if box_w < columns else size[1]]
        for _ in range(CROP_TRIES):
            top, left = _below(rows - box_h + 1), _below(columns - box_w + 1)
            part = _resize_label(label[top : top + box_h, left : left + box_w], size)
            if self.crop is None or self.max_share is None or self._mixed(part, self.max_share):
                break
        image = image[:, top : top + box_h, left : left + box_w]
        image = F.resize(image, size, antialias=True)
        padding = [0, 0, width - size[1], height - size[0]]
        if any(padding):
            canvas = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
            canvas[:, : size[0], : size[1]] = image
            image = canvas
            part = F.pad(part, padding, fill=self.ignore_index)
        return image.contiguous(), part.contiguous()

    def _mixed(self, label: torch.Tensor, max_share: float) -> bool:
        """Whether no class covers more than `max_share` of the labelled pixels."""
        counts = torch.bincount(label.flatten())
        if self.ignore_index < len(counts):
            counts[self.ignore_index] = 0
        return bool(counts.max() <= max_share * counts.sum()) and bool(counts.sum() > 0)


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def _resize_label(label: torch.Tensor, size: list[int]) -> torch.Tensor:
    # Exact nearest: torchvision's own mask resize is off by half a pixel against the image's bilinear grid.
    return F.resize(label[None], size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
