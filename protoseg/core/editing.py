"""Changing the classes and prototypes of a trained `PrototypeHead` (`head` below) without a gradient step.

C classes, K prototypes per class, D channels, N pixels. Class ids stay 0…C−1: those above a removed one
move down by one. Buffers (and the 2·C numbers of `score_norm: layer_norm`) are replaced by ones of another
size, so make the optimiser afterwards. With `all_reduce` every rank must make the same call: random
directions are drawn from the same seed on all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from protoseg.core.clustering import divided
from protoseg.core.ranks import reduced
from protoseg.core.similarity import unit
from protoseg.core.start import start_prototypes
from protoseg.core.update import momentum_update, step_sums

SPLIT_NOISE = 0.1  # length of the noise that tells a split prototype from the one it came from
UNSEEN = 1e6  # pixels of a class whose pixels were never counted
# The head's buffers, all with one row per class, and those of them with one number per prototype.
BUFFERS = ("prototypes", "initialized", "pixel_counts", "usage", "nearest_usage", "agreeing", "movement")
PER_PROTOTYPE = ("usage", "nearest_usage", "movement")


@torch.no_grad()
def add_class(head: Any, features: Tensor, labels: Tensor, share: float | None = None) -> int:
    """Add a class from labelled pixels, and return its id C.

    features (B, D, h, w). labels (B, h, w): a bool mask of its pixels, or integers, of which those
    equal to C are its pixels. share: of all pixels, for the class prior, below 1; the other classes' shares
    shrink alike. Default: that of its pixels among the labelled ones, or an equal one where nothing else is
    labelled. Errors: ValueError if there is no such pixel, or C is the ignore index.
    """
    new_id = head.num_classes
    if new_id == head.ignore_index:
        raise ValueError(f"add_class: the new class would be {new_id}, which is the ignore index")
    mine = labels if labels.dtype == torch.bool else labels == new_id
    labelled = torch.ones_like(mine)
    if labels.dtype != torch.bool:
        labelled = (labels >= 0) & (labels != head.ignore_index)
    if share is not None and not 0 < share < 1:
        raise ValueError(f"add_class: share must be above 0 and below 1, got {share}")
    emb_ND = head.unit_rows(features)
    wanted_1K = torch.ones(1, head.num_prototypes, dtype=torch.bool, device=emb_ND.device)
    fresh_1KD = _random(head, 1, head.num_prototypes)
    protos_1KD, placed_1K = head.start(emb_ND, torch.where(mine.reshape(-1), 0, -1), fresh_1KD, wanted_1K)
    if not placed_1K.any():
        raise ValueError(f"add_class: no pixel is labelled as the new class {new_id}")
    counts_2 = torch.stack([mine.sum(), labelled.sum()]).double()
    counts_2 = reduced(counts_2, head.all_reduce)
    _replace(head, lambda old: torch.cat([old, torch.zeros_like(old[:1])]))
    head.prototypes[-1:] = protos_1KD.to(head.prototypes)
    head.initialized[-1] = True
    share_C = torch.zeros_like(head.pixel_counts, dtype=torch.double)
    share_C[-1] = counts_2[0] / counts_2[1] if share is None else share
    _give_shares(head, share_C)
    _resize_norm(head, torch.arange(new_id, device=emb_ND.device), 1)
    return new_id


@torch.no_grad()
def remove_class(head: Any, class_id: int) -> None:
    """Forget a class; ids above it move down by one. Errors: ValueError for no such id, or the last."""
    _check_class(head, class_id, "remove_class")
    if head.num_classes == 1:
        raise ValueError("remove_class: a head needs at least one class")
    keep = torch.arange(head.num_classes, device=head.prototypes.device)
    keep = keep[keep != class_id]
    _replace(head, lambda old: old[keep])
    _resize_norm(head, keep, 0)


@torch.no_grad()
def merge_classes(head: Any, into: int, other: int) -> None:
    """Make one class of two, with K prototypes that represent both sets; `other` is removed."""
    _check_class(head, into, "merge_classes")
    _check_class(head, other, "merge_classes")
    if into == other:
        raise ValueError(f"merge_classes: {into} and {other} are the same class")
    live = [c for c in (into, other) if head.initialized[c]]
    if len(live) == 2:
        points_ND = head.prototypes[live].flatten(0, 1)
        head.prototypes[into] = _clustered(head, points_ND, torch.zeros_like(points_ND[:, 0]).long(), 1)[0]
    elif live:
        head.prototypes[into] = head.prototypes[live[0]]
    head.initialized[into] = bool(live)
    head.pixel_counts[into] += head.pixel_counts[other]
    for name in (*PER_PROTOTYPE, "agreeing"):
        getattr(head, name)[into] = 0
    remove_class(head, other)


@torch.no_grad()
def set_num_prototypes(
    head: Any, num_prototypes: int, features: Tensor | None = None, labels: Tensor | None = None
) -> None:
    """Change K. Classes with pixels in (features, labels) are clustered anew from them.

    The others keep what they have: fewer are chosen among the old ones as if these were pixels, more
    are made by splitting the most used ones with a little noise. features (B, D, h, w), labels (B, h,
    w). Errors: ValueError for less than 1.
    """
    if num_prototypes < 1:
        raise ValueError(f"set_num_prototypes: at least 1, got {num_prototypes}")
    num_classes, old_K, _ = head.prototypes.shape
    protos_CKD = head.prototypes
    if num_prototypes > old_K:
        order_CK = head.usage.argsort(dim=1, descending=True, stable=True)
        index_CJ = order_CK[:, torch.arange(num_prototypes - old_K, device=order_CK.device) % old_K]
        parents_CJD = protos_CKD.gather(1, index_CJ[..., None].expand(-1, -1, head.dim))
        noise_CJD = _random(head, num_classes, num_prototypes - old_K)
        protos_CKD = torch.cat([protos_CKD, unit(parents_CJD + SPLIT_NOISE * noise_CJD)], 1)
    elif num_prototypes < old_K:
        labels_N = torch.arange(num_classes, device=protos_CKD.device).repeat_interleave(old_K)
        protos_CKD = _clustered(
            head, protos_CKD.flatten(0, 1), labels_N, num_classes, protos_CKD[:, :num_prototypes]
        )
    if features is not None and labels is not None:
        labels_N = head.valid_labels(features, labels, only_initialized=False)
        wanted_CK = torch.ones_like(protos_CKD[..., 0], dtype=torch.bool)
        protos_CKD, placed_CK = head.start(head.unit_rows(features), labels_N, protos_CKD, wanted_CK)
        started_C = placed_CK.any(1) & ~head.initialized
        head.initialized |= started_C
        _give_shares(head, _label_shares(head, [labels_N]) * started_C)
    head.prototypes = protos_CKD.to(head.prototypes.dtype).contiguous()
    head.agreeing.zero_()
    for name in PER_PROTOTYPE:
        setattr(head, name, getattr(head, name).new_zeros(num_classes, num_prototypes))


@torch.no_grad()
def refit(head: Any, batches: Iterable[tuple[Tensor, Tensor]], rounds: int = 3) -> None:
    """Move all prototypes to the means of their pixels in (features, labels) batches, from where they stand.

    features (B, D, h, w), labels (B, h, w) at the same resolution. `batches` is gone through 1 + rounds
    times (a list or loader, not a generator): once to start classes that have no prototypes, then each round
    moves every prototype to the mean of the pixels that are nearest to it; of which pixels, says
    `update_pixels`, as in training, a round being one step. A prototype without a pixel stays. Classes that
    are started get their share of the labels, for the prior. To cluster anew, set `initialized` to False
    first. Errors: ValueError for a generator, and for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"refit: at least 1 round, got {rounds}")
    if iter(batches) is batches:
        raise ValueError("refit: goes through the batches several times; give a list or a loader")
    before_C, seen = head.initialized.clone(), []
    for features, labels in batches:
        head.prepare_(features, labels)
        seen.append(head.valid_labels(features, labels, only_initialized=False))
    _give_shares(head, _label_shares(head, seen) * (head.initialized & ~before_C))
    for _ in range(rounds):
        (all_CKD, all_CK), (right_CKD, right_CK) = [
            (torch.zeros_like(head.prototypes), torch.zeros_like(head.usage)) for _ in range(2)
        ]
        for features, labels in batches:
            out = head.training_step(features, labels)
            labelled = out.labels >= 0
            for moving, sums_CKD, counts_CK in (
                (labelled, all_CKD, all_CK),
                (labelled & out.right, right_CKD, right_CK),
            ):
                chosen = replace(out, assignment=torch.where(moving, out.nearest, -1))
                size = (head.num_classes, head.num_prototypes)
                sums, counts, *_ = step_sums([chosen], *size, "all", head.all_reduce)
                sums_CKD += sums
                counts_CK += counts
        if head.settings.update_pixels == "correct":
            some_right_C1 = right_CK.sum(1, keepdim=True) > 0
            sums_CKD = torch.where(some_right_C1[..., None], right_CKD, all_CKD)
            counts_CK = torch.where(some_right_C1, right_CK, all_CK)
        else:
            sums_CKD, counts_CK = all_CKD, all_CK
        means_CKD = divided(sums_CKD, counts_CK)
        head.prototypes.copy_(momentum_update(head.prototypes, means_CKD, counts_CK, momentum=0.0))
    shown_C = all_CK.sum(1) > 0
    for name, value in (
        ("usage", all_CK),
        ("nearest_usage", all_CK),
        ("agreeing", all_CK.sum(1)),
        ("movement", torch.zeros_like(all_CK)),
    ):
        getattr(head, name)[shown_C] = value[shown_C]


