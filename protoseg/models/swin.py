"""Swin Transformer (arXiv 2103.14030) on timm's modules, for maps of any size.

timm rolls a map before padding it to whole windows; the original pads first, so that the padding sits at the
border and the mask fits it. Results differ whenever a map is no multiple of the window (512² is such a case).
timm also drops the shift of a stage whose map at build time is no larger than the window. Here the order is
the original's, the shift stays, and the mask is made once per stage from the map's real size.

Legend: B batch, H W the map, P Q the padded map, w window, C channels, G windows per image.
"""

from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from protoseg.models.maps import checkpointed

SWINS = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
    "swin_b_window12": "swin_base_patch4_window12_384",
    "swin_l_window12": "swin_large_patch4_window12_384",
}


class Swin(nn.Module):
    """Four maps at strides 4, 8, 16, 32, each through a LayerNorm of its own."""

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        net: Any = timm.create_model(
            SWINS[name],
            num_classes=0,
            drop_path_rate=drop_path,
            strict_img_size=False,
            always_partition=True,
        )
        net.patch_embed.dynamic_img_pad = True  # whole patches at sizes that are no multiple of 4
        net.norm = net.head = nn.Identity()  # the classifier's, no part of the maps
        self.channels = [info["num_chs"] for info in net.feature_info]
        self.strides = [info["reduction"] for info in net.feature_info]
        self.net = net
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self.grad_checkpointing = False

    def forward(self, image: Tensor) -> list[Tensor]:
        checkpointing = self.grad_checkpointing and self.training
        x_BHWC = self.net.patch_embed(image)
        maps = []
        for layer, norm in zip(self.net.layers, self.norms):
            x_BHWC = layer.downsample(x_BHWC)
            mask = shift_mask(x_BHWC, layer.blocks[-1].window_size, layer.blocks[-1].shift_size)
            for block in layer.blocks:
                x_BHWC = checkpointed(
                    partial(block_forward, block), x_BHWC, mask, grad_checkpointing=checkpointing
                )
            maps.append(norm(x_BHWC).permute(0, 3, 1, 2))
        return maps


def block_forward(block: Any, x_BHWC: Tensor, mask_Gww: Tensor) -> Tensor:
    x_BHWC = x_BHWC + block.drop_path1(window_attention(block, block.norm1(x_BHWC), mask_Gww))
    return x_BHWC + block.drop_path2(block.mlp(block.norm2(x_BHWC)))


def window_attention(block: Any, x_BHWC: Tensor, mask_Gww: Tensor) -> Tensor:
    """Pad to whole windows, shift, attend within windows, shift back, crop."""
    (_, rows, columns, _), (w_rows, w_columns) = x_BHWC.shape, block.window_size
    x_BPQC = F.pad(x_BHWC, (0, 0, 0, -columns % w_columns, 0, -rows % w_rows))
    size, shift = x_BPQC.shape[1:3], block.shift_size
    if any(shift):
        x_BPQC = torch.roll(x_BPQC, (-shift[0], -shift[1]), dims=(1, 2))
    windows = window_partition(x_BPQC, block.window_size).flatten(1, 2)
    windows = block.attn(windows, mask_Gww if any(shift) else None)
    x_BPQC = window_reverse(windows.unflatten(1, block.window_size), block.window_size, *size)
    if any(shift):
        x_BPQC = torch.roll(x_BPQC, shift, dims=(1, 2))
    return x_BPQC[:, :rows, :columns]


def shift_mask(x_BHWC: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(G, w·w, w·w): −100 between positions that the cyclic shift brought together from two ends, else 0."""
    regions = []
    for axis in (0, 1):
        position = torch.arange(
            -(-x_BHWC.shape[1 + axis] // window[axis]) * window[axis], device=x_BHWC.device
        )
        last, end = len(position) - window[axis], len(position) - shift[axis]
        regions.append((position >= last).long() + (position >= end).long())
    region_PQ = 3 * regions[0][:, None] + regions[1]
    region_Gw = window_partition(region_PQ[None, :, :, None], window).flatten(1)
    return (region_Gw[:, None] != region_Gw[:, :, None]).to(x_BHWC.dtype) * -100.0
