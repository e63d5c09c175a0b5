"""Changing the classes and prototypes of a trained head without a gradient step.

C classes, K prototypes per class, D channels, N pixels. Class ids stay 0…C−1: those above a removed one
move down by one. Buffers (and the 2·C numbers of `score_norm: layer_norm`) are replaced by ones of another
size, so make the optimiser afterwards. With `all_reduce` every rank must make the same call: random
directions are drawn from the same seed on all of them.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from protoseg.core.clustering import (
    AllReduce,
    assign,
    cluster_counts,
    cluster_sums,
    divided,
    momentum_update,
    sinkhorn,
    start_prototypes,
)
from protoseg.core.similarity import own_similarities, unit

SPLIT_NOISE = 0.1  # length of the noise that tells a split prototype from the one it came from


class Editing(nn.Module):
    """The editing methods of `PrototypeHead`, which owns the state they change."""

    prototypes: Tensor
    initialized: Tensor
    usage: Tensor
    nearest_usage: Tensor
    idle: Tensor
    movement: Tensor
    dim: int
    ignore_index: int
    kappa: float
    sinkhorn_iterations: int
    all_reduce: AllReduce | None
    unit_rows: Callable[[Tensor], Tensor]
    _valid_labels: Callable[..., Tensor]

    @torch.no_grad()
    def add_class(self, features: Tensor, labels: Tensor) -> int:
        """Add a class from labelled pixels, and return its id C.

        features (B, D, h, w). labels (B, h, w): a bool mask of its pixels, or integers, of which those
        equal to C are its pixels. Errors: ValueError if there is no such pixel, or C is the ignore index.
        """
        num_classes, num_prototypes, _ = self.prototypes.shape
        if num_classes == self.ignore_index:
            raise ValueError(f"add_class: the new class would be {num_classes}, which is the ignore index")
        mine = labels if labels.dtype == torch.bool else labels == num_classes
        emb_ND = self.unit_rows(features)
        labels_N = torch.where(mine.reshape(-1), 0, -1)
        fresh_1KD = self._random(1, num_prototypes).to(emb_ND.dtype)
        wanted_1K = torch.ones(1, num_prototypes, dtype=torch.bool, device=emb_ND.device)
        protos_1KD, placed_1K = self._start(emb_ND, labels_N, fresh_1KD, wanted_1K)
        if not placed_1K.any():
            raise ValueError(f"add_class: no pixel is labelled as the new class {num_classes}")
        grown = [torch.cat([old, torch.zeros_like(old[:1])]) for old in self._counters()]
        protos_CKD = torch.cat([self.prototypes, protos_1KD.to(self.prototypes)])
        live_C = torch.cat([self.initialized, placed_1K[:, 0]])
        self._replace(protos_CKD, live_C, *grown)
        self._resize_norm(torch.arange(num_classes, device=live_C.device), 1)
        return num_classes

    @torch.no_grad()
    def remove_class(self, class_id: int) -> None:
        """Forget a class; ids above it move down by one. Errors: ValueError for no such id, or the last."""
        self._check_class(class_id, "remove_class")
        if len(self.prototypes) == 1:
            raise ValueError("remove_class: a head needs at least one class")
        keep = torch.arange(len(self.prototypes), device=self.prototypes.device)
        keep = keep[keep != class_id]
        self._replace(*(old[keep] for old in self._state()))
        self._resize_norm(keep, 0)

    @torch.no_grad()
    def merge_classes(self, into: int, other: int) -> None:
        """Make one class of two, with K prototypes that represent both sets; `other` is removed."""
        self._check_class(into, "merge_classes")
        self._check_class(other, "merge_classes")
        if into == other:
            raise ValueError(f"merge_classes: {into} and {other} are the same class")
        live = [c for c in (into, other) if self.initialized[c]]
        if live:
            points_ND = self.prototypes[live].flatten(0, 1)
            fresh_1KD = self._random(1, self.prototypes.shape[1])
            labels_N = torch.zeros_like(points_ND[:, 0], dtype=torch.int64)
            # Every rank holds the same prototypes: nothing to join.
            wanted_1K = torch.ones_like(self.idle[:1], dtype=torch.bool)
            merged_1KD, _ = start_prototypes(
                points_ND, labels_N, fresh_1KD, wanted_1K, self.kappa, self.sinkhorn_iterations
            )
            self.prototypes[into] = merged_1KD[0] if len(live) == 2 else self.prototypes[live[0]]
            self.initialized[into] = True
        for counter in self._counters():
            counter[into] = 0
        self.remove_class(other)

    @torch.no_grad()
    def set_num_prototypes(
        self, num_prototypes: int, features: Tensor | None = None, labels: Tensor | None = None
    ) -> None:
        """Change K. Classes with pixels in (features, labels) are clustered anew from them.

        The others keep what they have: fewer are chosen among the old ones as if these were pixels, more
        are made by splitting the most used ones with a little noise. features (B, D, h, w), labels (B, h,
        w).
        """
        if num_prototypes < 1:
            raise ValueError(f"set_num_prototypes: at least 1, got {num_prototypes}")
        num_classes, old_K, _ = self.prototypes.shape
        protos_CKD = self.prototypes
        if num_prototypes > old_K:
            order_CK = self.usage.argsort(dim=1, descending=True, stable=True)
            index_CJ = order_CK[:, torch.arange(num_prototypes - old_K, device=order_CK.device) % old_K]
            parents_CJD = protos_CKD.gather(1, index_CJ[..., None].expand(-1, -1, self.dim))
            noise_CJD = self._random(num_classes, num_prototypes - old_K).to(parents_CJD.dtype)
            children_CJD = unit(parents_CJD + SPLIT_NOISE * noise_CJD)
            protos_CKD = torch.cat([protos_CKD, children_CJD], 1)
        elif num_prototypes < old_K:
            labels_N = torch.arange(num_classes, device=protos_CKD.device).repeat_interleave(old_K)
            wanted_CK = torch.ones_like(self.idle[:, :num_prototypes], dtype=torch.bool)
            protos_CKD, _ = start_prototypes(
                protos_CKD.flatten(0, 1),
                labels_N,
                protos_CKD[:, :num_prototypes].clone(),
                wanted_CK,
                self.kappa,
                self.sinkhorn_iterations,
            )
        live_C = self.initialized
        if features is not None and labels is not None:
            labels_N = self._valid_labels(features, labels, only_initialized=False)
            wanted_CK = torch.ones_like(protos_CKD[..., 0], dtype=torch.bool)
            protos_CKD, placed_CK = self._start(self.unit_rows(features), labels_N, protos_CKD, wanted_CK)
            live_C = live_C | placed_CK.any(1)
        zeros = [old.new_zeros(num_classes, num_prototypes) for old in self._counters()]
        self._replace(protos_CKD.to(self.prototypes.dtype), live_C, *zeros)

    @torch.no_grad()
    def refit(self, batches: Iterable[tuple[Tensor, Tensor]], rounds: int = 3) -> None:
        """Cluster all classes anew from (features, labels) batches; classes without a pixel stay as they are.

        features (B, D, h, w), labels (B, h, w) at the same resolution. `batches` is gone through 1 + rounds
        times (a list or loader, not a generator): once to start each class from the first batch that shows
        it, then each round moves every prototype to the mean of its pixels in all batches. Errors: ValueError
        for a generator.
        """
        if iter(batches) is batches:
            raise ValueError("refit: goes through the batches several times; give a list or a loader")
        num_classes, num_prototypes, _ = self.prototypes.shape
        fresh_C = torch.ones_like(self.initialized)
        for features, labels in batches:
            labels_N = self._valid_labels(features, labels, only_initialized=False)
            wanted_CK = fresh_C[:, None].expand(-1, num_prototypes)
            protos_CKD, placed_CK = self._start(
                self.unit_rows(features), labels_N, self.prototypes, wanted_CK
            )
            self.prototypes.copy_(protos_CKD)
            fresh_C &= ~placed_CK.any(1)
        self.initialized |= ~fresh_C
        counts_CK = torch.zeros_like(self.usage)
        for _ in range(rounds):
            sums_CKD = torch.zeros_like(self.prototypes)
            counts_CK = torch.zeros_like(self.usage)
            for features, labels in batches:
                emb_ND, labels_N = self.unit_rows(features), self._valid_labels(features, labels)
                own_NK = own_similarities(emb_ND, self.prototypes.to(emb_ND.dtype), labels_N)
                plan_NK = sinkhorn(
                    own_NK,
                    labels_N,
                    num_classes,
                    self.kappa,
                    self.sinkhorn_iterations,
                    all_reduce=self.all_reduce,
                )
                assignment_N = assign(plan_NK, labels_N)
                sizes = (num_classes, num_prototypes)
                sums_CKD += cluster_sums(emb_ND, labels_N, assignment_N, *sizes)
                counts_CK += cluster_counts(labels_N, assignment_N, *sizes, counts_CK.dtype)
            if self.all_reduce is not None:
                sums_CKD, counts_CK = self.all_reduce(sums_CKD, "sum"), self.all_reduce(counts_CK, "sum")
            self.prototypes.copy_(
                momentum_update(self.prototypes, divided(sums_CKD, counts_CK), counts_CK, momentum=0.0)
            )
        for counter in self._counters():
            counter.masked_fill_(~fresh_C[:, None], 0)
        self.usage.copy_(torch.where(fresh_C[:, None], self.usage, counts_CK))

    @torch.no_grad()
    def resize_(self, num_classes: int) -> None:
        """Room for `num_classes` classes, none of which has prototypes: to load an edited state into."""
        self._replace(*(old.new_zeros(num_classes, *old.shape[1:]) for old in self._state()))
        self._resize_norm(torch.arange(0, device=self.prototypes.device), num_classes)

    def _random(self, num_classes: int, num_prototypes: int) -> Tensor:
        """Random unit vectors (num_classes, num_prototypes, D), the same on every rank."""
        generator = torch.Generator().manual_seed(len(self.prototypes))
        vectors_CKD = torch.randn(num_classes, num_prototypes, self.dim, generator=generator)
        return unit(vectors_CKD).to(self.prototypes)

    def _start(
        self, emb_ND: Tensor, labels_N: Tensor, protos_CKD: Tensor, wanted_CK: Tensor
    ) -> tuple[Tensor, Tensor]:
        return start_prototypes(
            emb_ND,
            labels_N,
            protos_CKD.to(emb_ND.dtype),
            wanted_CK,
            self.kappa,
            self.sinkhorn_iterations,
            self.all_reduce,
        )

    def _state(self) -> tuple[Tensor, ...]:
        return self.prototypes, self.initialized, *self._counters()

    def _counters(self) -> tuple[Tensor, ...]:
        return self.usage, self.nearest_usage, self.idle, self.movement

    def _replace(self, *state: Tensor) -> None:
        names = ("prototypes", "initialized", "usage", "nearest_usage", "idle", "movement")
        for name, each in zip(names, state, strict=True):
            setattr(self, name, each.contiguous())

    def _resize_norm(self, keep: Tensor, added: int) -> None:
        """LayerNorm's numbers for the classes `keep`, then `added` new ones."""
        for name, value in (("norm_weight", 1.0), ("norm_bias", 0.0)):
            if hasattr(self, name):
                old = getattr(self, name)
                kept = old.detach()[keep]
                setattr(self, name, nn.Parameter(torch.cat([kept, kept.new_full((added,), value)])))

    def _check_class(self, class_id: int, where: str) -> None:
        if not 0 <= class_id < len(self.prototypes):
            raise ValueError(f"{where}: no class {class_id}, ids are 0 to {len(self.prototypes) - 1}")
