"""What a step says to the prototypes: which pixels move which of them, and how often each was met.

B images, C classes, K prototypes per class, D channels, (h, w) pixels, N = B·h·w pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from protoseg.core.clustering import AllReduce, cluster_counts, cluster_sums


@dataclass(frozen=True)
class TrainingOutput:
    """What `PrototypeHead.training_step` returns, and `update_` takes."""

    logits: Tensor  # (B, C, h, w)
    ppc: Tensor  # 0-d
    ppd: Tensor  # 0-d
    assignment: Tensor  # (B, h, w) int64, the pixel's prototype within its class, −1 where it takes no part
    nearest: Tensor  # (B, h, w) int64, the nearest prototype of the pixel's class
    labels: Tensor  # (B, h, w) int64, −1 where the pixel takes no part
    right: Tensor  # (B, h, w) bool, whether no prototype of another class is nearer than one of its own
    embedding: Tensor  # (N, D) detached, unit length


def step_sums(
    outs: Sequence[TrainingOutput],
    num_classes: int,
    num_prototypes: int,
    update_pixels: Literal["correct", "all"],
    all_reduce: AllReduce | None = None,
) -> tuple[Tensor, ...]:
    """Sums over all micro-batches of a step, and all ranks.

    Returns the sum of the embeddings that move each prototype (C, K, D), their number (C, K), the number of
    pixels assigned to it (C, K), nearest to it (C, K), and of those alike in both (C,). "correct": pixels
    that are not right do not move prototypes, unless no pixel of their class is right in the step.
    """

    def joined(*parts: Tensor) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    labels_N, assigned_N, nearest_N, right_N = (
        joined(*(getattr(out, name).flatten() for out in outs))
        for name in ("labels", "assignment", "nearest", "right")
    )
    emb_ND = joined(*(out.embedding for out in outs))
    moving_N = assigned_N
    if update_pixels == "correct":
        some_right_C1 = cluster_counts(labels_N, torch.where(right_N, 0, -1), num_classes, 1, emb_ND.dtype)
        some_right_C = some_right_C1[:, 0]
        if all_reduce is not None:
            some_right_C = all_reduce(some_right_C, "sum")
        moving_N = torch.where(right_N | (some_right_C[labels_N.clamp(min=0)] == 0), assigned_N, -1)
    alike_N = torch.where(assigned_N == nearest_N, assigned_N, -1)
    each_4N = torch.stack([moving_N, assigned_N, nearest_N, alike_N])
    *counts, alike_CK = cluster_counts(labels_N, each_4N, num_classes, num_prototypes, emb_ND.dtype)
    totals = [
        cluster_sums(emb_ND, labels_N, moving_N, num_classes, num_prototypes),
        *counts,
        alike_CK.sum(1),
    ]
    if all_reduce is None:
        return tuple(totals)
    every = all_reduce(torch.cat([total.flatten() for total in totals]), "sum")
    parts = every.split([total.numel() for total in totals])
    return tuple(part.view_as(total) for part, total in zip(parts, totals))