@torch.no_grad()
def resize_(head: Any, num_classes: int) -> None:
    """Room for `num_classes` classes, none of which has prototypes: to load an edited state into."""
    _replace(head, lambda old: old.new_zeros(num_classes, *old.shape[1:]))
    _resize_norm(head, torch.arange(0, device=head.prototypes.device), num_classes)


def _label_shares(head: Any, labels: Sequence[Tensor]) -> Tensor:
    """Each class's share of the labelled pixels (C,), double, from labels (N,) with −1 for the others."""
    known_N = torch.cat([each[each >= 0] for each in labels])
    counts_C = reduced(torch.bincount(known_N, minlength=head.num_classes).double(), head.all_reduce)
    return counts_C / counts_C.sum().clamp(min=1)


def _give_shares(head: Any, share_C: Tensor) -> None:
    """Pixel counts for classes that have just got prototypes: those whose share (C,) is above 0.

    The shares of the other live ones shrink alike. Where the new ones would have everything, because nothing
    else was labelled, each gets an equal share.
    """
    new_C = share_C > 0
    old_C = head.initialized & ~new_C
    if not new_C.any():
        return
    if old_C.any() and share_C.sum() > 1 - 1e-9:
        share_C = new_C / head.initialized.sum()
    counts_C = head.pixel_counts
    if not counts_C[old_C].any():  # never trained: alike, and many beside the one that the prior adds
        counts_C[old_C] = UNSEEN
    scale = counts_C[old_C].double().sum() / (1 - share_C.sum()) if old_C.any() else UNSEEN
    counts_C[new_C] = (share_C * scale)[new_C].to(counts_C.dtype)


