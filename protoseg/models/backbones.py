"""Backbones behind one contract: a normalised image in, a list of NCHW maps out.

Map i has `channels[i]` channels and ceil(H / strides[i]) × ceil(W / strides[i]) positions, whatever the size.
A new backbone is one entry in BACKBONES (own file if it needs code); the contract test finds it by itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoseg.models.hrnet import HRNETS, HRNet
from protoseg.models.maps import checkpointed
from protoseg.models.mit import MIT, MixTransformer
from protoseg.models.swin import SWINS, Swin
from protoseg.models.timm_features import TimmFeatures
from protoseg.runtime.errors import UserError


class Backbone(nn.Module):
    """The contract, and the part of gradient checkpointing that is the same for every network.

    `net` has `channels`, `strides`, a `grad_checkpointing` flag and returns the list of maps. `mean` and
    `std` of RGB values 0…1 are what its weights were trained with: ImageNet's, or what timm says. Maps finer
    than `finest_stride` are left out. A frozen one learns nothing, keeps BatchNorm's statistics and no graph.
    """

    def __init__(self, net: Any, finest_stride: int | None = None, frozen: bool = False) -> None:
        super().__init__()
        self.net = net
        strides: list[int] = net.strides
        if finest_stride is not None and finest_stride not in strides:
            raise UserError(
                f"decode_head.stride {finest_stride} is not possible: the backbone has maps at strides"
                f" {', '.join(map(str, sorted(set(strides))))}"
            )
        self.first = 0 if finest_stride is None else strides.index(finest_stride)
        self.channels: list[int] = net.channels[self.first :]
        self.strides: list[int] = strides[self.first :]
        self.frozen = frozen
        if frozen and getattr(net, "pyramid", None) is not None:
            raise UserError(
                "backbone.frozen: the maps of a plain ViT come from layers that are new and have to learn;"
                " train it whole, or take a backbone of several stages, such as a Swin"
            )
        if frozen:
            self.requires_grad_(False).eval()
        trained = getattr(net, "pretrained_cfg", {})
        self.mean: tuple[float, ...] = tuple(trained.get("mean", IMAGENET_DEFAULT_MEAN))
        self.std: tuple[float, ...] = tuple(trained.get("std", IMAGENET_DEFAULT_STD))
        self.grad_checkpointing = False
        self.momenta: dict[str, float | None] = {}

    def train(self, mode: bool = True) -> "Backbone":
        """Frozen, it stays as it is in evaluation."""
        return super().train(mode and not self.frozen)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: blocks are computed again in backward. Same loss, gradients, statistics."""
        if enable and not self.grad_checkpointing:
            self.momenta = {n: m.momentum for n, m in self.net.named_modules() if isinstance(m, _BatchNorm)}
        elif self.grad_checkpointing and not enable:
            self.set_momenta(on=True)
        self.grad_checkpointing = enable
        self.net.grad_checkpointing = enable

    def set_momenta(self, on: bool) -> None:
        for name, momentum in self.momenta.items():
            module: Any = self.net.get_submodule(name)
            module.momentum = momentum if on else 0.0

    def forward(self, image: Tensor) -> list[Tensor]:
        # Whatever runs outside this forward is the recomputation in backward. With momentum 0 it leaves
        # BatchNorm's running statistics alone (only num_batches_tracked, which nothing reads at a fixed
        # momentum, counts twice). A compiled graph recomputes without touching them.
        repair = bool(self.momenta) and self.grad_checkpointing and not torch.compiler.is_compiling()
        if repair:
            self.set_momenta(on=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.net(image)[self.first :]
        if repair:
            self.set_momenta(on=False)
        return maps


class ResNet(nn.Module):
    """timm's ResNet without its classifier; names ending in `c` have the 3×3 stem 32-32-64."""

    def __init__(self, name: str, drop_path: float, output_stride: int) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise UserError(f"backbone.output_stride {output_stride} is not possible: choose 8, 16 or 32")
        net: Any = timm.create_model(
            name, num_classes=0, drop_path_rate=drop_path, output_stride=output_stride
        )
        self.net = net
        self.channels = [info["num_chs"] for info in net.feature_info[1:]]
        self.strides = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
        self.grad_checkpointing = False

    def forward(self, image: Tensor) -> list[Tensor]:
        net, checkpointing = self.net, self.grad_checkpointing and self.training
        x, maps = net.maxpool(net.act1(net.bn1(net.conv1(image)))), []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in layer:
                x = checkpointed(block, x, grad_checkpointing=checkpointing)
            maps.append(x)
        return maps


def build_mit(name: str, drop_path: float) -> MixTransformer:
    return MixTransformer(*MIT[name], drop_path=drop_path)


RESNETS = ("resnet18", "resnet50", "resnet101", "resnet50c", "resnet101c")
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(ResNet, name) for name in RESNETS},
    **{name: partial(HRNet, name) for name in HRNETS},
    **{name: partial(Swin, name) for name in SWINS},
    **{name: partial(build_mit, name) for name in MIT},
}


def build_backbone(
    name: str,
    *,
    drop_path: float = 0.0,
    output_stride: int = 32,
    finest_stride: int | None = None,
    frozen: bool = False,
) -> Backbone:
    """Build a backbone with random weights: a name in BACKBONES, or `timm:<name>` for any other of timm's.

    drop_path: rate of stochastic depth at the last block, growing linearly from 0 (not for HRNet).
    output_stride: 8, 16 or 32; below 32 the last stages are dilated (ResNets only).
    finest_stride, frozen: as in Backbone.
    Errors: UserError for an unknown name, and for a setting that the backbone does not have.
    """
    if output_stride != 32 and name not in RESNETS:
        raise UserError(f"backbone.output_stride {output_stride} needs a ResNet: {name} has only 32")
    if name.startswith("timm:"):
        return Backbone(TimmFeatures(name.removeprefix("timm:"), drop_path), finest_stride, frozen)
    if name not in BACKBONES:
        raise UserError(
            f"backbone.name {name!r} is unknown: choose one of {', '.join(BACKBONES)} or timm:<name>"
        )
    options = {"output_stride": output_stride} if name in RESNETS else {}
    return Backbone(BACKBONES[name](drop_path=drop_path, **options), finest_stride, frozen)
