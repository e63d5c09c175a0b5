"""Cross-image pixel contrast: the loss, the projection head, and the module that joins them with the
memories.

Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV 2021. Needs torch only;
no loop over images or classes, no read of the device by the host.

Axes: B images of this rank, P pixels of one image (h*w), N = B*P, W ranks, C classes, D channels, F feature
channels, A anchors of this rank, Q pool slots per class, L candidates in the pool, K and M sampled
positives and negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.memory import (
    Gather,
    PixelMemory,
    Reduce,
    class_map,
    draw_state,
    fold,
    full_precision,
    pixel_keys,
)
from protoseg.sampling import (
    ANCHOR_SAMPLERS,
    PAIR_SAMPLERS,
    Pool,
    balanced_pool,
    full_pool,
    select_anchors,
    select_pairs,
)

MODES = ("intra_image", "batch", "memory")
SIMILARITIES_AT_ONCE = 1 << 24  # anchors are scored in chunks of so many similarities (64 MB in float32)
UNIFORMITY_ROWS = 256

Project = Callable[[Tensor], Tensor]


class ProjectionHead(nn.Module):
    """f_proj: two 1x1 convolutions with a ReLU between, l2-normalised along the channel axis; training only.

    (B, F, h, w) -> (B, D, h, w), unit norm; half types become float32. Source: ICCV 2021, section 3.3.
    """

    def __init__(self, in_channels: int, dim: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_channels, in_channels)  # on every pixel: a 1x1 convolution
        self.out = nn.Linear(in_channels, dim)

    def forward(self, features: Tensor) -> Tensor:
        # channels last, in memory too: the memories and the pool take whole rows of D numbers
        batch, _, height, width = features.shape
        rows_NF = features.permute(0, 2, 3, 1).flatten(0, 2)
        emb_ND = full_precision(self.out(F.relu(self.hidden(rows_NF))))
        emb_ND = emb_ND * emb_ND.norm(dim=1, keepdim=True).clamp(min=1e-12).reciprocal()
        return emb_ND.view(batch, height, width, -1).permute(0, 3, 1, 2)


class ContrastOutput(NamedTuple):
    """`loss` is for backward; the rest is detached and, except `projected`, the same on all ranks."""

    loss: Tensor  # W * (sum over this rank's anchors) / (global count), so that DDP's mean is the global mean
    value: Tensor  # global mean over qualifying anchors, 0 if there are none
    anchors: Tensor  # global number of qualifying anchors (at least one positive and one negative)
    empty: Tensor  # 1 if there was no qualifying anchor, else 0
    diagnostics: dict[str, Tensor]
    projected: Tensor  # (B, D, h, w), without gradient: what `enqueue_` takes


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
    """Pixel contrast with its memories; no learnable parameter, and kept outside the DDP module.

    Args:
        dim, num_classes, num_images: channels of the projection, classes, images of the training set.
        mode: "intra_image" (pairs within an image), "batch" (all images of the step) or "memory" (and the
        memories).
        memory, pixels_per_image, memory_size, cap_mb, storage_dtype: see PixelMemory; used in mode "memory".
        anchors_per_class: over the whole mini-batch of all ranks; anchor_sampler "random" or "seg_hard".
        positives, negatives: sampled pairs per anchor; pair_sampler "random", "hardest" or "semi_hard".
        pool_size: candidates shared by all anchors, the same number for each class; None = all candidates.
        seed: of all draws. all_gather (concatenates along axis 0 in rank order) and all_reduce (tensor,
        "sum") join the ranks, all with the same batch size; rank is this process's number.
    Errors: ValueError with the offending value.
    Source: ICCV 2021, sections 3.2 and 3.3.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_images: int,
        *,
        mode: str = "memory",
        memory: str = "both",
        anchors_per_class: int = 50,
        positives: int = 1024,
        negatives: int = 2048,
        anchor_sampler: str = "seg_hard",
        pair_sampler: str = "semi_hard",
        temperature: float = 0.1,
        pixels_per_image: int = 10,
        memory_size: int | None = None,
        cap_mb: float = 256,
        storage_dtype: torch.dtype = torch.float32,
        pool_size: int | None = 8192,
        seed: int = 0,
        all_gather: Gather | None = None,
        all_reduce: Reduce | None = None,
        rank: int = 0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        choices = ((mode, "mode", MODES), (anchor_sampler, "anchor_sampler", ANCHOR_SAMPLERS))
        for value, name, known in (*choices, (pair_sampler, "pair_sampler", PAIR_SAMPLERS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        for name, number in (
            ("anchors_per_class", anchors_per_class),
            ("positives", positives),
            ("negatives", negatives),
        ):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if pool_size is not None and pool_size < 2 * num_classes:
            raise ValueError(f"pool_size={pool_size} must be at least 2 per class, {2 * num_classes} here")
        if (all_gather is None) != (all_reduce is None):
            raise ValueError("all_gather and all_reduce must be given together")
        self.dim, self.num_classes, self.ignore_index = dim, num_classes, ignore_index
        self.mode, self.anchor_sampler, self.pair_sampler = mode, anchor_sampler, pair_sampler
        self.anchors_per_class, self.positives, self.negatives = anchors_per_class, positives, negatives
        self.temperature, self.pool_size, self.seed = temperature, pool_size, seed
        self.all_gather, self.all_reduce, self.rank = all_gather, all_reduce, rank
        self.memory = None
        if mode == "memory":
            self.memory = PixelMemory(
                dim, num_classes, num_images, memory=memory, pixels_per_image=pixels_per_image,
                memory_size=memory_size, cap_mb=cap_mb, storage_dtype=storage_dtype,
            )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        predictions: Tensor,
        indices: Tensor,
        step: int,
        project: Project | None = None,
    ) -> ContrastOutput:
        """Contrast loss of one step; changes no state.

        features (B, D, h, w): the projected embeddings, unit norm along D. Or, with `project` (the
        ProjectionHead, maps to maps), its input (B, F, h, w): then all pixels are projected without
        gradient, and the anchors, the only ones that get a gradient, once more with it, which costs a third
        of projecting everything with gradient.
        labels, predictions (B, h, w) integer, at the resolution of the features; indices (B,) dataset
        indices.
        """
        for name, value in (("labels", labels), ("predictions", predictions)):
            if value.shape != (features.shape[0], *features.shape[2:]):
                expected = (features.shape[0], *features.shape[2:])
                raise ValueError(f"{name} have shape {tuple(value.shape)}, the features need {expected}")
        with torch.no_grad():
            projected = features.detach() if project is None else project(features)
        class_BP = class_map(labels, self.num_classes, self.ignore_index)
        wrong_BP = predictions.flatten(1) != class_BP
        key_BP = pixel_keys(class_BP, indices, self.seed, step, 0)
        pixel_A, valid_A = select_anchors(
            class_BP, wrong_BP, key_BP, pixel_keys(class_BP, indices, self.seed, step, 1), self.num_classes,
            self.anchors_per_class, self.anchor_sampler, self.all_gather, self.rank,
        )  # fmt: skip
        pixels = class_BP.shape[1]
        anchor_AF = features.flatten(2)[pixel_A // pixels, :, pixel_A % pixels]
        if project is not None:  # as a map of one row, so that the head sees a map here as well
            anchor_AF = project(anchor_AF.T[None, :, None, :])[0, :, 0, :].T
        with torch.autocast(features.device.type, enabled=False):
            return self._loss(
                full_precision(anchor_AF), pixel_A, valid_A, projected, class_BP, key_BP, wrong_BP, step
            )

    def _loss(
        self, anchor_AD: Tensor, pixel_A: Tensor, valid_A: Tensor, projected: Tensor, class_BP: Tensor,
        key_BP: Tensor, wrong_BP: Tensor, step: int,
    ) -> ContrastOutput:  # fmt: skip
        pool = self._pool(full_precision(_rows(projected)), class_BP, key_BP, step)
        pool_valid_L = pool.class_L < self.num_classes
        every = -(-len(pool.class_L) // UNIFORMITY_ROWS)
        spread = uniformity(pool.emb_LD[::every], pool_valid_L[::every])
        class_A, hard_A = class_BP.flatten()[pixel_A], wrong_BP.flatten()[pixel_A]
        pixel_A = pixel_A + self.rank * class_BP.numel()
        chunk = max(SIMILARITIES_AT_ONCE // len(pool.class_L), 1)
        parts = zip(*(each.split(chunk) for each in (anchor_AD, pixel_A, class_A, valid_A, hard_A)))
        sums = torch.stack([self._chunk_sums(pool, step, class_BP.shape[1], *part) for part in parts]).sum(0)
        total = torch.cat(
            [sums.detach(), torch.ones_like(sums[:1])]
        )  # the last entry becomes the number of ranks
        if self.all_reduce is not None:
            total = self.all_reduce(total, "sum")
        mean = total / total[1].clamp(min=1)
        diagnostics = {
            "alignment": 2 - 2 * mean[2],  # mean |x - y|^2 of anchors and the positives in the pool
            "uniformity": spread,
            "positive_cosine": mean[2],
            "hardest_negative_cosine": mean[3],
            "hard_anchor_share": mean[4],
        }
        if self.memory is not None:
            diagnostics |= self.memory.fill()
        loss = sums[0] * total[5] / total[1].clamp(min=1)
        return ContrastOutput(loss, mean[0], total[1], (total[1] == 0).float(), diagnostics, projected)

    def _pool(self, emb_BPD: Tensor, class_BP: Tensor, key_BP: Tensor, step: int) -> Pool:
        if self.pool_size is None:
            return full_pool(emb_BPD, class_BP, self.num_classes, self.memory, self.all_gather)
        return balanced_pool(
            emb_BPD, class_BP, key_BP, self.num_classes, self.pool_size // self.num_classes, self.memory,
            self.seed, step, self.all_gather, self.all_reduce, self.rank,
        )  # fmt: skip

    def _chunk_sums(
        self, pool: Pool, step: int, pixels: int, anchor_AD: Tensor, pixel_A: Tensor, class_A: Tensor,
        valid_A: Tensor, hard_A: Tensor,
    ) -> Tensor:  # fmt: skip
        # Sums over qualifying anchors of: loss, 1, mean positive cosine, hardest negative cosine, wrongly
        # classified.
        device, num_classes, none = pixel_A.device, self.num_classes, float("-inf")
        class_A = torch.where(valid_A, class_A, num_classes)  # has no positives
        classes_C1 = torch.arange(num_classes + 1, device=device)[:, None]
        other_CL = (pool.class_L != classes_C1) & (pool.class_L < num_classes)
        negative_AL = other_CL[class_A]
        # the positives lie side by side: a window of `width` candidates from the start of the class
        place_W = torch.arange(pool.width, device=device)
        window_AW = F.pad(pool.start_C, (0, 1))[class_A][:, None] + place_W
        window_AW = window_AW.clamp(max=len(pool.class_L) - 1)
        positive_AW = place_W < F.pad(pool.count_C, (0, 1))[class_A][:, None]
        positive_AW = positive_AW & (pool.pixel_L[window_AW] != pixel_A[:, None])
        if self.mode == "intra_image":
            same_AL = (pool.pixel_L // pixels) == (pixel_A // pixels)[:, None]
            negative_AL, positive_AW = negative_AL & same_AL, positive_AW & same_AL.gather(1, window_AW)
        cosine_AL = anchor_AD @ pool.emb_LD.T
        with torch.no_grad():
            plain_AW = cosine_AL.gather(1, window_AW)
            plain_AL = torch.where(negative_AL, cosine_AL, none)
            key_A = fold(draw_state(self.seed, step, 3, device), pixel_A)
            far_AW = torch.where(positive_AW, -plain_AW, none)
            index_AK, positive_AK = select_pairs(far_AW, self.positives, self.pair_sampler, key_A)
            index_AM, negative_AM = select_pairs(plain_AL, self.negatives, self.pair_sampler, key_A)
        chosen = cosine_AL.gather(1, torch.cat([window_AW.gather(1, index_AK), index_AM], dim=1))
        loss_A, qualifies_A = pixel_contrast_loss(
            chosen[:, : index_AK.shape[1]],
            positive_AK,
            chosen[:, index_AK.shape[1] :],
            negative_AM,
            self.temperature,
        )
        mean_A = torch.where(positive_AW, plain_AW, 0).sum(1) / positive_AW.sum(1).clamp(min=1)
        facts_4A = torch.stack([torch.ones_like(mean_A), mean_A, plain_AL.amax(1), hard_A.to(mean_A.dtype)])
        return torch.cat([loss_A.sum()[None], torch.where(qualifies_A, facts_4A, 0).sum(1)])

    @torch.no_grad()
    def enqueue_(self, projected: Tensor, labels: Tensor, indices: Tensor, step: int) -> None:
        """Put this step's embeddings into the memories; after the loss. Nothing happens in the other modes.

        projected (B, D, h, w), `ContrastOutput.projected`; labels, indices and step as in forward.
        """
        if self.memory is None:
            return
        class_BP = class_map(labels, self.num_classes, self.ignore_index)
        key_BP = pixel_keys(class_BP, indices, self.seed, step, 0)
        self.memory.enqueue_(_rows(projected), class_BP, key_BP, indices, self.all_gather)


def _rows(projected: Tensor) -> Tensor:
    return projected.permute(0, 2, 3, 1).flatten(1, 2)  # (B, P, D)
