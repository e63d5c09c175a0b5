"""The state of each class's prototypes. C classes, K prototypes per class."""

from typing import NamedTuple

import torch
from torch import Tensor

DEAD_SHARE = 0.1  # of an equal share: a prototype that is nearest to fewer of its class's pixels is dead


class Health(NamedTuple):
    """State of each class's prototypes, all (C,) float; NaN where a class has none yet or was never
    used; `dead` and `churn` are 0 there.
    """

    effective_k: Tensor  # perplexity of the clustering's shares: K if all are used alike, 1 if only one is
    in_use: Tensor  # perplexity of the nearest prototype's shares: how many matter at prediction
    agreement: Tensor  # share of pixels whose nearest prototype is the one that the clustering gives them
    mean_intra_cosine: Tensor  # over pairs of one class; 1 means that they coincide
    max_intra_cosine: Tensor
    dead: Tensor  # prototypes that are nearest to next to no pixel
    churn: Tensor  # how far a prototype moves per update (chord length), averaged over recent updates

    def to_plain(self) -> dict[str, list[float | None]]:
        """Lists of numbers for JSON, None where a value is not defined."""
        return {
            name: [None if value != value else value for value in values.tolist()]
            for name, values in zip(self._fields, self)
        }


def perplexity(counts_CK: Tensor) -> Tensor:
    """exp of the entropy (C,) of each class's shares; NaN where all counts are 0."""
    share_CK = counts_CK / counts_CK.sum(1, keepdim=True)
    return (-torch.xlogy(share_CK, share_CK).sum(1)).exp()


def dead_prototypes(nearest_CK: Tensor) -> Tensor:
    """Prototypes (C, K) that are nearest to fewer than a tenth of an equal share of their class's pixels.

    nearest_CK: pixels of the class that are nearest to it. A class without pixels, or with a single
    prototype, has no dead ones.
    """
    total_C1 = nearest_CK.sum(1, keepdim=True)
    return (nearest_CK * nearest_CK.shape[1] < DEAD_SHARE * total_C1) & (total_C1 > 0)


def health(
    protos_CKD: Tensor,
    usage_CK: Tensor,
    nearest_CK: Tensor,
    agreeing_C: Tensor,
    movement_CK: Tensor,
    live_C: Tensor,
) -> Health:
    """Per-class health from the prototypes and their counters, decayed sums over the last steps.

    usage_CK: pixels assigned. nearest_CK: pixels of the class that are nearest to it. agreeing_C: pixels
    counted alike in both. movement_CK: mean step length.
    """
    num_prototypes = protos_CKD.shape[1]
    unknown = protos_CKD.new_tensor(float("nan"))
    with torch.autocast(protos_CKD.device.type, enabled=False):
        cosine_CKK = protos_CKD @ protos_CKD.mT
    upper_KK = torch.ones(num_prototypes, num_prototypes, device=protos_CKD.device).triu(1).bool()
    pairs_CP = cosine_CKK[:, upper_KK]
    several = num_prototypes > 1
    values = (
        perplexity(usage_CK),
        perplexity(nearest_CK),
        agreeing_C / nearest_CK.sum(1),
        pairs_CP.mean(1) if several else unknown.expand(len(protos_CKD)),
        pairs_CP.amax(1) if several else unknown.expand(len(protos_CKD)),
        dead_prototypes(nearest_CK).sum(1).to(protos_CKD.dtype),
        movement_CK.mean(1),
    )
    return Health(*(torch.where(live_C, value, unknown) for value in values))
