"""Joint augmentation of image and label for training: uint8 in, uint8 out, all chance from torch's RNG."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

MEAN_COLOUR = (124, 116, 104)  # of ImageNet: about zero after normalisation, so padding looks like nothing
CROP_TRIES = 10


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
        steps: list[torch.nn.Module] = [v2.RandomHorizontalFlip(flip)] if flip > 0 else []
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
        self.after = v2.Compose(steps) if steps else None

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.scale
        image, label = self._scale_and_crop(image, label, low + (high - low) * float(torch.rand(())))
        if self.after is not None:
            image, label = self.after(tv_tensors.Image(image), tv_tensors.Mask(label))
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)

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


def _below(count: int) -> int:
    return int(torch.randint(count, ()))


def _resize_label(label: torch.Tensor, size: list[int]) -> torch.Tensor:
    # Exact nearest: torchvision's own mask resize is off by half a pixel against the image's bilinear grid.
    return F.resize(label[None], size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
