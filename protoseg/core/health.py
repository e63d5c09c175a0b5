"""The state of each class's prototypes."""

from typing import NamedTuple

import torch
from torch import Tensor


class Health(NamedTuple):
    """State of each class's prototypes, all (C,) float; NaN where a class has none yet or was never used."""

    effective_k: Tensor  # perplexity of the clustering's shares: K if all are used alike, 1 if only one is
    in_use: Tensor  # perplexity of the nearest prototype's shares: how many matter at prediction
    mean_intra_cosine: Tensor  # over pairs of one class; 1 means that they coincide
    max_intra_cosine: Tensor
    dead: Tensor  # prototypes that got no pixel for `dead_after` steps
    churn: Tensor  # how far a prototype moves per update (chord length), averaged over recent updates

    def to_plain(self) -> dict[str, list[float | None]]:
        """Lists of numbers for JSON, None where a value is not defined."""
        return {
            name: [None if value != value else value for value in values.tolist()]
            for name, values in zip(self._fields, self)
        }


def _perplexity(counts_CK: Tensor) -> Tensor:
    """exp of the entropy (C,) of each class's shares; NaN where all counts are 0."""
    share_CK = counts_CK / counts_CK.sum(1, keepdim=True)
    return (-torch.xlogy(share_CK, share_CK).sum(1)).exp()


def health(
    protos_CKD: Tensor,
    usage_CK: Tensor,
    nearest_CK: Tensor,
    idle_CK: Tensor,
    movement_CK: Tensor,
    live_C: Tensor,
    dead_after: int,
) -> Health:
    """Per-class health from the prototypes and their counters.

    usage_CK: pixels assigned (decayed sum). nearest_CK: pixels of the class that are nearest to it (same).
    idle_CK: steps without a pixel. movement_CK: mean step length.
    """
    num_prototypes = protos_CKD.shape[1]
    unknown = protos_CKD.new_tensor(float("nan"))
    with torch.autocast(protos_CKD.device.type, enabled=False):
        cosine_CKK = protos_CKD @ protos_CKD.mT
    upper_KK = torch.ones(num_prototypes, num_prototypes, device=protos_CKD.device).triu(1).bool()
    pairs_CP = cosine_CKK[:, upper_KK]
    several = num_prototypes > 1
    values = (
        _perplexity(usage_CK),
        _perplexity(nearest_CK),
        pairs_CP.mean(1) if several else unknown.expand(len(protos_CKD)),
        pairs_CP.amax(1) if several else unknown.expand(len(protos_CKD)),
        (idle_CK >= dead_after).sum(1).to(protos_CKD.dtype),
        movement_CK.mean(1),
    )
    return Health(*(torch.where(live_C, value, unknown) for value in values))
