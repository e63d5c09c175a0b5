"""Swin Transformer (arXiv 2103.14030) on timm's modules, for maps of any size.

timm rolls a map before padding it to whole windows; the original pads first, so that the padding sits at the
border and the mask fits it. Results differ whenever a map is no multiple of the window (512² is such a case).
timm also drops the shift of a stage whose map at build time is no larger than the window. Here the order is
the original's, the shift stays, and the mask is made once per stage from the map's real size.

Sizes are counted as whole windows, (side + w − 1) // w, and padding follows from the count: about sizes that
are free in an exported graph, torch.export can reason in this form, and not about remainders.

Legend: B batch, H W the map, P Q the padded map, w window, C channels, G windows per image, n pixels of a
window.
"""

from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.models.maps import cells, checkpointed, filling

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
        net.norm = net.head = nn.Identity()  # the classifier's, no part of the maps
        self.channels = [info["num_chs"] for info in net.feature_info]
        self.strides = [info["reduction"] for info in net.feature_info]
        self.net = net
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        self.grad_checkpointing = False

    def forward(self, image: Tensor) -> list[Tensor]:
        checkpointing = self.grad_checkpointing and self.training
        patch = self.net.patch_embed.patch_size
        rows, columns = (filling(side, cell) for side, cell in zip(image.shape[-2:], patch))
        x_BHWC = self.net.patch_embed(F.pad(image, (0, columns, 0, rows)))
        maps = []
        for layer, norm in zip(self.net.layers, self.norms):
            if not isinstance(layer.downsample, nn.Identity):
                x_BHWC = layer.downsample(padded_map(x_BHWC, (2, 2)))
            mask = shift_mask(x_BHWC, layer.blocks[-1].window_size, layer.blocks[-1].shift_size)
            for block in layer.blocks:
                x_BHWC = checkpointed(
                    partial(block_forward, block), x_BHWC, mask, grad_checkpointing=checkpointing
                )
            maps.append(norm(x_BHWC).permute(0, 3, 1, 2))
        return maps


def block_forward(block: Any, x_BHWC: Tensor, mask_Gnn: Tensor) -> Tensor:
    x_BHWC = x_BHWC + block.drop_path1(window_attention(block, block.norm1(x_BHWC), mask_Gnn))
    return x_BHWC + block.drop_path2(block.mlp(block.norm2(x_BHWC)))


def padded_map(x_BHWC: Tensor, cell: tuple[int, int]) -> Tensor:
    """The map with zeros at the bottom and right, to whole cells."""
    rows, columns = (filling(side, each) for side, each in zip(x_BHWC.shape[1:3], cell))
    return F.pad(x_BHWC, (0, 0, 0, columns, 0, rows))


def window_attention(block: Any, x_BHWC: Tensor, mask_Gnn: Tensor) -> Tensor:
    """Pad to whole windows, shift, attend within windows, shift back, crop."""
    (batch, rows, columns, channels), window, shift = x_BHWC.shape, block.window_size, block.shift_size
    down, across = cells(rows, window[0]), cells(columns, window[1])
    x_BPQC = padded_map(x_BHWC, window)
    if any(shift):
        x_BPQC = torch.roll(x_BPQC, (-shift[0], -shift[1]), dims=(1, 2))
    x_BPQC = x_BPQC.reshape(batch, down, window[0], across, window[1], channels)
    windows_BGnC = x_BPQC.transpose(2, 3).reshape(batch, down * across, window[0] * window[1], channels)
    windows_BGnC = attend(block.attn, windows_BGnC, mask_Gnn if any(shift) else None)
    x_BPQC = windows_BGnC.reshape(batch, down, across, window[0], window[1], channels).transpose(2, 3)
    x_BPQC = x_BPQC.reshape(batch, down * window[0], across * window[1], channels)
    if any(shift):
        x_BPQC = torch.roll(x_BPQC, shift, dims=(1, 2))
    return x_BPQC[:, :rows, :columns]


def attend(attn: Any, windows_BGnC: Tensor, mask_Gnn: Tensor | None) -> Tensor:
    """timm's WindowAttention with batch and windows as axes of their own."""
    batch, windows, pixels, channels = windows_BGnC.shape
    heads = attn.num_heads
    qkv = attn.qkv(windows_BGnC).reshape(batch, windows, pixels, 3, heads, channels // heads)
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
    table = attn.relative_position_bias_table[attn.relative_position_index.flatten()]
    scores = (q * attn.scale) @ k.transpose(-2, -1) + table.reshape(pixels, pixels, heads).permute(2, 0, 1)
    if mask_Gnn is not None:
        scores = scores + mask_Gnn[:, None]
    out = scores.softmax(-1) @ v
    return attn.proj(out.transpose(2, 3).reshape(batch, windows, pixels, channels))


def shift_mask(x_BHWC: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(G, n, n): −100 between positions that the cyclic shift brought together from two ends, else 0."""
    down, across = (cells(side, each) for side, each in zip(x_BHWC.shape[1:3], window))
    regions = []
    for axis, count in enumerate((down, across)):
        size = count * window[axis]
        position = torch.arange(size, device=x_BHWC.device)
        last, end = size - window[axis], size - shift[axis]
        regions.append((position >= last).long() + (position >= end).long())
    region_PQ = 3 * regions[0][:, None] + regions[1]
    region_Gn = region_PQ.reshape(down, window[0], across, window[1]).transpose(1, 2)
    region_Gn = region_Gn.reshape(down * across, window[0] * window[1])
    return (region_Gn[:, None] != region_Gn[:, :, None]).to(x_BHWC.dtype) * -100.0
