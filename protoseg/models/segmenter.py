"""Segmenter: backbone → decode head → classifier (prototypes, linear or cosine).

B images, C classes, K prototypes, D embedding channels; (H, W) input pixels, (h, w) embedding pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoseg.config import Config
from protoseg.core.prototypes import PrototypeHead
from protoseg.models.backbones import Backbone
from protoseg.models.maps import concatenate
from protoseg.runtime.errors import UserError


class LinearClassifier(nn.Conv2d):
    """The parametric baseline: one learned D-vector and bias per class."""

    def __init__(self, dim: int, num_classes: int) -> None:
        # PyTorch's own start. The usual normal(0, 0.01) left `digits` at background only for 300 steps.
        super().__init__(dim, num_classes, kernel_size=1)


class CosineClassifier(nn.Module):
    """One learned unit vector and bias per class: K = 1 without clustering, the baseline between the two.

    (B, D, h, w) → logits (B, C, h, w): scale × cosine + bias.
    """

    def __init__(self, dim: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, dim), dim=1))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.scale = scale

    def forward(self, embedding: Tensor) -> Tensor:
        weight_CD = self.scale * F.normalize(self.weight, dim=1)
        return F.conv2d(F.normalize(embedding, dim=1), weight_CD[:, :, None, None], self.bias)


class Segmenter(nn.Module):
    """Images (B, 3, H, W), values 0…255, uint8 or float → class logits (B, C, h, w).

    contrast_input: what pixel contrast sees in training: "embedding", "last" (the backbone's last map) or
    "maps" (all of them concatenated).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        decode_head: nn.Module,
        classifier: nn.Module,
        *,
        ignore_index: int = 255,
        contrast_input: str = "embedding",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.classifier = classifier
        self.contrast_input = contrast_input
        self.stride = cast(int, decode_head.stride)
        self.ignore_index = ignore_index
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, for_bytes(values))

    @property
    def prototypes(self) -> PrototypeHead | None:
        """The prototype head, if that is the classifier."""
        return self.classifier if isinstance(self.classifier, PrototypeHead) else None

    def require_prototypes(self, who: str) -> PrototypeHead:
        """The prototype head. Errors: UserError beginning with `who`, if the classifier is a learned one."""
        if self.prototypes is None:
            raise UserError(
                f"{who} has a learned classifier and no prototypes; use one with classifier: prototypes"
            )
        return self.prototypes

    def extra_repr(self) -> str:
        mean, std = (", ".join(f"{x:g}" for x in each.flatten().tolist()) for each in (self.mean, self.std))
        return f"mean of R, G, B: {mean}; standard deviation: {std}; stride {self.stride}"

    @property
    def mean_colour(self) -> tuple[int, ...]:
        """What padding is filled with: about zero after normalisation, so that it looks like nothing."""
        return tuple(self.mean.flatten().round().int().tolist())

    @property
    def num_parameters(self) -> int:
        """Learnable numbers of the model that is evaluated and exported."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def maps(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """The backbone's maps of images with values 0…255; maps in place of images pass through."""
        if isinstance(images, list):
            return [x.to(self.mean.dtype) for x in images]
        return self.backbone((images.to(self.mean.dtype) - self.mean) / self.std)

    def embed(self, images: Tensor | list[Tensor]) -> Tensor:
        """Embedding map (B, D, h, w), which the classifier gets."""
        return self.decode_head(self.maps(images))[0]

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        return self.classifier(self.embed(images))

    def contrast_features(self, maps: list[Tensor], embedding: Tensor) -> Tensor:
        """What pixel contrast projects, at the embedding's size: as `contrast_input` says."""
        if self.contrast_input == "maps":
            return concatenate(maps)
        return maps[-1] if self.contrast_input == "last" else embedding

    @property
    def contrast_channels(self) -> int:
        """Channels of `contrast_features`."""
        channels = self.backbone.channels
        of = {"embedding": self.decode_head.dim, "last": channels[-1], "maps": sum(channels)}
        return cast(int, of[self.contrast_input])

    def feature_size(self, labels: Tensor) -> tuple[int, int]:
        """(h, w) of the embedding map for label maps (…, H, W)."""
        return -(-labels.shape[-2] // self.stride), -(-labels.shape[-1] // self.stride)


def for_bytes(values: Sequence[float]) -> Tensor:
    """Mean or deviation of values 0…1, per channel, as (1, 3, 1, 1) for values 0…255; rounded once."""
    return torch.tensor([255 * value for value in values]).view(1, 3, 1, 1)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """Forward passes in bfloat16, if configured: in training and whatever is done with the model later."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, but leaves its running statistics alone."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    saved = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        yield
    finally:
        for norm, buffers in zip(norms, saved):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