def _random(head: Any, num_classes: int, num_prototypes: int) -> Tensor:
    """Random unit vectors (num_classes, num_prototypes, D), the same on every rank."""
    generator = torch.Generator().manual_seed(head.num_classes)
    return unit(torch.randn(num_classes, num_prototypes, head.dim, generator=generator)).to(head.prototypes)


def _clustered(
    head: Any, points_ND: Tensor, labels_N: Tensor, num_classes: int, old_CKD: Tensor | None = None
) -> Tensor:
    """Prototypes (num_classes, K, D) from vectors that every rank holds alike: nothing to join."""
    old_CKD = _random(head, num_classes, head.num_prototypes) if old_CKD is None else old_CKD
    wanted_CK = torch.ones(old_CKD.shape[:2], dtype=torch.bool, device=points_ND.device)
    kappa, rounds = head.settings.kappa, head.settings.sinkhorn_iterations
    return start_prototypes(points_ND, labels_N, old_CKD, wanted_CK, kappa, rounds)[0]


def _replace(head: Any, change: Callable[[Tensor], Tensor]) -> None:
    for name in BUFFERS:
        setattr(head, name, change(getattr(head, name)).contiguous())


def _resize_norm(head: Any, keep: Tensor, added: int) -> None:
    """LayerNorm's numbers for the classes `keep`, then `added` new ones."""
    for name, value in (("norm_weight", 1.0), ("norm_bias", 0.0)):
        if hasattr(head, name):
            kept = getattr(head, name).detach()[keep]
            setattr(head, name, nn.Parameter(torch.cat([kept, kept.new_full((added,), value)])))


def _check_class(head: Any, class_id: int, where: str) -> None:
    if not 0 <= class_id < head.num_classes:
        raise ValueError(f"{where}: no class {class_id}, ids are 0 to {head.num_classes - 1}")
