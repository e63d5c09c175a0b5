"""Cross-image pixel contrast: the loss, the projection head, and the module that joins them with the
memories.

Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV 2021. Needs torch only;
no loop over images or classes, no read of the device by the host.

Axes: B images of this rank, P pixels of one image (h*w), M = B*P, N pixels of all ranks, C classes,
D channels, F feature channels, J anchors per class, L candidates in the pool, W of them that may be of a
given class, K and R sampled positives and negatives, A anchors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.core.contrast_memory import PixelMemory
from protoseg.core.contrast_sampling import Pool, balanced_pool, full_pool, select_anchors, select_pairs
from protoseg.core.draws import Groups, class_map, draw_state, fold, pixel_keys, sort_groups
from protoseg.core.ranks import AllGather, AllReduce, reduced
from protoseg.core.settings import ContrastSettings
from protoseg.core.similarity import at_least_single

SIMILARITIES_AT_ONCE = 1 << 24  # anchors are scored in chunks of so many similarities (64 MB in float32)
UNIFORMITY_ROWS = 256


class ProjectionHead(nn.Module):
    """f_proj: two 1x1 convolutions with a ReLU between, l2-normalised along the channel axis; training only.

    (B, F, h, w) -> (B, D, h, w), unit norm; half types become float32. Source: ICCV 2021, section 3.3.
    """

    def __init__(self, in_channels: int, dim: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_channels, in_channels)  # on every pixel: a 1x1 convolution
        self.out = nn.Linear(in_channels, dim)

    def forward(self, features: Tensor) -> Tensor:
        # Weights times pixels, then pixels times weights: neither product copies the map to another layout,
        # and the result has its channels last in memory, since memories and pool take rows of D numbers.
        batch, _, height, width = features.shape
        pixels_BFP = features.flatten(2)
        weight = self.hidden.weight.expand(batch, -1, -1)
        hidden_BFP = torch.baddbmm(self.hidden.bias[:, None], weight, pixels_BFP).relu_()
        weight = self.out.weight.T.expand(batch, -1, -1)
        emb_BPD = torch.baddbmm(self.out.bias, hidden_BFP.transpose(1, 2), weight)
        emb_BPD = F.normalize(at_least_single(emb_BPD), dim=2)
        return emb_BPD.transpose(1, 2).unflatten(2, (height, width))


class ContrastOutput(NamedTuple):
    """`loss` is for backward; the rest is detached and, except `projected`, the same on all ranks."""

    loss: Tensor  # W * (sum over this rank's anchors) / (global count), so that DDP's mean is the global mean
    value: Tensor  # global mean over qualifying anchors, 0 if there are none
    anchors: Tensor  # global number of qualifying anchors (at least one positive and one negative)
    empty: Tensor  # 1 if there was no qualifying anchor, else 0
    diagnostics: dict[str, Tensor]
    projected: Tensor  # (B, D, h, w), without gradient: what `enqueue_` takes

    def summary(self, parts: int = 1) -> dict[str, Tensor]:
        """Numbers for a log, 0-d, each a share of the mean over `parts` micro-batches; anchors are summed."""
        means = {name: value.mean() / parts for name, value in self.diagnostics.items()}
        return {f"contrast_{name}": v for name, v in means.items()} | {
            "contrast_anchors": self.anchors,
            "contrast_empty": self.empty / parts,
        }


class _Sums(NamedTuple):
    """Sums over the anchors that qualify."""

    loss: Tensor
    anchors: Tensor
    positive_cosine: Tensor  # mean of each anchor
    hardest_cosine: Tensor  # largest of its drawn negatives
    hard: Tensor  # anchors that the classifier got wrong


def pixel_contrast_loss(
    positive_AK: Tensor,
    positive_mask_AK: Tensor,
    negative_AM: Tensor,
    negative_mask_AM: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Loss of every anchor from the cosines of its sampled pairs (ICCV 2021, Eq. 3).

    Mean over positives of -log(exp(s+/t) / (exp(s+/t) + sum exp(s-/t))): a positive is not in the
    denominator of another. Returns loss (A,), 0 where the anchor does not qualify, and qualifies (A,): at
    least one positive and one negative. The gradient is that of Eq. 3 itself; the printed Eq. 5 has another
    denominator.
    """
    qualifies_A = positive_mask_AK.any(1) & negative_mask_AM.any(1)
    lowest = torch.finfo(
        negative_AM.dtype
    ).min  # finite: the log-sum-exp of no entry must not make NaN gradients
    lse_A1 = torch.where(negative_mask_AM, negative_AM / temperature, lowest).logsumexp(1, keepdim=True)
    term_AK = F.softplus(lse_A1 - positive_AK / temperature)
    count_A = positive_mask_AK.sum(1).clamp(min=1)
    loss_A = torch.where(positive_mask_AK, term_AK, 0).sum(1) / count_A
    return torch.where(qualifies_A, loss_A, 0), qualifies_A


