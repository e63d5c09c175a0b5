"""The method in plain torch, one class at a time: read this first. The oracle of the fast code.

Zhou et al., "Rethinking Semantic Segmentation: A Prototype View" (ProtoSeg, CVPR 2022). A prototype p_ck is a
unit vector, a pixel i the unit vector that the network gives it; K prototypes for each of C classes. Nothing
here is learned: the network is trained so that pixels come near to the prototypes, and prototypes follow.

emb (N, D), protos (C, K, D), labels (N,) in 0 … C−1, or −1 where a pixel takes no part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(emb: Tensor, protos: Tensor) -> Tensor:
    """s(i, c) = max_k ⟨i, p_ck⟩: how near the nearest prototype of each class is (N, C)."""
    return torch.stack([(emb @ protos_c.T).max(dim=1).values for protos_c in protos], dim=1)


def logits(emb: Tensor, protos: Tensor, scale: float = 20.0, counts: Tensor | None = None) -> Tensor:
    """scale · s(i, c) + log π_c (N, C); the predicted class is the largest.

    π_c, the prior (ours; not in the paper): the class's share of the pixels seen so far, counts (C,), one
    added to each. None: no prior.
    """
    prior = 0 if counts is None else ((counts + 1) / (counts + 1).sum()).log()
    return scale * scores(emb, protos) + prior


def sinkhorn(own: Tensor, kappa: float = 0.05, iterations: int = 3) -> Tensor:
    """Online clustering of one class's pixels: the plan L (n, K) from own = ⟨i, p_k⟩.

    Each pixel gives 1 in all, each prototype takes n/K: all prototypes are used alike. exp(own / κ), rows and
    columns scaled in turns.
    """
    plan = (own.double() / kappa).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(dim=0, keepdim=True) * (len(plan) / plan.shape[1])
        plan = plan / plan.sum(dim=1, keepdim=True)
    return plan


def assign(emb: Tensor, labels: Tensor, protos: Tensor, kappa: float = 0.05, iterations: int = 3) -> Tensor:
    """Each pixel's prototype within its own class (N,): argmax over k of the plan; −1 without a label."""
    assignment = torch.full_like(labels, -1)
    for c, protos_c in enumerate(protos):
        mine = labels == c
        if mine.any():
            with torch.no_grad():
                assignment[mine] = sinkhorn(emb[mine] @ protos_c.T, kappa, iterations).argmax(dim=1)
    return assignment


def ppc(emb: Tensor, labels: Tensor, assignment: Tensor, protos: Tensor, temperature: float = 0.1) -> Tensor:
    """Pixel-prototype contrast (Eq. 11): the assigned prototype against all others; mean over pixels."""
    taking_part = labels >= 0
    similarities = emb[taking_part] @ protos.flatten(0, 1).T / temperature
    return F.cross_entropy(similarities, (labels * protos.shape[1] + assignment)[taking_part])


def ppd(emb: Tensor, labels: Tensor, assignment: Tensor, protos: Tensor) -> Tensor:
    """Pixel-prototype distance (Eq. 12): (1 − ⟨i, p⁺⟩)² to the assigned prototype; mean over pixels."""
    taking_part = labels >= 0
    positive = (emb * protos[labels, assignment]).sum(dim=1)[taking_part]
    return (1 - positive).square().mean()


def moving(emb: Tensor, labels: Tensor, protos: Tensor) -> Tensor:
    """Which pixels move prototypes (N,) bool: those nearest to a prototype of their own class.

    All pixels of a class of which none is. (The published code also takes the rightly classified ones; with
    all of them prototypes are dragged to where other classes are.)
    """
    right = scores(emb, protos).argmax(dim=1) == labels
    for c in labels[labels >= 0].unique():
        if not right[labels == c].any():
            right = right | (labels == c)
    return right


def count(counts: Tensor, labels: Tensor) -> Tensor:
    """n_c ← 0.999·n_c + the class's pixels in this step: what the prior of the next step is made of (C,)."""
    return 0.999 * counts + torch.bincount(labels[labels >= 0], minlength=len(counts))


def update(
    protos: Tensor, emb: Tensor, labels: Tensor, assignment: Tensor, moves: Tensor, momentum: float
) -> Tensor:
    """p ← l2norm(μ·p + (1 − μ)·l2norm(mean of its pixels)) for each prototype that has pixels."""
    new = protos.clone()
    for c in range(protos.shape[0]):
        for k in range(protos.shape[1]):
            mine = (labels == c) & (assignment == k) & moves
            if not mine.any():
                continue
            mean = emb[mine].mean(dim=0)
            if mean.norm() >= 1e-6:
                new[c, k] = F.normalize(
                    momentum * protos[c, k] + (1 - momentum) * F.normalize(mean, dim=0), dim=0
                )
    return new


def step(
    emb: Tensor,
    labels: Tensor,
    protos: Tensor,
    counts: Tensor | None = None,
    *,
    scale: float = 20.0,
    temperature: float = 0.1,
    weights: tuple[float, float] = (0.01, 0.01),
    momentum: float = 0.99,
) -> tuple[Tensor, Tensor]:
    """One training step of the head: the loss, CE + λ1·PPC + λ2·PPD, and the prototypes after it."""
    assignment = assign(emb, labels, protos)
    loss = F.cross_entropy(logits(emb, protos, scale, counts), labels, ignore_index=-1)
    loss = loss + weights[0] * ppc(emb, labels, assignment, protos, temperature)
    loss = loss + weights[1] * ppd(emb, labels, assignment, protos)
    with torch.no_grad():
        return loss, update(protos, emb, labels, assignment, moving(emb, labels, protos), momentum)
