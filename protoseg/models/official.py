"""The head of the code published with ProtoSeg (2022), with its faults, so that a repair can be measured.

Not for use: it is here to load the released weights and to be compared with. Its temperature, the weights of
the losses and LayerNorm over the class axis come from the `official` preset in config.py.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.core.prototypes import PrototypeHead
from protoseg.core.similarity import at_least_single, own_similarities
from protoseg.core.update import TrainingOutput


class OfficialPrototypeHead(PrototypeHead):
    """PrototypeHead behind a projection normalised along the width, with a Gumbel draw for the update.

    The faults: a pixel's embedding depends on the other pixels of its row; prototypes are updated from a
    random draw in which the plan's probabilities stand where log-probabilities belong, so that a pixel moves
    almost any prototype of its class, while the losses use the plan's argmax.
    """

    def __init__(self, dim: int, num_classes: int, num_prototypes: int = 10, **options: Any) -> None:
        super().__init__(dim, num_classes, num_prototypes, **options)
        self.projection = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, dim, 1))
        self.feature_norm = nn.LayerNorm(dim)

    def _compared(self, features: Tensor) -> Tensor:
        """Projected, and normalised by row of the image first."""
        by_width = F.normalize(self.projection(at_least_single(features)), dim=-1)
        normed = self.feature_norm(rearrange(by_width, "b d h w -> b h w d"))
        return rearrange(normed, "b h w d -> b d h w")

    def training_step(
        self, features: Tensor, labels: Tensor, scale: Tensor | None = None, drawn: Tensor | None = None
    ) -> TrainingOutput:
        """As the parent's, but `update_` will read a Gumbel draw; the losses have used the argmax."""
        out = super().training_step(features, labels, scale, drawn)
        labels_N = out.labels.flatten()
        own_NK = own_similarities(out.embedding, self.prototypes.to(out.embedding.dtype), labels_N)
        plan_NK = self._plan(own_NK, labels_N)
        noise_NK = -torch.empty_like(plan_NK).exponential_().log()
        drawn_N = torch.where(labels_N >= 0, (plan_NK + noise_NK).argmax(1), -1)
        return replace(out, assignment=drawn_N.view_as(out.assignment))
