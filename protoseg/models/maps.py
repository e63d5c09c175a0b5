"""Operations on feature maps that backbones and heads share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear interpolation to size (h, w); nothing to do at equal size."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def concatenate(maps: Sequence[Tensor], align_corners: bool = False) -> Tensor:
    """All maps (B, c_i, h_i, w_i) at the first one's size, side by side: (B, Σ c_i, h_0, w_0)."""
    return torch.cat([resize(x, maps[0].shape[-2:], align_corners) for x in maps], dim=1)


def checkpointed(function: Callable[..., Any], *inputs: Tensor, grad_checkpointing: bool) -> Any:
    """function(*inputs), computed again in backward instead of keeping its inner tensors if asked to."""
    if grad_checkpointing:
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


# Not by way of negative numbers: ONNX rounds their quotients towards zero.
def cells(pixels: int, side: int) -> int:
    """How many cells hold so many pixels, the last one perhaps in part."""
    return (pixels + side - 1) // side


def filling(pixels: int, side: int) -> int:
    """Pixels that the last cell lacks."""
    return cells(pixels, side) * side - pixels
