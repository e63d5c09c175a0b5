"""Where prototypes start, and where dead ones are placed anew.

Legend and conventions as in `clustering`. Every function gives the same result for any split of the pixels
over ranks.
"""

import torch
from torch import Tensor

from protoseg.core.clustering import assign, cluster_means, sinkhorn
from protoseg.core.ranks import AllReduce, reduced
from protoseg.core.similarity import MIN_NORM, at_least_single, own_similarities, unit
from protoseg.core.update import momentum_update


def spread_prototypes(
    emb_ND: Tensor,
    labels_N: Tensor,
    protos_CKD: Tensor,
    wanted_CK: Tensor,
    all_reduce: AllReduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Place the prototypes of `wanted_CK` (bool) on their classes' worst-fitted pixels, one after the other.

    Farthest-point choice, all classes at once: prototype k goes to the pixel of its class whose best cosine
    with the prototypes that stand already is lowest, the first of a class to the pixel nearest its class's
    mean. Where a pixel is chosen twice (fewer pixels than K), a little of the prototype's old direction
    tells the two apart; a pixel without direction leaves the prototype where it is. Loops over K. Returns
    (protos_CKD, placed_CK); nothing is placed for classes without a pixel on any rank.
    """
    emb_ND = at_least_single(emb_ND.detach())
    num_classes, num_prototypes, dim = protos_CKD.shape
    class_N = labels_N.clamp(min=0).long()
    taking_part_N = labels_N >= 0
    mean_CD, count_C = _class_means(emb_ND, labels_N, num_classes, all_reduce)
    placed_CK = wanted_CK & (count_C > 0)[:, None]
    protos_CKD = protos_CKD.to(emb_ND.dtype, copy=True)
    stands_C = torch.zeros(num_classes, dtype=torch.bool, device=emb_ND.device)
    best_N = emb_ND.new_full(emb_ND.shape[:1], -2.0)
    for k in range(num_prototypes):
        stays_C = ~wanted_CK[:, k]
        cosine_N = (emb_ND * protos_CKD[:, k][class_N]).sum(1)
        best_N = torch.where(stays_C[class_N], best_N.maximum(cosine_N), best_N)
        stands_C = stands_C | stays_C
    to_mean_N = (emb_ND * mean_CD[class_N]).sum(1)
    # Exact ties are broken by what the pixels are, not by where they are: the order differs between ranks.
    tie_N = (emb_ND * torch.linspace(1, 2, dim, dtype=emb_ND.dtype, device=emb_ND.device).sin()).sum(1)
    for k in range(num_prototypes):
        key_N = torch.where(stands_C[class_N], -best_N, to_mean_N)
        chosen_N = _is_class_max(key_N, taking_part_N, class_N, num_classes, all_reduce)
        chosen_N = _is_class_max(tie_N, chosen_N, class_N, num_classes, all_reduce)
        point_CD, _ = _class_means(emb_ND, torch.where(chosen_N, class_N, -1), num_classes, all_reduce)
        again_C1 = (_class_max(best_N, chosen_N, class_N, num_classes, all_reduce) > 1 - 1e-6)[:, None]
        again_C1 |= point_CD.norm(dim=1, keepdim=True) < MIN_NORM
        point_CD = unit(torch.where(again_C1, point_CD + 0.1 * protos_CKD[:, k], point_CD))
        protos_CKD[:, k] = torch.where(placed_CK[:, k, None], point_CD, protos_CKD[:, k])
        cosine_N = (emb_ND * point_CD[class_N]).sum(1)
        best_N = torch.where(placed_CK[:, k][class_N], best_N.maximum(cosine_N), best_N)
        stands_C = stands_C | placed_CK[:, k]
    return protos_CKD, placed_CK


def start_prototypes(
    emb_ND: Tensor,
    labels_N: Tensor,
    protos_CKD: Tensor,
    wanted_CK: Tensor,
    kappa: float = 0.05,
    iterations: int = 3,
    all_reduce: AllReduce | None = None,
) -> tuple[Tensor, Tensor]:
    """`spread_prototypes`, then three rounds of clustering that move what was placed to means.

    The rounds matter where a few pixels are outliers, which farthest-point choice finds first. Only what is
    in `wanted_CK` moves. Returns (protos_CKD, placed_CK).
    """
    num_classes, num_prototypes, _ = protos_CKD.shape
    protos_CKD, placed_CK = spread_prototypes(emb_ND, labels_N, protos_CKD, wanted_CK, all_reduce)
    for _ in range(3):
        own_NK = own_similarities(emb_ND, protos_CKD, labels_N)
        plan_NK = sinkhorn(own_NK, labels_N, num_classes, kappa, iterations, all_reduce=all_reduce)
        means_CKD, counts_CK = cluster_means(
            emb_ND, labels_N, assign(plan_NK, labels_N), num_classes, num_prototypes, all_reduce
        )
        protos_CKD = momentum_update(protos_CKD, means_CKD, counts_CK * placed_CK, 0.0)
    return protos_CKD, placed_CK


def _class_means(
    emb_ND: Tensor, labels_N: Tensor, num_classes: int, all_reduce: AllReduce | None
) -> tuple[Tensor, Tensor]:
    """Mean embedding (C, D) and number (C,) of each class's pixels over all ranks."""
    means_C1D, counts_C1 = cluster_means(emb_ND, labels_N, labels_N.clamp(max=0), num_classes, 1, all_reduce)
    return means_C1D[:, 0], counts_C1[:, 0]


def _class_max(
    values_N: Tensor, taking_part_N: Tensor, class_N: Tensor, num_classes: int, all_reduce: AllReduce | None
) -> Tensor:
    """Largest value (C,) of the pixels that take part, per class and over all ranks."""
    lowest = torch.finfo(values_N.dtype).min
    top_C = values_N.new_full((num_classes,), lowest)
    top_C = top_C.scatter_reduce(0, class_N, values_N.masked_fill(~taking_part_N, lowest), "amax")
    return reduced(top_C, all_reduce, "max")


def _is_class_max(
    values_N: Tensor, taking_part_N: Tensor, class_N: Tensor, num_classes: int, all_reduce: AllReduce | None
) -> Tensor:
    """Whether a pixel has the largest value of those of its class that take part."""
    top_C = _class_max(values_N, taking_part_N, class_N, num_classes, all_reduce)
    return taking_part_N & (values_N == top_C[class_N])
