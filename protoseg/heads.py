"""Decode heads: the backbone's maps → one embedding map, which meets the prototypes or the linear classifier.

Every head has `dim`, `stride` and forward(maps) -> (embedding (B, D, h, w), auxiliary logits: a list of
(B, C, h', w'), empty in eval mode and where the original has none). The dropout before the classifier belongs
to the embedding; the classifier itself is not part of the head.

Legend: B batch, C classes, D embedding width, N pixels, c_i channels of map i, h w rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.config import UserError
from protoseg.maps import concatenate, resize

Output = tuple[Tensor, list[Tensor]]


def conv_norm(in_channels: int, channels: int, kernel: int = 3, dilation: int = 1) -> Any:
    """Convolution without bias that keeps the size, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_channels, channels, kernel, padding=padding, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def pixel_classifier(channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def sum_at_finest(maps: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """A 1×1 convolution (weights_i (D, c_i) side by side) of all maps brought to the first one's size.

    Interpolation commutes with 1×1 convolutions and its weights sum to one, so each map is convolved at its
    own resolution, then brought to size and added; the bias joins the map that is not interpolated.
    """
    total = F.conv2d(maps[0], weights[0][:, :, None, None], bias)
    for x, weight in zip(maps[1:], weights[1:]):
        total = total + resize(F.conv2d(x, weight[:, :, None, None]), total.shape[-2:])
    return total


class MLPHead(nn.Module):
    """All-MLP head of SegFormer (arXiv 2105.15203, Eq. 4): any number of maps → (B, dim, h, w) of the finest.

    Written out: a linear layer c_i → D per map, bilinear to the finest size, concatenation from the coarsest
    map to the finest, 1×1 convolution to D without bias, BatchNorm, ReLU, dropout. All before BatchNorm is
    linear, so each map's share of the convolution is multiplied into its linear layer and applied at the
    map's own resolution: same function, same parameters, about a tenth of the multiplications.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dim, self.stride = dim or 256, strides[0]
        layers = [nn.Linear(c, self.dim) for c in channels]
        for layer in layers:
            # Each map starts with the same share of the sum. With one spread for all, the coarsest map, which
            # has the most channels, drowns the finest, and small things are learned late or never.
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.linears: Any = nn.ModuleList(layers)
        self.fuse = conv_norm(len(channels) * self.dim, self.dim, kernel=1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        conv, norm, relu = self.fuse
        shares = conv.weight.flatten(1).chunk(len(maps), dim=1)[::-1]  # the coarsest map is first in `fuse`
        weights = [share @ layer.weight for share, layer in zip(shares, self.linears)]
        bias = torch.stack([share @ layer.bias for share, layer in zip(shares, self.linears)]).sum(0)
        return self.dropout(relu(norm(sum_at_finest(maps, weights, bias)))), []


class BranchMLPHead(nn.Module):
    """The all-MLP head as mmsegmentation built it: BatchNorm and ReLU in each branch too, finest map first.

    The 1×1 convolution over the concatenation is applied per map, see sum_at_finest.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dim, self.stride = dim or 256, strides[0]
        self.branches = nn.ModuleList(conv_norm(c, self.dim, kernel=1) for c in channels)
        self.fuse = conv_norm(len(channels) * self.dim, self.dim, kernel=1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        conv, norm, relu = self.fuse
        weights = conv.weight.flatten(1).chunk(len(maps), dim=1)
        maps = [branch(x) for branch, x in zip(self.branches, maps)]
        return self.dropout(relu(norm(sum_at_finest(maps, weights, None)))), []


class HRNetHead(nn.Module):
    """HRNetV2's head: all maps at the finest size, concatenated, through a 1×1 convolution, BatchNorm, ReLU.

    The convolution is applied per map at its own resolution, see sum_at_finest.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.channels = list(channels)
        self.dim, self.stride = dim or sum(channels), strides[0]
        self.fuse = conv_norm(sum(channels), self.dim, kernel=1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        conv, norm, relu = self.fuse
        weights = conv.weight.flatten(1).split(self.channels, dim=1)
        return self.dropout(relu(norm(sum_at_finest(maps, weights, None)))), []


class AuxiliaryHead(nn.Module):
    """Logits from an earlier map, for an extra cross-entropy in training and for OCR's regions."""

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, kernel: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv = conv_norm(in_channels, channels, kernel)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = pixel_classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(x)))


class FCNHead(nn.Module):
    """FCN: two 3×3 convolutions on the last map, a third over input and result; auxiliary logits."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dim, self.stride = dim or 512, strides[-1]
        self.convs = nn.Sequential(conv_norm(channels[-1], self.dim), conv_norm(self.dim, self.dim))
        self.fuse = conv_norm(channels[-1] + self.dim, self.dim)
        self.dropout = nn.Dropout2d(dropout)
        self.auxiliary = AuxiliaryHead(channels[-2], 256, num_classes, kernel=3, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        x = self.fuse(torch.cat([maps[-1], self.convs(maps[-1])], dim=1))
        return self.dropout(x), [self.auxiliary(maps[-2])] if self.training else []


class ASPPHead(nn.Module):
    """DeepLabV3 (arXiv 1706.05587): image mean, 1×1 and three dilated 3×3 convolutions, fused by a 3×3.

    Rates 12, 24, 36 belong to stride 8; they halve as the stride doubles.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dim, self.stride = dim or 512, strides[-1]
        rate = max(12 * 8 // self.stride, 1)
        self.image_mean = conv_norm(channels[-1], self.dim, kernel=1)
        self.branches = nn.ModuleList(
            [conv_norm(channels[-1], self.dim, kernel=1)]
            + [conv_norm(channels[-1], self.dim, dilation=rate * i) for i in (1, 2, 3)]
        )
        self.fuse = conv_norm(5 * self.dim, self.dim)
        self.dropout = nn.Dropout2d(dropout)
        self.auxiliary = AuxiliaryHead(channels[-2], 256, num_classes, kernel=3, dropout=dropout)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        x = maps[-1]
        mean = self.image_mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        x = self.fuse(torch.cat([mean, *(branch(x) for branch in self.branches)], dim=1))
        return self.dropout(x), [self.auxiliary(maps[-2])] if self.training else []


class OCRHead(nn.Module):
    """Object-contextual representations (arXiv 1909.11065): pixels attend to one mean feature per region.

    After a dilated ResNet the coarse logits come from the last map but one; otherwise (HRNet) both parts see
    all maps concatenated at the finest size. The coarse logits are the auxiliary output; their classifier
    stays linear in C.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dilated = strides[-1] == strides[-2]
        self.dim, self.stride = dim or 512, strides[-1] if self.dilated else strides[0]
        key_dim, total = self.dim // 2, sum(channels)
        if self.dilated:
            self.coarse = AuxiliaryHead(channels[-2], 256, num_classes, kernel=3, dropout=dropout)
        else:
            self.coarse = AuxiliaryHead(total, total, num_classes, kernel=1, dropout=dropout)
        self.pixels = conv_norm(channels[-1] if self.dilated else total, self.dim)
        self.query = nn.Sequential(conv_norm(self.dim, key_dim, 1), conv_norm(key_dim, key_dim, 1))
        self.key = nn.Sequential(conv_norm(self.dim, key_dim, 1), conv_norm(key_dim, key_dim, 1))
        self.value = conv_norm(self.dim, key_dim, 1)
        self.context = conv_norm(key_dim, self.dim, 1)
        self.fuse = conv_norm(2 * self.dim, self.dim, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        together = None if self.dilated else concatenate(maps)
        coarse = self.coarse(maps[-2] if together is None else together)
        x = self.pixels(maps[-1] if together is None else together)
        weights_BCN = coarse.flatten(2).softmax(dim=2)
        regions_BDC1 = (x.flatten(2) @ weights_BCN.transpose(1, 2))[..., None]
        query, key, value = (
            projection(source).flatten(2).transpose(1, 2)
            for projection, source in ((self.query, x), (self.key, regions_BDC1), (self.value, regions_BDC1))
        )
        context_BNd = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        context = self.context(context_BNd.transpose(1, 2).unflatten(2, x.shape[-2:]))
        return self.dropout(self.fuse(torch.cat([context, x], dim=1))), [coarse] if self.training else []


HEADS = {
    "mlp": MLPHead,
    "mlp_branch": BranchMLPHead,
    "fcn": FCNHead,
    "hrnet": HRNetHead,
    "aspp": ASPPHead,
    "ocr": OCRHead,
}


def build_decode_head(
    name: str,
    channels: Sequence[int],
    strides: Sequence[int],
    num_classes: int,
    *,
    dim: int | None = None,
    dropout: float = 0.1,
) -> Any:
    """Build a decode head by its name in HEADS for a backbone's maps of these channels and strides.

    dim: width of the embedding; None takes the original's: mlp and mlp_branch 256 (mlp: 768 for
    SegFormer-B2…B5 and Swin), hrnet the sum of the channels, the others 512.
    dropout: the originals' is 0.1, and 0 on HRNet.
    num_classes is for auxiliary and region classifiers only.
    Errors: UserError for an unknown name, and for a head that needs two maps on a backbone with one.
    """
    if name not in HEADS:
        raise UserError(f"decode_head.name {name!r} is unknown: choose one of {', '.join(HEADS)}")
    if len(channels) < 2 and name in ("fcn", "aspp", "ocr"):
        raise UserError(
            f"decode_head.name {name} needs at least two maps, the backbone gives {len(channels)}"
        )
    return HEADS[name](channels, strides, num_classes, dim, dropout)
