"""Any other feature extractor of timm, as `timm:<name>`: hierarchies as they are, plain ViTs by a pyramid.

The image is padded at the bottom and right to whole cells (with 0, the mean colour after normalisation) and
the maps are cropped to ceil(size / stride), because many of timm's networks round down or refuse such sizes.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from protoseg.models.maps import cells, filling, resize
from protoseg.runtime.errors import UserError, did_you_mean

# What lets timm's networks take any size; the first one that the network knows is used.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmFeatures(nn.Module):
    """The last four maps with different strides ≥ 4, fewer if the network has fewer.

    For a plain ViT: four of its blocks, evenly spaced, through a PlainPyramid.
    """

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        if not timm.is_model(name):
            hint = did_you_mean(name, timm.list_models(), prefix="timm:")
            raise UserError(f"backbone.name: timm has no model {name!r}{hint}")
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        with torch.device("meta"):
            any_size = size_options(name, options)
            options |= any_size
            probe: Any = timm.create_model(name, features_only=True, **options)
        strides = [info["reduction"] for info in probe.feature_info.info]
        plain = len(set(strides)) == 1
        count = len(strides)
        if plain:
            taps = sorted({(i + 1) * count // 4 - 1 for i in range(4)} & set(range(count)))
        else:
            taps = [i for i, s in enumerate(strides) if s >= 4 and s not in strides[i + 1 :]][-4:]
        self.options = {"features_only": True, "out_indices": tuple(taps), **options}
        net: Any = timm.create_model(name, **self.options)
        self.channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
        self.channels = list(net.feature_info.channels())
        self.net = net
        self.pretrained_cfg: dict[str, Any] = net.pretrained_cfg
        self.strides = [strides[i] for i in taps]
        self.pyramid = PlainPyramid(self.channels) if plain else None
        self.cell = self.find_cell(name, any_size=bool(any_size))
        if self.pyramid is not None:
            self.channels, self.strides = self.pyramid.channels, self.pyramid.strides

    def find_cell(self, name: str, any_size: bool) -> int:
        """Image sizes are padded to a multiple of this: the largest stride, or the size timm trained with.

        The latter for networks whose maps must be whole windows. One of fixed size is found out now, not in
        training; without a setting for any size it must take more than it was trained with, too.
        """
        config = self.pretrained_cfg
        stride = max(self.strides)
        trained = -(-config["input_size"][-1] // stride) * stride
        problem = self.problem_at(stride)
        if problem is None and config["fixed_input_size"] and not any_size:
            problem = self.problem_at(trained)
        if problem is None:
            return stride
        if self.problem_at(trained) is None:
            return trained
        raise UserError(
            f"backbone.name timm:{name} does not take images of any size ({problem}); choose another"
        )

    def problem_at(self, cell: int) -> str | None:
        """What is wrong with the maps of an image of cell × 2·cell pixels, if anything."""
        expected = [(c, cell // s, 2 * cell // s) for c, s in zip(self.channels, self.strides)]
        training = self.training
        try:
            with torch.no_grad():
                maps = self.eval().features(torch.zeros(1, 3, cell, 2 * cell))
        except (AssertionError, IndexError, RuntimeError, ValueError, TypeError) as error:
            return str(error) or type(error).__name__
        finally:
            self.train(training)
        got = [tuple(x.shape[1:]) for x in maps]
        return None if got == expected else f"maps {got} where {expected} were expected"

    def features(self, image: Tensor) -> list[Tensor]:
        maps = self.net(image)
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else list(maps)

    def forward(self, image: Tensor) -> list[Tensor]:
        rows, columns = image.shape[-2:]
        image = F.pad(image, (0, filling(columns, self.cell), 0, filling(rows, self.cell)))
        maps = self.features(image)
        if self.pyramid is not None:
            height, width = image.shape[-2:]
            maps = self.pyramid(maps, [(cells(height, s), cells(width, s)) for s in self.strides])
        return [x[:, :, : cells(rows, s), : cells(columns, s)] for x, s in zip(maps, self.strides)]

    @property
    def grad_checkpointing(self) -> bool:
        return getattr(getattr(self.net, "model", self.net), "grad_checkpointing", False)

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        try:
            getattr(self.net, "model", self.net).set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise UserError(
                "backbone.grad_checkpointing: this timm model cannot do it; set it to false"
            ) from error


class PlainPyramid(nn.Module):
    """Maps of one stride → strides 4, 8, 16, 32: 1×1 convolution, LayerNorm, resize, 3×3, LayerNorm."""

    def __init__(self, channels: list[int], width: int = 256) -> None:
        super().__init__()
        channels = [channels[i * len(channels) // 4] for i in range(4)]
        self.channels, self.strides = [width] * 4, [4, 8, 16, 32]
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1), LayerNorm2d(width)) for c in channels
        )
        self.outer = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), LayerNorm2d(width)) for _ in channels
        )

    def forward(self, maps: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        maps = [
            maps[i * len(maps) // 4] for i in range(4)
        ]  # a network of fewer than four blocks repeats some
        return [
            outer(resize(inner(x), size))
            for inner, outer, x, size in zip(self.inner, self.outer, maps, sizes)
        ]


def size_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The first of ANY_SIZE that the network takes; UserError if it takes not even `options`."""
    for extra in ANY_SIZE:
        try:
            timm.create_model(name, features_only=True, **options, **extra)
            return extra
        except TypeError as error:
            refused = error
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"backbone.name timm:{name} cannot give feature maps ({error})") from error
    raise UserError(
        f"backbone timm:{name} does not take {options or 'these settings'} ({refused})"
    ) from refused
