"""What is minimised: cross-entropy, PPC, PPD, auxiliary cross-entropy, pixel contrast and tree terms.

B images, (H, W) label resolution, (h, w) embedding resolution, P pixels drawn for PPC,
T triplets.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from protoseg.config import LossConfig
from protoseg.core.contrast import PixelContrast
from protoseg.core.losses import loss_scale, upsampled_cross_entropy
from protoseg.core.tree_losses import TreeTables, node_log_odds, tree_min_cross_entropy, tree_triplet_loss
from protoseg.core.update import TrainingOutput
from protoseg.models.segmenter import Segmenter


class Labels(NamedTuple):
    """Labels of one micro-batch, int64."""

    full: Tensor  # (B, H, W)
    small: Tensor  # (B, h, w)
    nodes: Tensor | None = None  # (B, h, w) with a label tree: nodes, inner ones too; −1 takes no part
    triplets: Tensor | None = None  # (3, T) of the B·h·w pixels


class LossScales(NamedTuple):
    """W / global count, at label and at embedding resolution: what turns local sums into the loss."""

    full: Tensor
    small: Tensor
    nodes: Tensor | None = None


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
        self,
        model: Segmenter,
        contrast: PixelContrast | None,
        loss: LossConfig,
        parts: int = 1,
        tree: TreeTables | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.contrast = contrast
        self.parts = parts
        self.weights = loss.by_term
        self.tree = tree
        class_weights = torch.tensor(loss.class_weights) if loss.class_weights else None
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
        terms |= self._tree_terms(logits, embedding, labels, scales)
        weights: dict[str, float | Tensor] = {**self.weights}
        if self.contrast is not None and self.contrast.settings.warmup_iterations:
            # 0 times the term has a graph: DDP finds every parameter used.
            warm = step >= self.contrast.settings.warmup_iterations
            weights["contrast"] = weights["contrast"] * warm
        total = sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["ce"]))
        return StepOutput(
            total, {name: term.detach() for name, term in terms.items()}, out, projected, diagnostics
        )

    def _tree_terms(
        self, logits: Tensor, embedding: Tensor, labels: Labels, scales: LossScales
    ) -> dict[str, Tensor]:
        """The terms of the label tree that have a weight, at the embedding's resolution."""
        terms: dict[str, Tensor] = {}
        if self.tree is None or labels.nodes is None:
            return terms
        with torch.autocast(logits.device.type, enabled=False):
            label_N = labels.nodes.flatten()
            if self.weights["tree"]:
                logits_CN = logits.transpose(0, 1).flatten(1)
                logits_CN = logits_CN.to(torch.promote_types(logits.dtype, torch.float32))
                log_odds_VN = node_log_odds(logits_CN, self.tree)
                assert scales.nodes is not None
                scale = scales.nodes.to(log_odds_VN.dtype)
                terms["tree"] = tree_min_cross_entropy(
                    log_odds_VN, label_N, self.tree, scale, consistent=True
                )
            if labels.triplets is not None:
                pixels = embedding.shape[2] * embedding.shape[3]
                image_3T, place_3T = labels.triplets // pixels, labels.triplets % pixels
                emb_3TD = embedding.flatten(2)[image_3T, :, place_3T]
                terms["tree_triplet"] = (
                    tree_triplet_loss(emb_3TD, label_N[labels.triplets], self.tree) / self.parts
                )
        return terms

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
        nodes = [each.nodes for each in labels if each.nodes is not None]
        ignored = self.model.ignore_index
        return LossScales(
            loss_scale(full, ignored, self.class_weights, all_reduce=all_reduce),
            loss_scale(small, ignored, all_reduce=all_reduce),
            loss_scale(nodes, -1, all_reduce=all_reduce) if nodes else None,
        )
