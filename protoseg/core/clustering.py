"""Online clustering: Sinkhorn, assignment, and what is summed over the pixels of each prototype.

N pixels, C classes, K prototypes per class, D channels.
Embeddings and prototypes have unit length along D; half types are promoted to float32, double stays double.
A label (any integer type) of −1 marks a pixel that takes no part.
`all_reduce(tensor, "sum" | "max")` joins the ranks of a distributed run; None means one process. Every
function gives the same result for any split of the pixels over ranks.
"""

import torch
from torch import Tensor

from protoseg.core.ranks import AllReduce, reduced
from protoseg.core.similarity import at_least_single

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
        taken_CK = reduced(
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
        top_CK = reduced(top_CK, all_reduce, "max")
        part_NK = torch.where(taking_part_N1, (log_NK - top_CK[class_N]).exp(), 0)
        sum_CK = reduced(part_NK.new_zeros(shape_CK).index_add_(0, class_N, part_NK), all_reduce)
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
    counts_CK = reduced(counts_CK, all_reduce)
    return divided(reduced(sums_CKD, all_reduce), counts_CK), counts_CK


def divided(sums_CKD: Tensor, counts_CK: Tensor) -> Tensor:
    """Means from sums and counts; 0 where the count is 0."""
    return sums_CKD / counts_CK.clamp(min=1)[..., None]
