"""The maths of nonparametric prototypes: Sinkhorn, assignment, update, choice of starting points.

N pixels, C classes, K prototypes per class, D channels.
Embeddings and prototypes have unit length along D; half types are promoted to float32, double stays double.
A label (any integer type) of −1 marks a pixel that takes no part.
`all_reduce(tensor, "sum" | "max")` joins the ranks of a distributed run; None means one process. Every
function gives the same result for any split of the pixels over ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from protoseg.core.similarity import MIN_NORM, at_least_single, own_similarities, unit

AllReduce = Callable[[Tensor, str], Tensor]
LOG_DOMAIN_BELOW = 0.03  # exp(−2/κ) nears the end of float32 there


def sinkhorn(
    own_NK: Tensor,
    labels_N: Tensor,
    num_classes: int,
    kappa: float = 0.05,
    iterations: int = 3,
    *,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """Transport plan between each class's pixels and its K prototypes, all classes at once.

    own_NK: similarities iᵀp_yk with the pixel's own class; labels_N: int, −1 takes no part. Solves
    max Tr(LᵀPᵀX) + κH(L) with every pixel giving 1 and every prototype taking N_c/K by
    `iterations` rounds of prototype marginal, then pixel marginal; with logarithms below κ = 0.03.
    Returns plan_NK, rows summing to 1, zero rows where the label is −1. No gradient passes.
    """
    own_NK, labels_N = at_least_single(own_NK.detach()), labels_N.long()
    if kappa < LOG_DOMAIN_BELOW:
        return _sinkhorn_log(own_NK, labels_N, num_classes, kappa, iterations, all_reduce)
    taking_part_N = labels_N >= 0
    class_N = labels_N.clamp(min=0)
    # The constant shift is the same for all pixels, classes and ranks; cosines are at most 1.
    kernel_NK = torch.where(taking_part_N[:, None], ((own_NK - 1) / kappa).exp(), 0)
    plan_NK = kernel_NK
    for _ in range(iterations):
        taken_CK = _reduced(
            plan_NK.new_zeros(num_classes, own_NK.shape[1]).index_add_(0, class_N, plan_NK), all_reduce
        )
        # The share N_c/K is left out: it is the same for all k, and the pixel marginal cancels it.
        plan_NK = plan_NK * _inverse(taken_CK)[class_N]
        plan_NK = plan_NK * _inverse(plan_NK.sum(1, keepdim=True))
    return plan_NK


def _inverse(x: Tensor) -> Tensor:
    """1 / x, 0 where that is not finite."""
    return x.reciprocal().nan_to_num(float("nan"), posinf=0)


def _sinkhorn_log(
    own_NK: Tensor,
    labels_N: Tensor,
    num_classes: int,
    kappa: float,
    iterations: int,
    all_reduce: AllReduce | None,
) -> Tensor:
    """The same with logarithms: for any κ, and slower."""
    taking_part_N1 = (labels_N >= 0)[:, None]
    class_N = labels_N.clamp(min=0)
    lowest = torch.finfo(own_NK.dtype).min
    shape_CK = (num_classes, own_NK.shape[1])
    index_NK = class_N[:, None].expand_as(own_NK)
    log_NK = own_NK / kappa
    for _ in range(iterations):
        masked_NK = log_NK.masked_fill(~taking_part_N1, lowest)
        top_CK = log_NK.new_full(shape_CK, lowest).scatter_reduce(0, index_NK, masked_NK, "amax")
        top_CK = top_CK if all_reduce is None else all_reduce(top_CK, "max")
        part_NK = torch.where(taking_part_N1, (log_NK - top_CK[class_N]).exp(), 0)
        sum_CK = _reduced(part_NK.new_zeros(shape_CK).index_add_(0, class_N, part_NK), all_reduce)
        log_NK = log_NK - (top_CK + sum_CK.clamp(min=torch.finfo(sum_CK.dtype).tiny).log())[class_N]
        log_NK = log_NK.masked_fill(~taking_part_N1, 0)
        log_NK = log_NK - log_NK.logsumexp(1, keepdim=True)
    return torch.where(taking_part_N1, log_NK.exp(), 0)


def assign(plan_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Each pixel's prototype, int64 (N,): argmax over k of the plan, −1 where the label is −1."""
    return torch.where(labels_N >= 0, plan_NK.argmax(1), -1)


