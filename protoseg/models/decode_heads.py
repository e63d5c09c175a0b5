"""Decode heads: the backbone's maps → one embedding map, which meets the prototypes or the linear classifier.

Every head has `dim`, `stride` and forward(maps) -> (embedding (B, D, h, w), auxiliary logits: a list of
(B, C, h', w'), empty in eval mode and where the original has none). The dropout before the classifier belongs
to the embedding; the classifier itself is not part of the head.

Legend: B batch, C classes, D embedding width, N pixels, c_i channels of map i, h w rows and columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.models.maps import concatenate, resize
from protoseg.runtime.errors import UserError

Output = tuple[Tensor, list[Tensor]]


class Given(NamedTuple):
    """What a head is built from; `dim` and `num_classes` as in build_decode_head."""

    channels: Sequence[int]
    strides: Sequence[int]
    num_classes: int
    dim: int | None
    dropout: float


class DecodeHead(nn.Module):
    """What the heads share; `dim` is the original's width, `stride` that of the embedding.

    every_map: whether it reads all maps; where not, some of the backbone's parameters may get no gradient.
    """

    every_map = True

    def __init__(self, given: Given, dim: int, stride: int) -> None:
        super().__init__()
        self.dim, self.stride = given.dim or dim, stride
        self.dropout = nn.Dropout2d(given.dropout)


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
    # A pixel's channels side by side: interpolation, and the prototypes after it, take a third of the time.
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    total = F.conv2d(maps[0], weights[0][:, :, None, None], bias)
    for x, weight in zip(maps[1:], weights[1:]):
        total += resize(F.conv2d(x, weight[:, :, None, None]), total.shape[-2:])
    return total


def fuse_at_finest(fuse: Any, maps: Sequence[Tensor]) -> Tensor:
    """conv_norm of kernel 1 over the concatenation of all maps at the first one's size, finest map first."""
    conv, norm, relu = fuse
    weights = conv.weight.flatten(1).split([x.shape[1] for x in maps], dim=1)
    return relu(norm(sum_at_finest(maps, weights, None)))


class MLPHead(DecodeHead):
    """All-MLP head of SegFormer (arXiv 2105.15203, Eq. 4): any number of maps → (B, dim, h, w) of the finest.

    Written out: a linear layer c_i → D per map, bilinear to the finest size, concatenation from the coarsest
    map to the finest, 1×1 convolution to D without bias, BatchNorm, ReLU, dropout. All before BatchNorm is
    linear, so each map's share of the convolution is multiplied into its linear layer and applied at the
    map's own resolution: same function, same parameters, about a tenth of the multiplications.
    """

    def __init__(self, given: Given) -> None:
        super().__init__(given, dim=256, stride=given.strides[0])
        layers = [nn.Linear(c, self.dim) for c in given.channels]
        for layer in layers:
            # Each map starts with the same share of the sum. With one spread for all, the coarsest map, which
            # has the most channels, drowns the finest, and small things are learned late or never.
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.linears: Any = nn.ModuleList(layers)
        self.fuse = conv_norm(len(layers) * self.dim, self.dim, kernel=1)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        conv, norm, relu = self.fuse
        shares = conv.weight.flatten(1).chunk(len(maps), dim=1)[::-1]  # the coarsest map is first in `fuse`
        weights = [share @ layer.weight for share, layer in zip(shares, self.linears)]
        bias = torch.stack([share @ layer.bias for share, layer in zip(shares, self.linears)]).sum(0)
        return self.dropout(relu(norm(sum_at_finest(maps, weights, bias)))), []


class BranchMLPHead(DecodeHead):
    """The all-MLP head as mmsegmentation built it: BatchNorm and ReLU in each branch too, finest first."""

    def __init__(self, given: Given) -> None:
        super().__init__(given, dim=256, stride=given.strides[0])
        self.branches = nn.ModuleList(conv_norm(c, self.dim, kernel=1) for c in given.channels)
        self.fuse = conv_norm(len(given.channels) * self.dim, self.dim, kernel=1)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        maps = [branch(x) for branch, x in zip(self.branches, maps)]
        return self.dropout(fuse_at_finest(self.fuse, maps)), []


class HRNetHead(DecodeHead):
    """HRNetV2's head: all maps at the finest size, side by side, 1×1 convolution, BatchNorm, ReLU."""

    def __init__(self, given: Given) -> None:
        total = sum(given.channels)
        super().__init__(given, dim=total, stride=given.strides[0])
        self.fuse = conv_norm(total, self.dim, kernel=1)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        return self.dropout(fuse_at_finest(self.fuse, maps)), []


