"""Decode heads: the backbone's maps → one embedding map, which meets the prototypes or the linear classifier.

Every head has `dim`, `stride`, `auxiliary_weight` and forward(maps) -> (embedding (B, D, h, w), auxiliary
logits: a list of (B, C, h', w'), empty in eval mode). Dropout before the classifier belongs to the embedding.

Legend: B batch, C classes, D = E embedding width, c_i channels of map i, h w rows and columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.config import UserError


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation to (h, w), align_corners=False; nothing to do at equal size."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class MLPHead(nn.Module):
    """All-MLP head of SegFormer (arXiv 2105.15203, Eq. 4): any number of maps → (B, dim, h, w) of the finest.

    Written out: a linear layer c_i → E per map, bilinear to the finest size, concatenation from the coarsest
    map to the finest, 1×1 convolution to E without bias, BatchNorm, ReLU, dropout. All before BatchNorm is
    linear and interpolation commutes with 1×1 convolutions, so each map's share of the fuse convolution is
    multiplied into its linear layer, applied at the map's own resolution, upsampled and summed: same
    function, same parameters, about a tenth of the multiplications.
    """

    auxiliary_weight = 0.0

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], num_classes: int, dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.dim, self.stride = dim, strides[0]
        layers = [nn.Linear(c, dim) for c in channels]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.linears: Any = nn.ModuleList(layers)
        self.fuse = nn.Conv2d(len(channels) * dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        size = maps[0].shape[-2:]
        shares = self.fuse.weight.flatten(1).chunk(len(maps), dim=1)  # of the coarsest map first
        # Interpolation weights sum to one, so every bias can join the finest map, which is not interpolated.
        bias = sum(share @ layer.bias for share, layer in zip(shares, reversed(self.linears)))
        total: Any = 0
        for x, share, layer in zip(reversed(maps), shares, reversed(self.linears)):
            weight = (share @ layer.weight)[:, :, None, None]
            total = total + resize(F.conv2d(x, weight, bias if x is maps[0] else None), size)
        return self.dropout(F.relu(self.norm(total))), []


HEADS: dict[str, Callable[..., nn.Module]] = {"mlp": MLPHead}
WIDTHS = {"mlp": 256}


def build_decode_head(
    name: str,
    channels: Sequence[int],
    strides: Sequence[int],
    num_classes: int,
    *,
    dim: int | None = None,
    dropout: float = 0.1,
) -> nn.Module:
    """Build a decode head by its name in HEADS for maps of these channels and strides.

    dim: width of the embedding; None takes the original's (mlp: 256; SegFormer-B2…B5 and Swin use 768).
    num_classes is for auxiliary and region classifiers only: the classifier itself is not part of the head.
    Errors: UserError for an unknown name.
    """
    if name not in HEADS:
        raise UserError(f"head.name {name!r} is unknown: choose one of {', '.join(HEADS)}")
    return HEADS[name](channels, strides, num_classes, dim or WIDTHS[name], dropout)
