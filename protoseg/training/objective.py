"""What is minimised: cross-entropy, PPC, PPD, auxiliary cross-entropy, pixel contrast and tree terms.

B images, (H, W) label resolution, (h, w) embedding resolution, P pixels drawn for PPC or the tree terms,
T triplets.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from protoseg.config import LossConfig
from protoseg.core.contrast import PixelContrast
from protoseg.core.losses import loss_scale, upsampled_cross_entropy
from protoseg.core.ranks import AllReduce
from protoseg.core.similarity import at_least_single
from protoseg.core.tree_losses import TreeTables, node_log_odds, tree_min_cross_entropy, tree_triplet_loss
from protoseg.core.update import TrainingOutput
from protoseg.models.segmenter import Segmenter


class Labels(NamedTuple):
    """Labels of one micro-batch, int64."""

    full: Tensor  # (B, H, W)
    small: Tensor  # (B, h, w)
    nodes: Tensor | None = None  # (B, P) with a label tree: nodes, inner ones too; −1 takes no part
    drawn: Tensor | None = None  # (B, P) which of the h·w pixels `nodes` are of; None: all
    triplets: Tensor | None = None  # (3, T) of those B·P pixels


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
        step: int | Tensor,
        drawn: Tensor | None = None,
    ) -> StepOutput:
        """Losses of images (B, 3, H, W).

        indices (B,) in the dataset; step an int or 0-d int64; drawn (B, P): the pixels PPC is computed of.
        """
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
                logits_CN = pixel_rows(logits, labels.drawn).t().contiguous()
                logits_CN = at_least_single(logits_CN)
                log_odds_VN = node_log_odds(logits_CN, self.tree)
                assert scales.nodes is not None
                scale = scales.nodes.to(log_odds_VN.dtype)
                terms["tree"] = tree_min_cross_entropy(
                    log_odds_VN, label_N, self.tree, scale, consistent=True
                )
            if labels.triplets is not None:
                row_ND = pixel_rows(embedding, labels.drawn)
                emb_3TD = row_ND.index_select(0, labels.triplets.flatten()).view(3, -1, row_ND.shape[1])
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

    def loss_scales(self, labels: list[Labels], all_reduce: AllReduce | None = None) -> LossScales:
        """The scales of one optimiser step from the labels of all its micro-batches."""
        full, small = ([getattr(each, name) for each in labels] for name in ("full", "small"))
        nodes = [each.nodes for each in labels if each.nodes is not None]
        ignored = self.model.ignore_index
        return LossScales(
            loss_scale(full, ignored, self.class_weights, all_reduce=all_reduce),
            loss_scale(small, ignored, all_reduce=all_reduce),
            loss_scale(nodes, -1, all_reduce=all_reduce) if nodes else None,
        )


def pixel_rows(map_BDhw: Tensor, drawn_BP: Tensor | None) -> Tensor:
    """(N, D) channels of the drawn pixels of each image, or of all."""
    map_BDP = map_BDhw.flatten(2)
    if drawn_BP is not None:
        map_BDP = map_BDP.gather(2, drawn_BP[:, None].expand(-1, map_BDP.shape[1], -1))
    return map_BDP.transpose(1, 2).flatten(0, 1)
