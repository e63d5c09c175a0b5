"""Segmenter: backbone → decode head → classifier (prototypes or linear).

B images, C classes, K prototypes, D embedding channels; (H, W) input pixels, (h, w) embedding pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoseg.config import Config
from protoseg.core.contrast import ProjectionHead
from protoseg.core.losses import downsample_labels, loss_scale, upsampled_cross_entropy
from protoseg.core.prototypes import PrototypeHead, TrainingOutput
from protoseg.models.backbones import Backbone
from protoseg.models.maps import concatenate


class LossScales(NamedTuple):
    """W / global count, at label and at embedding resolution: what turns local sums into the loss."""

    full: Tensor
    small: Tensor


class ContrastInput(NamedTuple):
    """What pixel contrast needs of a forward pass, all at the embedding's resolution."""

    source: Tensor  # (B, F, h, w), the input of the projection
    labels: Tensor  # (B, h, w)
    predictions: Tensor  # (B, h, w), classes of the main logits


@dataclass
class StepOutput:
    """What one forward pass in training gives."""

    total: Tensor  # for backward
    terms: dict[str, Tensor]  # detached, weighted as in the paper's sum but without λ
    prototypes: TrainingOutput | None  # for PrototypeHead.update_
    contrast: ContrastInput | None  # where the model has a projection
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # logged beside the terms; not in the total


class LinearClassifier(nn.Conv2d):
    """The parametric baseline: one learned D-vector and bias per class."""

    def __init__(self, dim: int, num_classes: int) -> None:
        # PyTorch's own start. The usual normal(0, 0.01) left `digits` at background only for 300 steps.
        super().__init__(dim, num_classes, kernel_size=1)


class Segmenter(nn.Module):
    """Images (B, 3, H, W), values 0…255, uint8 or float → class logits (B, C, h, w).

    With labels (B, H, W) and the step's loss scales, forward returns a StepOutput instead: DDP needs the
    losses to be made inside forward. Nothing here changes prototypes; the trainer does, on a line of its own.
    `projection_input` says what pixel contrast sees: "embedding", "last" (the backbone's last map) or
    "maps" (all of them concatenated). The projection itself is added for training only.
    """

    mean: Tensor
    std: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        decode_head: nn.Module,
        classifier: nn.Module,
        *,
        ignore_index: int = 255,
        ppc_weight: float = 0.01,
        ppd_weight: float = 0.01,
        auxiliary_weight: float = 0.4,
        class_weights: list[float] | None = None,
        projection_input: str = "embedding",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.classifier = classifier
        self.projection: ProjectionHead | None = None
        self.projection_input = projection_input
        self.stride = cast(int, decode_head.stride)
        self.ignore_index = ignore_index
        self.loss_weights = {"ce": 1.0, "ppc": ppc_weight, "ppd": ppd_weight, "auxiliary": auxiliary_weight}
        weights = torch.tensor(class_weights) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1))

    @property
    def prototypes(self) -> PrototypeHead | None:
        """The prototype head, if that is the classifier."""
        return self.classifier if isinstance(self.classifier, PrototypeHead) else None

    def extra_repr(self) -> str:
        mean, std = (", ".join(f"{x:g}" for x in each.flatten().tolist()) for each in (self.mean, self.std))
        return f"mean of R, G, B: {mean}; standard deviation: {std}; stride {self.stride}"

    @property
    def mean_colour(self) -> tuple[int, ...]:
        """What padding is filled with: about zero after normalisation, so that it looks like nothing."""
        return tuple(self.mean.flatten().round().int().tolist())

    @property
    def num_parameters(self) -> int:
        """Learnable numbers of the model that is evaluated and exported: without the projection."""
        extra = self.projection.parameters() if self.projection is not None else ()
        return sum(p.numel() for p in self.parameters() if p.requires_grad) - sum(p.numel() for p in extra)

    def add_projection_(self, dim: int) -> None:
        """Put pixel contrast's projection head beside the decode head; for training, never saved as model."""
        channels = self.backbone.channels
        width = {"embedding": self.decode_head.dim, "last": channels[-1], "maps": sum(channels)}
        self.projection = ProjectionHead(cast(int, width[self.projection_input]), dim)

    def maps(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """The backbone's maps of images with values 0…255; maps in place of images pass through."""
        if isinstance(images, list):
            return [x.to(self.mean.dtype) for x in images]
        return self.backbone((images.to(self.mean.dtype) - self.mean) / self.std)

    def embed(self, images: Tensor | list[Tensor]) -> Tensor:
        """Embedding map (B, D, h, w), which the classifier gets."""
        return self.decode_head(self.maps(images))[0]

    def forward(
        self, images: Tensor | list[Tensor], labels: Tensor | None = None, scales: LossScales | None = None
    ) -> Tensor | StepOutput:
        maps = self.maps(images)
        embedding, auxiliary = self.decode_head(maps)
        if labels is None:
            return self.classifier(embedding)
        if scales is None:
            scales = self.loss_scales([labels])
        out, contrast = None, None
        terms: dict[str, Tensor] = {}
        small = downsample_labels(labels, embedding.shape[-2:])
        if self.prototypes is not None:
            out = self.prototypes.training_step(embedding, small, scale=scales.small)
            logits = out.logits
            terms = {"ppc": out.ppc, "ppd": out.ppd}
        else:
            logits = self.classifier(embedding)
        terms["ce"] = self._cross_entropy(logits, labels, scales.full)
        if auxiliary:
            terms["auxiliary"] = torch.stack(
                [self._cross_entropy(x, labels, scales.full) for x in auxiliary]
            ).sum()
        total = sum(
            (self.loss_weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["ce"])
        )
        if self.projection is not None:
            source = {"embedding": embedding, "last": maps[-1]}.get(self.projection_input)
            source = concatenate(maps) if source is None else source
            contrast = ContrastInput(source, small, logits.detach().argmax(1))
        return StepOutput(total, {name: term.detach() for name, term in terms.items()}, out, contrast)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return upsampled_cross_entropy(
            logits, labels, ignore_index=self.ignore_index, class_weights=self.class_weights, scale=scale
        )

    def feature_size(self, labels: Tensor) -> tuple[int, int]:
        """(h, w) of the embedding map for label maps (…, H, W)."""
        return -(-labels.shape[-2] // self.stride), -(-labels.shape[-1] // self.stride)

    def loss_scales(
        self, labels: list[Tensor], all_reduce: Callable[[Tensor, str], Tensor] | None = None
    ) -> LossScales:
        """The scales of one optimiser step from the labels of all its micro-batches."""
        small = [downsample_labels(each, self.feature_size(each)) for each in labels]
        return LossScales(
            loss_scale(labels, self.ignore_index, self.class_weights, all_reduce=all_reduce),
            loss_scale(small, self.ignore_index, all_reduce=all_reduce),
        )


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
