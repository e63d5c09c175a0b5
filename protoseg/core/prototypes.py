"""PrototypeHead: a segmentation classifier whose prototypes are clustered from the data, not learned.

A thin shell that holds state, around free functions; needs torch only.
B images, C classes, K prototypes per class, D channels, (h, w) pixels; N = B·h·w pixels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from protoseg.core import editing
from protoseg.core.clustering import assign, divided, sinkhorn
from protoseg.core.health import Health, dead_prototypes, health
from protoseg.core.losses import loss_scale, ppc_loss, ppd_loss
from protoseg.core.pixel_scores import log_sum_exp, prototype_scores
from protoseg.core.prior import log_prior
from protoseg.core.ranks import AllReduce
from protoseg.core.settings import PrototypeSettings
from protoseg.core.similarity import at_least_single, class_scores, unit, unit_rows
from protoseg.core.start import start_prototypes
from protoseg.core.update import TrainingOutput, auto_momentum, momentum_update, step_sums

NOT_LIVE = -1e4  # logit of a class without prototypes; finite, since upsampling would turn −inf into NaN
RECENT = 0.99  # decay per update of the counters that `health` reads
SEEN = 0.999  # decay per update of the pixel counts behind the class prior


class PrototypeHead(nn.Module):
    """Classify each pixel by its nearest prototype and a class prior, K per class (ProtoSeg, CVPR 2022).

    features (B, D, h, w) → logits (B, C, h, w) = logit_scale · max over k of the cosine, plus the log of the
    class's share of the labelled pixels seen so far. Half types are promoted to float32, double stays double.
    Buffers, updated in place by `prepare_` and `update_`, replaced by the editing methods, and changed by
    nothing else: `prototypes` (C, K, D) of unit length, `initialized` (C,), `pixel_counts` (C,) behind the
    prior, and counters of recent steps.

    dim: D. num_prototypes: K. iterations: length of the run, from which momentum "auto" follows. settings:
    other fields of `PrototypeSettings`. all_reduce(tensor, "sum" | "max"): joins distributed ranks.
    """

    prototypes: Tensor
    initialized: Tensor
    pixel_counts: Tensor
    usage: Tensor
    nearest_usage: Tensor
    agreeing: Tensor
    movement: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_prototypes: int = PrototypeSettings.num_per_class,
        *,
        ignore_index: int = 255,
        iterations: int = 1000,
        all_reduce: AllReduce | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"PrototypeHead: {name} must be at least 1, got {value}")
        try:
            self.settings = PrototypeSettings(num_per_class=num_prototypes, **settings)
        except ValueError as error:
            raise ValueError(f"PrototypeHead: {error}") from None
        self.dim = dim
        self.ignore_index = ignore_index
        momentum = self.settings.momentum
        self.momentum = auto_momentum(iterations) if momentum == "auto" else momentum
        self.score_dtype = None if self.settings.score_dtype == "float32" else torch.bfloat16
        self.all_reduce = all_reduce
        self.register_buffer("prototypes", unit(torch.randn(num_classes, num_prototypes, dim)))
        self.register_buffer("initialized", torch.full((num_classes,), self.settings.start == "random"))
        self.register_buffer("pixel_counts", torch.zeros(num_classes))
        self.register_buffer("usage", torch.zeros(num_classes, num_prototypes))
        self.register_buffer("nearest_usage", torch.zeros(num_classes, num_prototypes))
        self.register_buffer("agreeing", torch.zeros(num_classes))
        self.register_buffer("movement", torch.zeros(num_classes, num_prototypes))
        if self.settings.score_norm == "layer_norm":
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

    def log_prior(self) -> Tensor:
        """What is added to the logits (C,): log of each live class's share of the pixels; or zeros."""
        if self.settings.prior == "none":
            return torch.zeros_like(self.pixel_counts)
        return log_prior(self.pixel_counts, self.initialized)

    def forward(self, features: Tensor, return_distance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, C, h, w); with return_distance also 1 − cosine of the nearest prototype (B, h, w)."""
        with torch.autocast(features.device.type, enabled=False):
            emb_ND = self.unit_rows(features)
            scores_NC = class_scores(
                emb_ND, self.prototypes.to(emb_ND.dtype), self.initialized, score_dtype=self.score_dtype
            )
            batch, _, height, width = features.shape
            # (N, C) lies in memory as (C, N).
            scores = scores_NC.t().view(self.num_classes, batch, height, width).transpose(0, 1)
            if self.settings.score_norm == "layer_norm":
                logits = self._normalised(scores)
            else:
                scale_C, offset_C = (x.to(scores.dtype)[:, None, None] for x in self._scale_and_offset())
                logits = torch.addcmul(offset_C, scores, scale_C)
            return (logits, 1 - scores.amax(1)) if return_distance else logits

    def training_step(
        self, features: Tensor, labels: Tensor, scale: Tensor | None = None, drawn: Tensor | None = None
    ) -> TrainingOutput:
        """Logits, PPC, PPD and the assignment of one batch; changes nothing.

        features (B, D, h, w), labels (B, h, w) integer at the same resolution (see `downsample_labels`).
        scale: from `loss_scale`; by default W / global number of pixels that take part in this call. Pixels
        take no part whose label is ignore_index, no class, or a class without prototypes: their loss is 0.
        drawn (B, P): positions in 0 … h·w − 1 of the pixels that PPC is computed of, a random share of each
        image; its value is scaled by h·w / P, so that its mean over draws is PPC. None: all pixels.
        """
        with torch.autocast(features.device.type, enabled=False):
            compared = self._compared(features)
            labels_N = self.valid_labels(features, labels)
            normalised = self.settings.score_norm == "layer_norm"
            drawn_P = None
            if drawn is not None:
                image_B1 = torch.arange(len(drawn), device=drawn.device)[:, None]
                drawn_P = (image_B1 * (features.shape[2] * features.shape[3]) + drawn).flatten()
            scores, own_NK, right_N, emb_ND, drawn_PD = prototype_scores(
                compared,
                self.prototypes,
                labels_N,
                self.initialized,
                *self._scale_and_offset(),
                score_dtype=self.score_dtype,
                drawn_P=drawn_P,
            )
            assignment_N = assign(self._plan(own_NK, labels_N), labels_N)
            labelled_N = labels_N >= 0
            if scale is None:
                scale = loss_scale([labels_N], -1, all_reduce=self.all_reduce)
            scale = scale.to(emb_ND.dtype)
            positive_N = own_NK.gather(1, assignment_N.clamp(min=0)[:, None])[:, 0]
            return TrainingOutput(
                self._normalised(scores) if normalised else scores,
                self._ppc(drawn_PD, drawn_P, positive_N, labelled_N, scale),
                ppd_loss(positive_N, labelled_N, scale),
                assignment_N.view_as(labels),
                own_NK.detach().argmax(1).view_as(labels),
                labels_N.view_as(labels),
                right_N.view_as(labels),
                emb_ND,
            )

    @torch.no_grad()
    def update_(self, *outs: TrainingOutput) -> None:
        """Move the prototypes towards the mean of their pixels, once for all micro-batches of a step."""
        sums_CKD, moving_CK, counts_CK, nearest_CK, agreeing_C = step_sums(
            outs, self.num_classes, self.num_prototypes, self.settings.update_pixels, self.all_reduce
        )
        moved_CKD = momentum_update(self.prototypes, divided(sums_CKD, moving_CK), moving_CK, self.momentum)
        step_CK = (moved_CKD - self.prototypes).norm(dim=-1)
        pixels_C = counts_CK.sum(1)
        present_C = pixels_C > 0
        for counter, seen in (
            (self.usage, counts_CK),
            (self.nearest_usage, nearest_CK),
            (self.agreeing, agreeing_C),
            (self.movement, (1 - RECENT) * step_CK),
        ):
            present = present_C.view(-1, *[1] * (counter.ndim - 1))
            counter.copy_(torch.where(present, RECENT * counter + seen, counter))
        self.pixel_counts.mul_(SEEN).add_(pixels_C)
        self.prototypes.copy_(moved_CKD)

    @torch.no_grad()
    def prepare_(self, features: Tensor, labels: Tensor) -> None:
        """Give prototypes to classes seen for the first time, and dead ones a new place in their class.

        Call it when `initialized` lacks a class of the batch, and every `revive_after` steps. With
        `all_reduce` every rank must call it; a class counts as seen if any rank has a pixel of it.
        """
        wanted_CK = (~self.initialized)[:, None].expand_as(self.usage)
        if self.settings.revive_after:
            wanted_CK = wanted_CK | dead_prototypes(self.nearest_usage)
        if not wanted_CK.any():
            return
        with torch.autocast(features.device.type, enabled=False):
            emb_ND = self.unit_rows(features)
            labels_N = self.valid_labels(features, labels, only_initialized=False)
            protos_CKD, placed_CK = self.start(emb_ND, labels_N, self.prototypes, wanted_CK)
        self.prototypes.copy_(protos_CKD)
        self.initialized.logical_or_(placed_CK.any(1))
        # What was revived counts as used like the others until it has shown whether it is.
        pixels_C1 = self.nearest_usage.sum(1, keepdim=True)
        shared_CK = torch.where(placed_CK, pixels_C1 / self.num_prototypes, self.nearest_usage)
        together_C1 = shared_CK.sum(1, keepdim=True).clamp(min=1e-30)
        self.nearest_usage.copy_(shared_CK * (pixels_C1 / together_C1))

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
            self.prototypes, self.usage, self.nearest_usage, self.agreeing, self.movement, self.initialized
        )

    def unit_rows(self, features: Tensor) -> Tensor:
        """Unit vectors (N, D) of a feature map (B, D, h, w), N = B·h·w: what prototypes are compared with."""
        return unit_rows(self._compared(features))

    def valid_labels(self, features: Tensor, labels: Tensor, only_initialized: bool = True) -> Tensor:
        """Labels (N,), −1 for pixels that take no part."""
        expected = (features.shape[0], *features.shape[2:])
        if labels.shape != expected:
            raise ValueError(
                f"PrototypeHead: labels must be {tuple(expected)} like the features, got"
                f" {tuple(labels.shape)}; use protoseg.downsample_labels"
            )
        labels_N = labels.reshape(-1).long()
        valid_N = (labels_N >= 0) & (labels_N < self.num_classes) & (labels_N != self.ignore_index)
        labels_N = torch.where(valid_N, labels_N, -1)
        if only_initialized:
            labels_N = torch.where(self.initialized[labels_N.clamp(min=0)], labels_N, -1)
        return labels_N

    def start(
        self, emb_ND: Tensor, labels_N: Tensor, protos_CKD: Tensor, wanted_CK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`start_prototypes` with this head's settings."""
        kappa, rounds = self.settings.kappa, self.settings.sinkhorn_iterations
        protos_CKD = protos_CKD.to(emb_ND.dtype)
        return start_prototypes(emb_ND, labels_N, protos_CKD, wanted_CK, kappa, rounds, self.all_reduce)

    # Editing without a gradient step: see the functions of the same names in `editing`.

    def add_class(self, features: Tensor, labels: Tensor, share: float | None = None) -> int:
        """Add a class from labelled pixels, and return its id C."""
        return editing.add_class(self, features, labels, share)

    def remove_class(self, class_id: int) -> None:
        """Forget a class; ids above it move down by one."""
        editing.remove_class(self, class_id)

    def merge_classes(self, into: int, other: int) -> None:
        """Make one class of two, with K prototypes that represent both sets; `other` is removed."""
        editing.merge_classes(self, into, other)

    def set_num_prototypes(
        self, num_prototypes: int, features: Tensor | None = None, labels: Tensor | None = None
    ) -> None:
        """Change K. Classes with pixels in (features, labels) are clustered anew from them."""
        editing.set_num_prototypes(self, num_prototypes, features, labels)

    def refit(self, batches: Iterable[tuple[Tensor, Tensor]], rounds: int = 3) -> None:
        """Move all prototypes to the means of their pixels in (features, labels) batches."""
        editing.refit(self, batches, rounds)

    def resize_(self, num_classes: int) -> None:
        """Room for `num_classes` classes, none of which has prototypes: to load an edited state into."""
        editing.resize_(self, num_classes)

    def _scale_and_offset(self) -> tuple[Tensor, Tensor]:
        """What turns a class's best cosine into its score: two vectors (C,)."""
        live_C = self.initialized
        if self.settings.score_norm == "layer_norm":  # cosines, which `_normalised` goes on with
            return live_C.to(self.usage.dtype), -(~live_C).to(self.usage.dtype)
        scale_C = self.settings.logit_scale * live_C.to(self.usage.dtype)
        return scale_C, torch.where(live_C, self.log_prior(), NOT_LIVE)

    def _normalised(self, scores: Tensor) -> Tensor:
        """Cosines (B, C, h, w), normalised over the live classes; the published code has LayerNorm here."""
        live_C11 = self.initialized[:, None, None]
        shown_C11 = live_C11.to(scores.dtype)
        count = shown_C11.sum().clamp(min=1)
        scores = scores - (scores * shown_C11).sum(1, keepdim=True) / count
        variance = (scores * shown_C11).square().sum(1, keepdim=True) / count
        scores = scores * (variance + 1e-5).rsqrt() * self.norm_weight[:, None, None]
        offset_C = torch.where(self.initialized, self.norm_bias + self.log_prior(), NOT_LIVE)
        return torch.addcmul(offset_C[:, None, None].to(scores.dtype), scores, shown_C11)

    def _ppc(
        self, drawn_PD: Tensor, drawn_P: Tensor | None, positive_N: Tensor, labelled_N: Tensor, scale: Tensor
    ) -> Tensor:
        """PPC of all pixels, or of the drawn ones."""
        if drawn_P is not None:
            scale = scale * (len(labelled_N) / max(len(drawn_P), 1))
            positive_N, labelled_N = positive_N[drawn_P], labelled_N[drawn_P]
        tau = self.settings.temperature
        denominator_P = log_sum_exp(drawn_PD, self.prototypes, tau, self.initialized, self.score_dtype)
        return ppc_loss(denominator_P, positive_N, labelled_N, tau, scale)

    def _plan(self, own_NK: Tensor, labels_N: Tensor) -> Tensor:
        """The transport plan (N, K) of this head's settings."""
        kappa, rounds = self.settings.kappa, self.settings.sinkhorn_iterations
        return sinkhorn(own_NK, labels_N, self.num_classes, kappa, rounds, all_reduce=self.all_reduce)

    def _compared(self, features: Tensor) -> Tensor:
        """The map of which the pixels, at unit length, are compared with prototypes."""
        if features.ndim != 4 or features.shape[1] != self.dim:
            raise ValueError(
                f"PrototypeHead: features must be (B, {self.dim}, h, w), got {tuple(features.shape)}"
            )
        return features

    def _apply(self, fn: object, recurse: bool = True) -> "PrototypeHead":
        super()._apply(fn, recurse)
        # In half precision a momentum of 0.99 would be rounded away.
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                setattr(self, name, at_least_single(buffer))
        return self