def uniformity(emb_ND: Tensor, valid_N: Tensor) -> Tensor:
    """log mean exp(-2 |x - y|^2) over pairs of valid unit rows, 0 if there is none (arXiv 2005.10242)."""
    pair_NN = (
        valid_N[:, None] & valid_N[None, :] & ~torch.eye(len(emb_ND), dtype=torch.bool, device=emb_ND.device)
    )
    kernel_NN = torch.exp(4 * (emb_ND @ emb_ND.T) - 4)
    mean = torch.where(pair_NN, kernel_NN, 0).sum() / pair_NN.sum().clamp(min=1)
    return torch.where(pair_NN.any(), mean, 1).log()


class PixelContrast(nn.Module):
    """Pixel contrast with its projection head, for training only, and its memories.

    Args:
        channels: of the features that are compared. num_classes. num_images: of the training set.
        project: the features go through a ProjectionHead; False: they are unit vectors already.
        seed: of all draws. all_gather (concatenates along axis 0 in rank order) and all_reduce (tensor,
        "sum") join the ranks, all with the same batch size; rank is this process's number.
        settings: fields of ContrastSettings. mode "intra_image": pairs within an image; "batch": all images
        of the step; "memory": and the memories.
    Errors: ValueError with the offending value.
    Source: ICCV 2021, sections 3.2 and 3.3.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_images: int,
        *,
        project: bool = True,
        seed: int = 0,
        all_gather: AllGather | None = None,
        all_reduce: AllReduce | None = None,
        rank: int = 0,
        ignore_index: int = 255,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = s = ContrastSettings(**{"mode": "memory", **settings})
        if s.mode == "none":
            raise ValueError("mode='none' has no contrast to compute")
        if s.pool_size != "full" and s.pool_size < 2 * num_classes:
            raise ValueError(f"pool_size={s.pool_size} must be at least 2 per class, {2 * num_classes} here")
        if (all_gather is None) != (all_reduce is None):
            raise ValueError("all_gather and all_reduce must be given together")
        self.num_classes, self.ignore_index, self.seed = num_classes, ignore_index, seed
        self.all_gather, self.all_reduce, self.rank = all_gather, all_reduce, rank
        self.projection = ProjectionHead(channels, s.dim) if project else nn.Identity()
        self.memory = None
        if s.mode == "memory":
            self.memory = PixelMemory(s.dim if project else channels, num_classes, num_images, s)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        predictions: Tensor,
        indices: Tensor,
        step: int | Tensor,
    ) -> ContrastOutput:
        """Contrast loss of one step; changes no state.

        features (B, F, h, w). All pixels are projected without gradient, and the anchors, the only ones that
        get a gradient, once more with it, which costs a third of projecting everything with gradient.
        labels, predictions (B, h, w) integer, at the resolution of the features; indices (B,) dataset
        indices.
        """
        for name, value in (("labels", labels), ("predictions", predictions)):
            if value.shape != (features.shape[0], *features.shape[2:]):
                expected = (features.shape[0], *features.shape[2:])
                raise ValueError(f"{name} have shape {tuple(value.shape)}, the features need {expected}")
        class_BP = class_map(labels, self.num_classes, self.ignore_index)
        wrong_BP = predictions.flatten(1) != class_BP
        key_BP = pixel_keys(class_BP, indices, self.seed, step, 0)
        facts = torch.stack([class_BP, wrong_BP.to(torch.int64), key_BP], dim=1)
        if self.all_gather is not None:  # every rank draws from the joint batch, and finds the same
            facts = self.all_gather(facts)
        class_N, wrong_N, key_N = facts.transpose(0, 1).flatten(1).unbind(0)
        groups = sort_groups(key_N, class_N, self.num_classes)
        pixel_CJ, valid_CJ = select_anchors(
            groups, class_N, wrong_N > 0, self.settings.anchors_per_class, self.settings.anchor_sampler
        )
        hard_CJ = wrong_N[pixel_CJ]
        # this rank's anchors: the others are computed with, but count nothing
        own_CJ = pixel_CJ - self.rank * class_BP.numel()
        valid_CJ = valid_CJ & (own_CJ >= 0) & (own_CJ < class_BP.numel())
        # The others stand for pixels all over the batch: many of the same one would queue up in backward.
        spread_CJ = torch.arange(own_CJ.numel(), device=own_CJ.device).view_as(own_CJ) % class_BP.numel()
        own_CJ = torch.where(valid_CJ, own_CJ, spread_CJ)
        pixels = class_BP.shape[1]
        anchor_CJD = _take_pixels(features, own_CJ // pixels, own_CJ % pixels)
        # As a map of C rows, so that the head sees a map here as well.
        anchor_CJD = self.projection(anchor_CJD.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        # After the anchors: autocast keeps the first cast of a weight, which must be one with a gradient.
        with torch.no_grad():
            projected = self.projection(features.detach())
        with torch.autocast(features.device.type, enabled=False):
            pool = self._pool(at_least_single(_rows(projected).flatten(0, 1)), groups, class_N, step)
            anchors = (at_least_single(anchor_CJD), pixel_CJ, valid_CJ, hard_CJ)
            # chunks along J: how much memory a step needs does not depend on the number of anchors
            chunk = max(SIMILARITIES_AT_ONCE // (self.num_classes * len(pool.class_L)), 1)
            parts = zip(*(each.split(chunk, dim=1) for each in anchors))
            chunks = [self._sums(pool, step, pixels, *part) for part in parts]
            sums = _Sums(*(torch.stack(each).sum() for each in zip(*chunks)))
            return self._output(sums, pool, projected)

    def _pool(self, emb_MD: Tensor, groups: Groups, class_N: Tensor, step: int | Tensor) -> Pool:
        size = self.settings.pool_size
        if size == "full":
            return full_pool(emb_MD, class_N, self.num_classes, self.memory, self.all_gather)
        return balanced_pool(
            emb_MD, groups, size // self.num_classes, self.memory, self.seed, step,
            self.all_reduce, self.rank,
        )  # fmt: skip

    def _sums(
        self, pool: Pool, step: int | Tensor, pixels: int, anchor_CJD: Tensor, pixel_CJ: Tensor,
        valid_CJ: Tensor, hard_CJ: Tensor,
    ) -> _Sums:  # fmt: skip
        s, device, count = self.settings, pixel_CJ.device, pool.class_L.shape[0]
        class_C11 = torch.arange(self.num_classes, device=device)[:, None, None]
        column_C1W, class_C1W, pixel_C1W = (
            pool.own(each.expand(self.num_classes, 1, count))
            for each in (torch.arange(count, device=device), pool.class_L, pool.pixel_L)
        )
        positive_CJW = (class_C1W == class_C11) & (pixel_C1W != pixel_CJ[..., None]) & valid_CJ[..., None]
        negative_CJL = (pool.class_L != class_C11) & (pool.class_L < self.num_classes)
        if s.mode == "intra_image":
            image_CJ1 = (pixel_CJ // pixels)[..., None]
            positive_CJW = positive_CJW & (pixel_C1W // pixels == image_CJ1)
            negative_CJL = negative_CJL & (pool.pixel_L // pixels == image_CJ1)
        cosine_CJL = anchor_CJD @ pool.emb_LD.T
        with torch.no_grad():
            plain_CJW = pool.own(cosine_CJL)
            keys = [fold(draw_state(self.seed, step, salt), pixel_CJ) for salt in (3, 4)]
            index_CJK, positive_CJK = select_pairs(
                -plain_CJW, positive_CJW, s.positives, s.pair_sampler, keys[0]
            )
            index_CJR, negative_CJR = select_pairs(
                cosine_CJL, negative_CJL, s.negatives, s.pair_sampler, keys[1]
            )
            index_CJK = column_C1W.expand((*index_CJK.shape[:2], -1)).gather(2, index_CJK)
        chosen = cosine_CJL.gather(2, torch.cat([index_CJK, index_CJR], dim=2)).flatten(0, 1)
        chosen_AK, chosen_AR = chosen.tensor_split([index_CJK.shape[2]], dim=1)
        negative_AR = negative_CJR.flatten(0, 1)
        loss_A, qualifies_A = pixel_contrast_loss(
            chosen_AK, positive_CJK.flatten(0, 1), chosen_AR, negative_AR, s.temperature
        )
        mean_CJ = torch.where(positive_CJW, plain_CJW, 0).sum(2) / positive_CJW.sum(2).clamp(min=1)
        hardest_A = chosen_AR.detach().masked_fill(~negative_AR, -1).amax(1)

        def over_anchors(value_A: Tensor) -> Tensor:
            return torch.where(qualifies_A, value_A, 0).sum()

        return _Sums(
            loss_A.sum(),
            over_anchors(torch.ones_like(hardest_A)),
            over_anchors(mean_CJ.flatten()),
            over_anchors(hardest_A),
            over_anchors(hard_CJ.flatten().to(hardest_A.dtype)),
        )

    def _output(self, sums: _Sums, pool: Pool, projected: Tensor) -> ContrastOutput:
        ranks = torch.ones_like(sums.anchors)
        *joined, ranks = reduced(torch.stack([*sums, ranks]).detach(), self.all_reduce).unbind()
        anchors = _Sums(*joined).anchors
        mean = _Sums(*(each / anchors.clamp(min=1) for each in joined))
        every = -(-len(pool.class_L) // UNIFORMITY_ROWS)
        diagnostics = {
            "alignment": 2 - 2 * mean.positive_cosine,  # mean |x - y|^2 of anchors and positives in the pool
            "uniformity": uniformity(pool.emb_LD[::every], pool.class_L[::every] < self.num_classes),
            "positive_cosine": mean.positive_cosine,
            "hardest_negative_cosine": mean.hardest_cosine,
            "hard_anchor_share": mean.hard,
        }
        if self.memory is not None:
            diagnostics |= self.memory.fill()
        loss = sums.loss * ranks / anchors.clamp(min=1)
        return ContrastOutput(loss, mean.loss, anchors, (anchors == 0).float(), diagnostics, projected)

    @torch.no_grad()
    def enqueue_(self, projected: Tensor, labels: Tensor, indices: Tensor, step: int | Tensor) -> None:
        """Put this step's embeddings into the memories; after the loss. Nothing happens in the other modes.

        projected (B, D, h, w), `ContrastOutput.projected`; labels, indices and step as in forward.
        """
        if self.memory is None:
            return
        class_BP = class_map(labels, self.num_classes, self.ignore_index)
        key_BP = pixel_keys(class_BP, indices, self.seed, step, 0)
        self.memory.enqueue_(_rows(projected), class_BP, key_BP, indices, self.all_gather)


def _take_pixels(features: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    # Rows (..., F) of a map (B, F, h, w). Indexing makes a dense gradient; where it does not lie in memory as
    # the features do, adding it to their other gradient is slower than all the rest.
    if features.is_contiguous():
        return features.flatten(2)[image, :, pixel]
    return features.permute(0, 2, 3, 1).flatten(1, 2)[image, pixel]


def _rows(projected: Tensor) -> Tensor:
    return projected.permute(0, 2, 3, 1).flatten(1, 2)  # (B, P, D)