def cluster_counts(
    labels_N: Tensor, assignment_XN: Tensor, num_classes: int, num_prototypes: int, dtype: torch.dtype
) -> Tensor:
    """Number (…, C, K) of pixels assigned to each prototype by assignments (…, N), on this rank alone."""
    row_XN = _rows(labels_N, assignment_XN, num_classes, num_prototypes)
    row_XN = row_XN.view(assignment_XN.shape[:-1].numel(), len(labels_N))
    rows = num_classes * num_prototypes + 1
    row_Y = (row_XN + rows * torch.arange(len(row_XN), device=row_XN.device)[:, None]).flatten()
    ones_Y = torch.ones_like(row_Y, dtype=dtype)
    counts_XR = ones_Y.new_zeros(len(row_XN) * rows).index_add_(0, row_Y, ones_Y)
    return counts_XR.view(-1, rows)[:, :-1].reshape(*assignment_XN.shape[:-1], num_classes, num_prototypes)


def cluster_sums(
    emb_ND: Tensor, labels_N: Tensor, assignment_N: Tensor, num_classes: int, num_prototypes: int
) -> Tensor:
    """Sum (C, K, D) of the embeddings assigned to each prototype, on this rank alone."""
    emb_ND = at_least_single(emb_ND.detach())
    row_N = _rows(labels_N, assignment_N, num_classes, num_prototypes)
    sums_RD = emb_ND.new_zeros(num_classes * num_prototypes + 1, emb_ND.shape[1])
    return sums_RD.index_add_(0, row_N, emb_ND)[:-1].view(num_classes, num_prototypes, -1)


def _rows(labels_N: Tensor, assignment_N: Tensor, num_classes: int, num_prototypes: int) -> Tensor:
    """c·K + k, and the row after the last for pixels that take no part."""
    counted_N = (labels_N >= 0) & (assignment_N >= 0)
    row_N = labels_N.long() * num_prototypes + assignment_N
    return torch.where(counted_N, row_N, num_classes * num_prototypes)


def cluster_means(
    emb_ND: Tensor,
    labels_N: Tensor,
    assignment_N: Tensor,
    num_classes: int,
    num_prototypes: int,
    all_reduce: AllReduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean (C, K, D), not normalised, and number (C, K) of the embeddings assigned to each prototype.

    labels_N, assignment_N: int64, −1 takes no part. Mean 0 where there is no pixel. No gradient passes.
    """
    sums_CKD = cluster_sums(emb_ND, labels_N, assignment_N, num_classes, num_prototypes)
    counts_CK = cluster_counts(labels_N, assignment_N, num_classes, num_prototypes, sums_CKD.dtype)
    counts_CK = _reduced(counts_CK, all_reduce)
    return divided(_reduced(sums_CKD, all_reduce), counts_CK), counts_CK


def divided(sums_CKD: Tensor, counts_CK: Tensor) -> Tensor:
    """Means from sums and counts; 0 where the count is 0."""
    return sums_CKD / counts_CK.clamp(min=1)[..., None]


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


def log_prior(pixel_counts_C: Tensor, live_C: Tensor) -> Tensor:
    """log π_c (C,), π_c the class's share of the pixels seen of live classes, one pixel added to each.

    0 for classes that are not live.
    """
    counts_C = torch.where(live_C, pixel_counts_C + 1, 0)
    return torch.where(live_C, counts_C / counts_C.sum().clamp(min=1), 1).log()


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
    return top_C if all_reduce is None else all_reduce(top_C, "max")


def _is_class_max(
    values_N: Tensor, taking_part_N: Tensor, class_N: Tensor, num_classes: int, all_reduce: AllReduce | None
) -> Tensor:
    """Whether a pixel has the largest value of those of its class that take part."""
    top_C = _class_max(values_N, taking_part_N, class_N, num_classes, all_reduce)
    return taking_part_N & (values_N == top_C[class_N])


def _reduced(tensor: Tensor, all_reduce: AllReduce | None) -> Tensor:
    return tensor if all_reduce is None else all_reduce(tensor, "sum")
