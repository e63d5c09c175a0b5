"""What moves prototypes: which pixels of a step move which of them, and how far.

B images, C classes, K prototypes per class, D channels, (h, w) pixels, N = B·h·w pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from protoseg.core.clustering import cluster_counts, cluster_sums
from protoseg.core.ranks import AllReduce, reduced
from protoseg.core.similarity import MIN_NORM, at_least_single


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
        some_right_C = reduced(some_right_C1[:, 0], all_reduce)
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


def momentum_update(protos_CKD: Tensor, means_CKD: Tensor, counts_CK: Tensor, momentum: float) -> Tensor:
    """p ← l2norm(μ·p + (1−μ)·l2norm(mean)) where a prototype has pixels, p itself elsewhere.

    A mean, or a result, shorter than 1e-6 has no direction: p stays, bit for bit. Returns (C, K, D).
    """
    protos_CKD, means_CKD = at_least_single(protos_CKD), at_least_single(means_CKD)
    norm_CK1 = means_CKD.norm(dim=-1, keepdim=True)
    moved_CKD = momentum * protos_CKD + (1 - momentum) * means_CKD / norm_CK1.clamp(min=MIN_NORM)
    length_CK1 = moved_CKD.norm(dim=-1, keepdim=True)
    moves_CK1 = (counts_CK[..., None] > 0) & (norm_CK1 >= MIN_NORM) & (length_CK1 >= MIN_NORM)
    return torch.where(moves_CK1, moved_CKD / length_CK1.clamp(min=MIN_NORM), protos_CKD)


def auto_momentum(iterations: int) -> float:
    """μ for a run of so many steps: ten time constants, but not below 0.99 or above 0.999, the paper's."""
    return min(0.999, max(0.99, 1 - 10 / max(iterations, 1)))