class WhitenHead(DecodeHead):
    """All maps at the finest size, side by side, centred and whitened: W·(x − centre). Nothing is learned.

    `centre` (D,) and the symmetric `whitening` W (D, D) are buffers, which `fit` sets from labelled images.
    """

    centre: Tensor
    whitening: Tensor

    def __init__(self, given: Given) -> None:
        total = sum(given.channels)
        super().__init__(given, dim=total, stride=given.strides[0])
        if self.dim != total:
            raise UserError(f"decode_head.dim {self.dim} is not possible: whiten keeps all {total} channels")
        self.register_buffer("centre", torch.zeros(total))
        self.register_buffer("whitening", torch.eye(total))

    def forward(self, maps: Sequence[Tensor]) -> Output:
        weights = self.whitening.split([x.shape[1] for x in maps], dim=1)
        return sum_at_finest(maps, weights, -self.whitening @ self.centre), []


class OfficialDecodeHead(DecodeHead):
    """HRNet's head in the code published with ProtoSeg: a 3×3 convolution with bias, BatchNorm, ReLU.

    Maps are brought to the finest size with align_corners=True there, in the backbone as well (official.py).
    """

    def __init__(self, given: Given) -> None:
        total = sum(given.channels)
        super().__init__(given, dim=total, stride=given.strides[0])
        self.conv = nn.Conv2d(total, self.dim, 3, padding=1)
        self.norm = nn.BatchNorm2d(self.dim)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        return self.dropout(self.norm(self.conv(concatenate(maps, align_corners=True))).relu()), []


class AuxiliaryHead(nn.Module):
    """Logits from an earlier map, for an extra cross-entropy in training and for OCR's regions."""

    def __init__(self, given: Given, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = conv_norm(in_channels, channels, kernel)
        self.dropout = nn.Dropout2d(given.dropout)
        self.classifier = pixel_classifier(channels, given.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(x)))


class FCNHead(DecodeHead):
    """FCN: two 3×3 convolutions on the last map, a third over input and result; auxiliary logits."""

    every_map = False

    def __init__(self, given: Given) -> None:
        super().__init__(given, dim=512, stride=given.strides[-1])
        last = given.channels[-1]
        self.convs = nn.Sequential(conv_norm(last, self.dim), conv_norm(self.dim, self.dim))
        self.fuse = conv_norm(last + self.dim, self.dim)
        self.auxiliary = AuxiliaryHead(given, given.channels[-2], 256, kernel=3)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        x = self.fuse(torch.cat([maps[-1], self.convs(maps[-1])], dim=1))
        return self.dropout(x), [self.auxiliary(maps[-2])] if self.training else []


