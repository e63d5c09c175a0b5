"""Prediction on whole images of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.model import Segmenter

CLASSES_AT_ONCE = 32  # classes upsampled together: bounds the memory of large vocabularies


def predict(model: Segmenter, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """The class of every pixel: (3, H, W) image, 0…255 → int64 (H, W), or of `size` if that is given."""
    with torch.inference_mode():
        logits = model(image[None])
        return upsampled_argmax(logits, size or (image.shape[-2], image.shape[-1]))[0]


def upsampled_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """argmax over C of bilinearly upsampled logits (B, C, h, w) → (B, *size), a few classes at a time."""
    best: Tensor | None = None
    winner: Tensor | None = None
    for start in range(0, logits.shape[1], CLASSES_AT_ONCE):
        part = logits[:, start : start + CLASSES_AT_ONCE].float()
        value, index = F.interpolate(part, size, mode="bilinear", align_corners=False).max(dim=1)
        if best is None or winner is None:
            best, winner = value, index
        else:
            better = value > best
            winner = torch.where(better, index + start, winner)
            best = torch.where(better, value, best)
    assert winner is not None, "a segmenter has at least one class"
    return winner
