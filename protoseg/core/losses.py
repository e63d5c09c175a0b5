"""Losses: cross-entropy at label resolution, and the two prototype losses PPC and PPD.

B images, C classes, N pixels; (H, W) label resolution, (h, w) embedding resolution.
A loss is a sum over pixels times `scale`. With `scale` = W / global count on each of W ranks, the mean of the
ranks' gradients, which is what DDP forms, is the gradient of the mean over all pixels of all ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.core.ranks import AllReduce, reduced
from protoseg.core.similarity import at_least_single

LOGITS_AT_ONCE = {"cpu": 2**19, "cuda": 2**28}  # full-resolution logits at a time: what a cache, 1 GB holds
BLOCK = 128  # columns at full resolution of one product


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
    rows, columns = (nearest_cells(n, full, labels.device) for n, full in zip(size, labels.shape[-2:]))
    return labels[:, rows[:, None], columns]


def nearest_cells(size: int, full: int, device: torch.device | None = None) -> Tensor:
    """(size,) int64: for each cell of one axis, that of `full` cells of the same axis under its centre.

    The one rule for taking values from a map of another size, up or down ("nearest-exact" of torch).
    """
    return ((2 * torch.arange(size, device=device) + 1) * full).div(2 * size, rounding_mode="floor")


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
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits (align_corners=False) with labels at full resolution.

    logits (B, C, h, w), labels (B, H, W) integer. class_weights (C,). scale: from `loss_scale`; the default
    is that of these labels alone, which gives the mean that `F.cross_entropy` gives (0 without a labelled
    pixel). Half types are promoted to float32. No (B, C, H, W) tensor exists at any time: each band of rows
    (on a GPU also of whole images, up to 1 GB) is upsampled, gives its loss and its gradient at the logits'
    resolution, and is gone. Returns a 0-d tensor.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_single(logits)
        if class_weights is None:
            class_weights = logits.new_ones(logits.shape[1])
            counted = None
        else:
            counted = class_weights
        if scale is None:
            scale = loss_scale([labels], ignore_index, counted)
        loss = _UpsampledCrossEntropy.apply(logits, labels, class_weights.to(logits.dtype), ignore_index)
        return loss * scale.to(loss.dtype)


class Lerp(NamedTuple):
    """Linear interpolation along one axis: out_j = (1 − weight_j) · in[low_j] + weight_j · in[high_j]."""

    low: Tensor
    high: Tensor
    weight: Tensor

    @staticmethod
    def between(size: int, full: int, like: Tensor) -> "Lerp":
        """From `size` to `full` points, as align_corners=False places them."""
        at = (torch.arange(full, device=like.device, dtype=like.dtype) + 0.5) * (size / full) - 0.5
        at = at.clamp(min=0)
        low = at.floor().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        return Lerp(low.long(), high.long(), at - low)

    def matrix(self, size: int, first: int = 0) -> Tensor:
        """The weights as a matrix (output points, `size` input points from `first` on)."""
        matrix = self.weight.new_zeros(len(self.low), size)
        matrix.scatter_add_(1, (self.low - first)[:, None], (1 - self.weight)[:, None])
        return matrix.scatter_add_(1, (self.high - first)[:, None], self.weight[:, None])

    def part(self, at: slice) -> "Lerp":
        """Some of the output points."""
        return Lerp(self.low[at], self.high[at], self.weight[at])


class Widening:
    """Linear interpolation (…, w) → (…, W) along rows, and its adjoint.

    On a CPU as products with the banded matrix of the weights, block by block: several times faster than
    torch's kernels. On a GPU, where products may be TF32, values come from torch's kernel; for gradients, as
    everywhere, a product will do, faster than a kernel that adds each number in four places.
    """

    def __init__(self, width: int, full_width: int, like: Tensor) -> None:
        self.width, self.full_width = width, full_width
        self.on_gpu = like.is_cuda
        lerp = Lerp.between(width, full_width, like)
        self.blocks: list[tuple[slice, slice, Tensor]] = []  # columns of the map, at full size, weights
        if self.on_gpu:
            self.blocks.append((slice(0, width), slice(0, full_width), lerp.matrix(width).t()))
            return
        for start in range(0, full_width, BLOCK):
            at = slice(start, min(start + BLOCK, full_width))
            # One column more on either side: rounding may differ from that of the tensors.
            first, last = (int((end + 0.5) * width / full_width - 0.5) for end in (at.start, at.stop - 1))
            source = slice(max(first - 1, 0), min(last + 3, width))
            matrix = lerp.part(at).matrix(source.stop - source.start, source.start)
            self.blocks.append((source, at, matrix.t().contiguous()))

    def widen(self, small_Xrw: Tensor) -> Tensor:
        """(…, r, w) → (…, r, W)."""
        shape = (*small_Xrw.shape[:-1], self.full_width)
        if self.on_gpu:
            wanted = (shape[-2], self.full_width)
            maps_1Xrw = small_Xrw.reshape(1, -1, *small_Xrw.shape[-2:])
            return F.interpolate(maps_1Xrw, wanted, mode="bilinear", align_corners=False).view(shape)
        rows_Xw = small_Xrw.reshape(-1, self.width)
        full_XW = small_Xrw.new_empty(len(rows_Xw), self.full_width)
        for source, at, matrix in self.blocks:
            torch.mm(rows_Xw[:, source], matrix, out=full_XW[:, at])
        return full_XW.view(shape)

    def adjoint(self, error_XrW: Tensor) -> Tensor:
        """Gradient (…, r, w) from that of the widened rows (…, r, W)."""
        error_XW = error_XrW.reshape(-1, self.full_width)
        small_Xw = error_XrW.new_zeros(len(error_XW), self.width)
        for source, at, matrix in self.blocks:
            small_Xw[:, source].addmm_(error_XW[:, at], matrix.t())
        return small_Xw.view(*error_XrW.shape[:-1], self.width)


def upsampled_rows(map_Xhw: Tensor, columns: Widening, rows: Lerp) -> Tensor:
    """Some rows of maps (…, h, w) at full size (…, r, W): align_corners=False, exact at a band's rim."""
    low, high = map_Xhw[..., rows.low, :], map_Xhw[..., rows.high, :]
    return columns.widen(torch.lerp(low, high, rows.weight[:, None]))


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies. The gradient is formed in forward, since the loss is one number."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weight_C: Tensor,
        ignore_index: int,
    ) -> Tensor:
        batch, num_classes, height, width = logits.shape
        full_height, full_width = labels.shape[-2:]
        pixels = LOGITS_AT_ONCE.get(logits.device.type, LOGITS_AT_ONCE["cpu"]) // num_classes
        band = max(1, pixels // full_width)
        together = max(1, pixels // (full_height * full_width)) if logits.is_cuda else 1  # images
        rows = Lerp.between(height, full_height, logits)
        columns = Widening(width, full_width, logits)
        with_grad = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits if with_grad else logits[:0])
        loss = logits.new_zeros(())
        for first in range(0, batch, together):
            for start in range(0, full_height, band):
                at = slice(start, min(start + band, full_height))
                piece = rows.part(at)
                full_bCrW = upsampled_rows(logits[first : first + together], columns, piece)
                label_brW = labels[first : first + together, at].long()
                labelled_brW = label_brW != ignore_index
                label_b1rW = label_brW.masked_fill(~labelled_brW, 0)[:, None]
                weight_b1rW = weight_C[label_b1rW].masked_fill(~labelled_brW[:, None], 0)
                own_b1rW, shift_b1rW = full_bCrW.gather(1, label_b1rW), full_bCrW.amax(1, keepdim=True)
                exp_bCrW = full_bCrW.sub_(shift_b1rW).exp_()  # in place: each pass over memory counts
                sum_b1rW = exp_bCrW.sum(1, keepdim=True)
                loss = loss + ((sum_b1rW.log() + (shift_b1rW - own_b1rW)) * weight_b1rW).sum()
                if with_grad:
                    error_bCrW = exp_bCrW.mul_(weight_b1rW / sum_b1rW)
                    small_bCrw = columns.adjoint(error_bCrW.scatter_add_(1, label_b1rW, -weight_b1rW))
                    _add_lerp_adjoint_(gradient[first : first + together], small_bCrw, piece)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None


def _add_lerp_adjoint_(target_bChw: Tensor, error_bCrw: Tensor, rows: Lerp) -> None:
    """Add to `target` what a linear interpolation along h sends back."""
    if target_bChw.is_cuda:  # where index_add_ adds in no fixed order
        target_bChw.add_(rows.matrix(target_bChw.shape[2]).t() @ error_bCrw)
        return
    weight_r1 = rows.weight[:, None]
    target_bChw.index_add_(2, rows.low, error_bCrw * (1 - weight_r1))
    target_bChw.index_add_(2, rows.high, error_bCrw * weight_r1)


def _summed_with_world(total: Tensor, all_reduce: AllReduce | None) -> tuple[Tensor, Tensor]:
    """The sum of a 0-d tensor over ranks, and the number of ranks, in one collective."""
    both = reduced(torch.stack([total, torch.ones_like(total)]), all_reduce)
    return both[0], both[1]
