"""What is minimised: cross-entropy, PPC, PPD, auxiliary cross-entropy and pixel contrast of one micro-batch.

B images, (H, W) label resolution, (h, w) embedding resolution, P pixels drawn for PPC.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from protoseg.config import LossConfig
from protoseg.core.contrast import PixelContrast
from protoseg.core.losses import loss_scale, upsampled_cross_entropy
from protoseg.core.update import TrainingOutput
from protoseg.models.segmenter import Segmenter


class Labels(NamedTuple):
    """Labels of one micro-batch, int64."""

    full: Tensor  # (B, H, W)
    small: Tensor  # (B, h, w)


class LossScales(NamedTuple):
    """W / global count, at label and at embedding resolution: what turns local sums into the loss."""

    full: Tensor
    small: Tensor


@dataclass
class StepOutput:
    """What one forward pass in training gives."""

    total: Tensor  # for backward
    terms: dict[str, Tensor]  # detached, weighted as in the paper's sum but without λ
    prototypes: TrainingOutput | None = None  # for PrototypeHead.update_
    projected: Tensor | None = None  # for PixelContrast.enqueue_
    diagnostics: dict[str, Tensor] = field(default_factory=dict)  # logged beside the terms; not in the total


class Objective(nn.Module):
    """A segmenter with its losses. DDP needs the losses to be made inside forward. Changes no state.

    parts: micro-batches of a step, over which pixel contrast is averaged.
    """

    class_weights: Tensor | None

    def __init__(
        self, model: Segmenter, contrast: PixelContrast | None, weights: LossConfig, parts: int = 1
    ) -> None:
        super().__init__()
        self.model = model
        self.contrast = contrast
        self.parts = parts
        self.weights = {"ce": 1.0, **weights.model_dump()}  # by term
        class_weights = torch.tensor(weights.class_weights) if weights.class_weights else None
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(
        self,
        images: Tensor,
        labels: Labels,
        scales: LossScales,
        indices: Tensor,
        step: Tensor,
        drawn: Tensor | None = None,
    ) -> StepOutput:
        """Losses of images (B, 3, H, W); indices (B,) in the dataset, step 0-d int64, drawn (B, P)."""
        maps = self.model.maps(images)
        embedding, auxiliary = self.model.decode_head(maps)
        terms, out, diagnostics, projected = {}, None, {}, None
        if self.model.prototypes is not None:
            out = self.model.prototypes.training_step(embedding, labels.small, scales.small, drawn)
            logits = out.logits
            terms = {"ppc": out.ppc, "ppd": out.ppd}
        else:
            logits = self.model.classifier(embedding)
        terms["ce"] = self._cross_entropy(logits, labels, scales)
        if auxiliary:
            terms["auxiliary"] = torch.stack(
                [self._cross_entropy(x, labels, scales) for x in auxiliary]
            ).sum()
        if self.contrast is not None:
            source = self.model.contrast_features(maps, embedding)
            found = self.contrast(source, labels.small, logits.detach().argmax(1), indices, step)
            terms["contrast"] = found.loss / self.parts
            projected, diagnostics = found.projected, found.summary(self.parts)
        weights: dict[str, float | Tensor] = {**self.weights}
        if self.contrast is not None and self.contrast.settings.warmup_iterations:
            # 0 times the term has a graph: DDP finds every parameter used.
            warm = step >= self.contrast.settings.warmup_iterations
            weights["contrast"] = weights["contrast"] * warm
        total = sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["ce"]))
        return StepOutput(
            total, {name: term.detach() for name, term in terms.items()}, out, projected, diagnostics
        )

    def _cross_entropy(self, logits: Tensor, labels: Labels, scales: LossScales) -> Tensor:
        return upsampled_cross_entropy(
            logits,
            labels.full,
            ignore_index=self.model.ignore_index,
            class_weights=self.class_weights,
            scale=scales.full,
        )

    def loss_scales(
        self, labels: list[Labels], all_reduce: Callable[[Tensor, str], Tensor] | None = None
    ) -> LossScales:
        """The scales of one optimiser step from the labels of all its micro-batches."""
        full, small = ([getattr(each, name) for each in labels] for name in ("full", "small"))
        ignored = self.model.ignore_index
        return LossScales(
            loss_scale(full, ignored, self.class_weights, all_reduce=all_reduce),
            loss_scale(small, ignored, all_reduce=all_reduce),
        )
