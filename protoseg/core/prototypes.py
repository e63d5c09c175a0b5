"""PrototypeHead: a segmentation classifier whose prototypes are clustered from the data, not learned.

A thin shell around the functions of `scores`, `clustering` and `losses`; needs torch only.
B images, C classes, K prototypes per class, D channels, (h, w) pixels; N = B·h·w pixels.
"""

from dataclasses import dataclass
from typing import Literal

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
from protoseg.core.editing import Editing
from protoseg.core.health import Health, health
from protoseg.core.losses import loss_scale, ppc_loss, ppd_loss
from protoseg.core.similarity import class_scores, map_scores, unit, unit_rows

NOT_LIVE = -1e4  # logit of a class without prototypes; finite, since upsampling would turn −inf into NaN
MEMORY = 0.99  # decay per update of the counters that `health` reads
DEAD_AFTER = 100  # steps after which `health` calls a prototype dead where revival is off


@dataclass(frozen=True)
class TrainingOutput:
    """What `PrototypeHead.training_step` returns, and `update_` takes."""

    logits: Tensor  # (B, C, h, w)
    ppc: Tensor  # 0-d
    ppd: Tensor  # 0-d
    assignment: Tensor  # (B, h, w) int64, the pixel's prototype within its class, −1 where it takes no part
    nearest: Tensor  # (B, h, w) int64, the nearest prototype of the pixel's class
    labels: Tensor  # (B, h, w) int64, −1 where the pixel takes no part
    moves: Tensor  # (B, h, w) bool, whether the pixel moves its prototype (`update_pixels`)
    embedding: Tensor  # (N, D) detached, unit length