class ASPPHead(DecodeHead):
    """DeepLabV3 (arXiv 1706.05587): image mean, 1×1 and three dilated 3×3 convolutions, fused by a 3×3.

    Rates 12, 24, 36 belong to stride 8; they halve as the stride doubles.
    """

    every_map = False

    def __init__(self, given: Given) -> None:
        super().__init__(given, dim=512, stride=given.strides[-1])
        last, rate = given.channels[-1], max(12 * 8 // self.stride, 1)
        self.image_mean = conv_norm(last, self.dim, kernel=1)
        self.branches = nn.ModuleList(
            [conv_norm(last, self.dim, kernel=1)]
            + [conv_norm(last, self.dim, dilation=rate * i) for i in (1, 2, 3)]
        )
        self.fuse = conv_norm(5 * self.dim, self.dim)
        self.auxiliary = AuxiliaryHead(given, given.channels[-2], 256, kernel=3)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        x = maps[-1]
        if self.training and len(x) == 1 and not isinstance(self.image_mean[1], nn.SyncBatchNorm):
            raise UserError(
                "decode_head.name aspp cannot train on one image at a time: the mean over the image leaves"
                " BatchNorm a single value per channel; use a larger data.batch_size, a smaller"
                " train.accumulation, or several GPUs, which normalise together"
            )
        mean = self.image_mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        x = self.fuse(torch.cat([mean, *(branch(x) for branch in self.branches)], dim=1))
        return self.dropout(x), [self.auxiliary(maps[-2])] if self.training else []


class OCRHead(DecodeHead):
    """Object-contextual representations (arXiv 1909.11065): pixels attend to one mean feature per region.

    After a dilated ResNet the coarse logits come from the last map but one; otherwise (HRNet) both parts see
    all maps concatenated at the finest size. The coarse logits are the auxiliary output; their classifier
    stays linear in C.
    """

    def __init__(self, given: Given) -> None:
        dilated = given.strides[-1] == given.strides[-2]
        super().__init__(given, dim=512, stride=given.strides[-1] if dilated else given.strides[0])
        self.dilated = dilated
        key_dim, total = self.dim // 2, sum(given.channels)
        if dilated:
            self.coarse = AuxiliaryHead(given, given.channels[-2], 256, kernel=3)
        else:
            self.coarse = AuxiliaryHead(given, total, total, kernel=1)
        self.pixels = conv_norm(given.channels[-1] if dilated else total, self.dim)
        self.query = nn.Sequential(conv_norm(self.dim, key_dim, 1), conv_norm(key_dim, key_dim, 1))
        self.key = nn.Sequential(conv_norm(self.dim, key_dim, 1), conv_norm(key_dim, key_dim, 1))
        self.value = conv_norm(self.dim, key_dim, 1)
        self.context = conv_norm(key_dim, self.dim, 1)
        self.fuse = conv_norm(2 * self.dim, self.dim, 1)

    def forward(self, maps: Sequence[Tensor]) -> Output:
        before, last = maps[-2:] if self.dilated else [concatenate(maps)] * 2
        coarse, x = self.coarse(before), self.pixels(last)
        weights_BCN = coarse.flatten(2).softmax(dim=2)
        regions_BDC1 = (x.flatten(2) @ weights_BCN.transpose(1, 2))[..., None]
        query, key, value = (
            rearrange(projection(source), "b d h w -> b 1 (h w) d")
            for projection, source in ((self.query, x), (self.key, regions_BDC1), (self.value, regions_BDC1))
        )
        context_B1Nd = F.scaled_dot_product_attention(query, key, value)
        context = self.context(rearrange(context_B1Nd, "b 1 (h w) d -> b d h w", h=x.shape[2]))
        return self.dropout(self.fuse(torch.cat([context, x], dim=1))), [coarse] if self.training else []


class ProjectedHead(nn.Module):
    """A head, then an MLP on each pixel: 1×1 convolution, BatchNorm, ReLU, 1×1 convolution, all of its width.

    The embedding has both signs then, as behind the projection of the code published with ProtoSeg.
    """

    def __init__(self, head: DecodeHead) -> None:
        super().__init__()
        self.head = head
        self.dim, self.stride, self.every_map = head.dim, head.stride, head.every_map
        self.projection = nn.Sequential(
            *conv_norm(self.dim, self.dim, kernel=1), nn.Conv2d(self.dim, self.dim, 1)
        )

    def forward(self, maps: Sequence[Tensor]) -> Output:
        embedding, auxiliary = self.head(maps)
        return self.projection(embedding), auxiliary


HEADS: dict[str, Callable[[Given], DecodeHead]] = {
    "mlp": MLPHead,
    "mlp_branch": BranchMLPHead,
    "fcn": FCNHead,
    "hrnet": HRNetHead,
    "official": OfficialDecodeHead,
    "whiten": WhitenHead,
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
    projection: bool = False,
) -> Any:
    """Build a decode head by its name in HEADS for a backbone's maps of these channels and strides.

    dim: width of the embedding; None takes the original's: mlp and mlp_branch 256 (mlp: 768 for
    SegFormer-B2…B5 and Swin), hrnet, official and whiten the sum of the channels, the others 512.
    dropout: the originals' is 0.1, and 0 on HRNet. projection: see `ProjectedHead`.
    num_classes is for auxiliary and region classifiers only.
    Errors: UserError for an unknown name, and for a head that needs two maps on a backbone with one.
    """
    if name not in HEADS:
        raise UserError(f"decode_head.name {name!r} is unknown: choose one of {', '.join(HEADS)}")
    if len(channels) < 2 and name in ("fcn", "aspp", "ocr"):
        raise UserError(
            f"decode_head.name {name} needs at least two maps, the backbone gives {len(channels)}"
        )
    if projection and name == "whiten":
        raise UserError("decode_head.projection: nothing is learned behind whiten; leave it out")
    head = HEADS[name](Given(channels, strides, num_classes, dim, dropout))
    return ProjectedHead(head) if projection else head
