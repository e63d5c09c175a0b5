"""HRNetV2 (arXiv 1908.07919) on timm's modules, with the fusion that segmentation networks use.

timm brings a coarser branch to a finer one by nearest neighbour and a fixed factor: other values than the
original's, and an error at sizes not divisible by 32. Here it is bilinear to the exact size, as there.
(mmsegmentation goes by the fixed factor first, then to size: the same where 32 divides the size.)
"""

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from protoseg.models.maps import checkpointed, resize
from protoseg.runtime.errors import UserError

HRNETS = ("hrnet_w18", "hrnet_w32", "hrnet_w48")


class HRNet(nn.Module):
    """The four branches at strides 4, 8, 16, 32, with w, 2w, 4w, 8w channels.

    `align_corners` of the interpolation is False here and in mmsegmentation; code that descends from OpenSeg,
    ProtoSeg's among it, sets it to True.
    """

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        if drop_path:
            raise UserError(
                f"backbone.drop_path {drop_path} is not possible: {name} has no stochastic depth; use 0"
            )
        net: Any = timm.create_model(name, features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
        self.net = net
        self.channels: list[int] = net.feature_info.channels()
        self.strides: list[int] = net.feature_info.reduction()
        self.grad_checkpointing = False
        self.align_corners = False

    def forward(self, image: Tensor) -> list[Tensor]:
        net, checkpointing = self.net, self.grad_checkpointing and self.training
        fuse = partial(exchange, align_corners=self.align_corners)
        x = net.act2(net.bn2(net.conv2(net.act1(net.bn1(net.conv1(image))))))
        for block in net.layer1:
            x = checkpointed(block, x, grad_checkpointing=checkpointing)
        branches = [transition(x) for transition in net.transition1]
        for stage, transitions in (
            (net.stage2, net.transition2),
            (net.stage3, net.transition3),
            (net.stage4, ()),
        ):
            for module in stage:
                branches = checkpointed(partial(fuse, module), *branches, grad_checkpointing=checkpointing)
            # A new branch starts from the coarsest one so far; the others go on as they are.
            branches += [transition(branches[-1]) for transition in transitions[len(branches) :]]
        return branches


def exchange(module: Any, *branches: Tensor, align_corners: bool = False) -> list[Tensor]:
    """One high-resolution module: each branch's blocks, then each receives all others at its own size."""
    outs = [blocks(x) for blocks, x in zip(module.branches, branches)]
    fused = []
    for i, layers in enumerate(module.fuse_layers):
        size = outs[i].shape[-2:]
        # Coarser ones (j > i) pass a 1×1 convolution and a norm, then grow; finer ones strided convolutions.
        terms = [
            resize(layer[1](layer[0](outs[j])), size, align_corners) if j > i else layer(outs[j])
            for j, layer in enumerate(layers)
        ]
        fused.append(torch.relu(sum(terms[1:], terms[0])))
    return fused