class PrototypeHead(Editing):
    """Classify each pixel by its nearest prototype, K per class (ProtoSeg, CVPR 2022).

    features (B, D, h, w) → logits (B, C, h, w) = logit_scale · max over k of the cosine. Half types are
    promoted to float32, double stays double. Buffers, updated in place by `prepare_` and `update_`, replaced
    by the editing methods, and changed by nothing else: `prototypes` (C, K, D) of unit length and
    `initialized` (C,), besides counters.

    dim: D. temperature: τ of PPC. kappa, sinkhorn_iterations: of the clustering. momentum: μ. start: "data"
    waits for `prepare_` to see a class, "random" needs no `prepare_`. update_pixels: "correct" lets only
    rightly classified pixels move prototypes. score_norm: "layer_norm" has 2·C learnable numbers in place
    of logit_scale. revive_after: steps without a pixel until `prepare_` moves a prototype elsewhere, 0 for
    never. score_dtype: of the N × CK product (default float32, or double for double features). chunk_size:
    pixels per chunk of it (default from the sizes). all_reduce(tensor, "sum" | "max"): joins distributed
    ranks.
    """

    prototypes: Tensor
    initialized: Tensor
    usage: Tensor
    nearest_usage: Tensor
    idle: Tensor
    movement: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_prototypes: int = 10,
        *,
        ignore_index: int = 255,
        momentum: float = 0.999,
        kappa: float = 0.05,
        sinkhorn_iterations: int = 3,
        temperature: float = 0.1,
        logit_scale: float = 20.0,
        start: Literal["data", "random"] = "data",
        update_pixels: Literal["all", "correct"] = "all",
        score_norm: Literal["scale", "layer_norm"] = "scale",
        revive_after: int = 100,
        score_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        all_reduce: AllReduce | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_classes", num_classes), ("num_prototypes", num_prototypes)):
            if value < 1:
                raise ValueError(f"PrototypeHead: {name} must be at least 1, got {value}")
        for name, given, known in (
            ("start", start, ("data", "random")),
            ("update_pixels", update_pixels, ("all", "correct")),
            ("score_norm", score_norm, ("scale", "layer_norm")),
        ):
            if given not in known:
                raise ValueError(f"PrototypeHead: {name} must be one of {known}, got {given!r}")
        self.dim = dim
        self.ignore_index = ignore_index
        self.momentum = momentum
        self.kappa = kappa
        self.sinkhorn_iterations = sinkhorn_iterations
        self.temperature = temperature
        self.logit_scale = logit_scale
        self.start = start
        self.update_pixels = update_pixels
        self.score_norm = score_norm
        self.revive_after = revive_after
        self.score_dtype = score_dtype
        self.chunk_size = chunk_size
        self.all_reduce = all_reduce
        self.register_buffer("prototypes", unit(torch.randn(num_classes, num_prototypes, dim)))
        self.register_buffer("initialized", torch.full((num_classes,), start == "random"))
        self.register_buffer("usage", torch.zeros(num_classes, num_prototypes))
        self.register_buffer("nearest_usage", torch.zeros(num_classes, num_prototypes))
        self.register_buffer("idle", torch.zeros(num_classes, num_prototypes, dtype=torch.int64))
        self.register_buffer("movement", torch.zeros(num_classes, num_prototypes))
        if score_norm == "layer_norm":
            self.norm_weight = nn.Parameter(torch.ones(num_classes))
            self.norm_bias = nn.Parameter(torch.zeros(num_classes))

    @property
    def num_classes(self) -> int:
        """C."""
        return self.prototypes.shape[0]

    @property
    def num_prototypes(self) -> int:
        """K."""
        return self.prototypes.shape[1]

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"dim={self.dim}, num_classes={self.num_classes}, num_prototypes={self.num_prototypes}"

    def forward(self, features: Tensor, return_distance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, C, h, w); with return_distance also 1 − cosine of the nearest prototype (B, h, w)."""
        with torch.autocast(features.device.type, enabled=False):
            emb_ND = self.unit_rows(features)
            scores_NC = class_scores(
                emb_ND,
                self.prototypes.to(emb_ND.dtype),
                self.initialized,
                score_dtype=self.score_dtype,
                chunk_size=self.chunk_size,
            )
            batch, _, height, width = features.shape
            # (N, C) lies in memory as (C, N).
            scores = scores_NC.t().view(self.num_classes, batch, height, width).transpose(0, 1)
            logits = self._logits(scores)
            return (logits, 1 - scores.amax(1)) if return_distance else logits

    def training_step(self, features: Tensor, labels: Tensor, scale: Tensor | None = None) -> TrainingOutput:
        """Logits, PPC, PPD and the assignment of one batch; changes nothing.

        features (B, D, h, w), labels (B, h, w) integer at the same resolution (see `downsample_labels`).
        scale: from `loss_scale`; by default W / global number of pixels that take part in this call. Pixels
        take no part whose label is ignore_index, no class, or a class without prototypes: their loss is 0.
        """
        with torch.autocast(features.device.type, enabled=False):
            compared = self._compared(features)
            labels_N = self._valid_labels(features, labels)
            plain = self.score_norm == "scale"
            scores, own_NK, log_sum_exp_N, emb_ND = map_scores(
                compared,
                self.prototypes,
                labels_N,
                self.temperature,
                self.initialized,
                scale=self.logit_scale if plain else 1.0,
                not_live=NOT_LIVE if plain else -1.0,
                score_dtype=self.score_dtype,
                chunk_size=self.chunk_size,
            )
            plan_NK = sinkhorn(
                own_NK,
                labels_N,
                self.num_classes,
                self.kappa,
                self.sinkhorn_iterations,
                all_reduce=self.all_reduce,
            )
            assignment_N = assign(plan_NK, labels_N)
            labelled_N = labels_N >= 0
            if scale is None:
                scale = loss_scale([labels_N], -1, all_reduce=self.all_reduce)
            scale = scale.to(emb_ND.dtype)
            positive_N = own_NK.gather(1, assignment_N.clamp(min=0)[:, None])[:, 0]
            logits = scores if plain else self._logits(scores)
            moves_N = labelled_N
            if self.update_pixels == "correct":
                moves_N = labelled_N & (logits.detach().argmax(1).flatten() == labels_N)
            return TrainingOutput(
                logits,
                ppc_loss(log_sum_exp_N, positive_N, labelled_N, self.temperature, scale),
                ppd_loss(positive_N, labelled_N, scale),
                assignment_N.view_as(labels),
                own_NK.detach().argmax(1).view_as(labels),
                labels_N.view_as(labels),
                moves_N.view_as(labels),
                emb_ND,
            )

    @torch.no_grad()
    def update_(self, *outs: TrainingOutput) -> None:
        """Move the prototypes towards the mean of their pixels, once for all micro-batches of a step."""
        num_classes, num_prototypes = self.num_classes, self.num_prototypes
        sums_CKD = torch.zeros_like(self.prototypes)
        moving_CK = torch.zeros_like(self.usage)
        counts_CK = torch.zeros_like(self.usage)
        nearest_CK = torch.zeros_like(self.usage)
        for out in outs:
            labels_N, assignment_N = out.labels.flatten(), out.assignment.flatten()
            moving_N = torch.where(out.moves.flatten(), assignment_N, -1)
            sizes = (num_classes, num_prototypes)
            sums_CKD = sums_CKD + cluster_sums(out.embedding, labels_N, moving_N, *sizes)
            moving_CK = moving_CK + cluster_counts(labels_N, moving_N, *sizes, moving_CK.dtype)
            counts_CK = counts_CK + cluster_counts(labels_N, assignment_N, *sizes, counts_CK.dtype)
            nearest_CK = nearest_CK + cluster_counts(
                labels_N, out.nearest.flatten(), *sizes, nearest_CK.dtype
            )
        if self.all_reduce is not None:
            own = (sums_CKD, moving_CK, counts_CK, nearest_CK)
            joined = self.all_reduce(torch.cat([part.flatten() for part in own]), "sum")
            parts = joined.split([part.numel() for part in own])
            sums_CKD, moving_CK, counts_CK, nearest_CK = (
                part.view_as(like) for part, like in zip(parts, own)
            )
        moved_CKD = momentum_update(self.prototypes, divided(sums_CKD, moving_CK), moving_CK, self.momentum)
        step_CK = (moved_CKD - self.prototypes).norm(dim=-1)
        pixels_C1 = counts_CK.sum(1, keepdim=True)
        present_C1 = pixels_C1 > 0
        # A class that is absent, or has fewer pixels than prototypes, says nothing against any of them.
        idle_CK = torch.where(pixels_C1 >= num_prototypes, self.idle + 1, self.idle)
        self.idle.copy_(torch.where(counts_CK > 0, 0, idle_CK))
        for usage_CK, seen_CK in ((self.usage, counts_CK), (self.nearest_usage, nearest_CK)):
            usage_CK.copy_(torch.where(present_C1, MEMORY * usage_CK + seen_CK, usage_CK))
        mean_step_CK = MEMORY * self.movement + (1 - MEMORY) * step_CK
        self.movement.copy_(torch.where(present_C1, mean_step_CK, self.movement))
        self.prototypes.copy_(moved_CKD)

    @torch.no_grad()
    def prepare_(self, features: Tensor, labels: Tensor) -> None:
        """Give prototypes to classes seen for the first time, and a new place to those that got no pixels.

        Call it when `initialized` lacks a class of the batch, and every `revive_after` steps. With
        `all_reduce` every rank must call it; a class counts as seen if any rank has a pixel of it.
        """
        wanted_CK = (~self.initialized)[:, None] | self._dead()
        if not wanted_CK.any():
            return
        with torch.autocast(features.device.type, enabled=False):
            emb_ND = self.unit_rows(features)
            labels_N = self._valid_labels(features, labels, only_initialized=False)
            protos_CKD, placed_CK = start_prototypes(
                emb_ND,
                labels_N,
                self.prototypes.to(emb_ND.dtype),
                wanted_CK,
                self.kappa,
                self.sinkhorn_iterations,
                self.all_reduce,
            )
        self.prototypes.copy_(protos_CKD)
        self.initialized.logical_or_(placed_CK.any(1))
        self.idle.masked_fill_(placed_CK, 0)

    def known(self, labels: Tensor) -> Tensor:
        """Labels, integers of any shape, with ignore_index for classes that have no prototypes.

        For cross-entropy at label resolution: a class too small to show in the feature map has none yet, and
        its logit is −10,000.
        """
        class_id = labels.clamp(0, self.num_classes - 1).long()
        unknown = (labels == class_id) & ~self.initialized[class_id]
        return labels.masked_fill(unknown, self.ignore_index)

    @torch.no_grad()
    def health(self) -> Health:
        """Per-class state of the prototypes: effective K, how many are in use, cosines, dead ones, churn."""
        return health(
            self.prototypes,
            self.usage,
            self.nearest_usage,
            self.idle,
            self.movement,
            self.initialized,
            self.revive_after or DEAD_AFTER,
        )

    def _dead(self) -> Tensor:
        """Prototypes (C, K) that revival moves."""
        return (
            self.idle >= self.revive_after
            if self.revive_after
            else torch.zeros_like(self.idle, dtype=torch.bool)
        )

    def unit_rows(self, features: Tensor) -> Tensor:
        """Unit vectors (N, D) of a feature map (B, D, h, w), N = B·h·w: what prototypes are compared with."""
        return unit_rows(self._compared(features))

    def _compared(self, features: Tensor) -> Tensor:
        """The map of which the pixels, at unit length, are compared with prototypes."""
        if features.ndim != 4 or features.shape[1] != self.dim:
            raise ValueError(
                f"PrototypeHead: features must be (B, {self.dim}, h, w), got {tuple(features.shape)}"
            )
        return features

    def _valid_labels(self, features: Tensor, labels: Tensor, only_initialized: bool = True) -> Tensor:
        """Labels (N,), −1 for pixels that take no part."""
        expected = (features.shape[0], *features.shape[2:])
        if labels.shape != expected:
            raise ValueError(
                f"PrototypeHead: labels must be {tuple(expected)} like the features, got"
                f" {tuple(labels.shape)}; use protoseg.core.losses.downsample_labels"
            )
        labels_N = labels.reshape(-1).long()
        valid_N = (labels_N >= 0) & (labels_N < self.num_classes) & (labels_N != self.ignore_index)
        labels_N = torch.where(valid_N, labels_N, -1)
        if only_initialized:
            labels_N = torch.where(self.initialized[labels_N.clamp(min=0)], labels_N, -1)
        return labels_N

    def _logits(self, scores: Tensor) -> Tensor:
        """Cosines (B, C, h, w) scaled or normalised."""
        live_C11 = self.initialized[:, None, None]
        shown_C11 = live_C11.to(scores.dtype)
        if self.score_norm == "layer_norm":
            # Over the live classes only; the published code has LayerNorm here.
            count = shown_C11.sum().clamp(min=1)
            scores = scores - (scores * shown_C11).sum(1, keepdim=True) / count
            variance = (scores * shown_C11).square().sum(1, keepdim=True) / count
            scores = scores * (variance + 1e-5).rsqrt() * self.norm_weight[:, None, None]
            fill_C11 = torch.where(live_C11, self.norm_bias[:, None, None], NOT_LIVE)
        else:
            shown_C11 = shown_C11 * self.logit_scale
            fill_C11 = NOT_LIVE * (~live_C11).to(scores.dtype)
        return torch.addcmul(fill_C11.to(scores.dtype), scores, shown_C11)

    def _apply(self, fn: object, recurse: bool = True) -> "PrototypeHead":
        super()._apply(fn, recurse)
        # In half precision a momentum of 0.99 would be rounded away.
        for name in ("prototypes", "usage", "movement"):
            buffer = getattr(self, name)
            setattr(self, name, buffer.to(torch.promote_types(buffer.dtype, torch.float32)))
        return self
