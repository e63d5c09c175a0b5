"""Losses: cross-entropy at label resolution, and the two prototype losses PPC and PPD.

B images, C classes, N pixels; (H, W) label resolution, (h, w) embedding resolution.
A loss is a sum over pixels times `scale`. With `scale` = W / global count on each of W ranks, the mean of the
ranks' gradients, which is what DDP forms, is the gradient of the mean over all pixels of all ranks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

AllReduce = Callable[[Tensor, str], Tensor]


def loss_scale(
    labels: Sequence[Tensor],
    ignore_index: int,
    class_weights: Tensor | None = None,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """W / max(number of labelled pixels, 1), counted over all micro-batches `labels` and all W ranks.

    labels: integer tensors of any shape. class_weights: (C,), then the sum of the pixels' weights is the
    denominator (1 where that is 0). Returns a 0-d float64 tensor; one all-reduce, no host sync.
    """
    parts = []
    for each in labels:
        labelled = each != ignore_index
        if class_weights is None:
            parts.append(labelled.sum())
        else:
            weight = class_weights.double()[each.long().masked_fill(~labelled, 0)]
            parts.append(weight.masked_fill(~labelled, 0).sum())
    total = torch.stack(parts).double().sum()
    total, world = _summed_with_world(total, all_reduce)
    denominator = total.clamp(min=1) if class_weights is None else torch.where(total > 0, total, 1.0)
    return world / denominator


def downsample_labels(labels: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Labels (B, H, W) at another resolution (h, w): the label under the centre of each cell.

    This is where bilinear interpolation with align_corners=False puts the embedding's pixels. Same dtype.
    """
    rows, columns = (
        ((2 * torch.arange(n, device=labels.device) + 1) * full).div(2 * n, rounding_mode="floor")
        for n, full in zip(size, labels.shape[-2:])
    )
    return labels[:, rows[:, None], columns]


def ppc_loss(
    log_sum_exp_N: Tensor, positive_N: Tensor, labelled_N: Tensor, temperature: float, scale: Tensor
) -> Tensor:
    """Pixel-prototype contrast: scale · Σ over labelled pixels of −log softmax at the assigned prototype.

    log_sum_exp_N: log Σ exp(iᵀp/τ) over every prototype p, positive included. positive_N: iᵀp⁺.
    labelled_N: bool. Returns a 0-d tensor (ProtoSeg, CVPR 2022, Eq. 11, with the temperature τ).
    """
    loss_N = log_sum_exp_N - positive_N / temperature
    return scale * torch.where(labelled_N, loss_N, 0).sum()


def ppd_loss(positive_N: Tensor, labelled_N: Tensor, scale: Tensor) -> Tensor:
    """Pixel-prototype distance: scale · Σ over labelled pixels of (1 − iᵀp⁺)² (ProtoSeg, Eq. 12)."""
    return scale * torch.where(labelled_N, (1 - positive_N).square(), 0).sum()


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    class_weights: Tensor | None = None,
    scale: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits (align_corners=False) with labels at full resolution.

    logits (B, C, h, w), labels (B, H, W) integer. class_weights (C,). scale: from `loss_scale`; by default
    that of these labels alone, which gives the mean that `F.cross_entropy` gives (0 without a labelled pixel).
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if scale is None:
            scale = loss_scale([labels], ignore_index, class_weights)
        full = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        weight = None if class_weights is None else class_weights.to(full.dtype)
        loss = F.cross_entropy(full, labels.long(), weight, ignore_index=ignore_index, reduction="sum")
        return loss * scale.to(loss.dtype)


def _summed_with_world(total: Tensor, all_reduce: AllReduce | None) -> tuple[Tensor, Tensor]:
    """The sum of a 0-d tensor over ranks, and the number of ranks, in one collective."""
    both = torch.stack([total, torch.ones_like(total)])
    if all_reduce is not None:
        both = all_reduce(both, "sum")
    return both[0], both[1]
