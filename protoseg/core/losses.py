"""Losses: cross-entropy at label resolution, and the two prototype losses PPC and PPD.

B images, C classes, N pixels; (H, W) label resolution, (h, w) embedding resolution.
A loss is a sum over pixels times `scale`. With `scale` = W / global count on each of W ranks, the mean of the
ranks' gradients, which is what DDP forms, is the gradient of the mean over all pixels of all ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AllReduce = Callable[[Tensor, str], Tensor]
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}  # full-resolution logits at a time
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
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits (align_corners=False) with labels at full resolution.

    logits (B, C, h, w), labels (B, H, W) integer. class_weights (C,). scale: from `loss_scale`; the default
    is that of these labels alone, which gives the mean that `F.cross_entropy` gives (0 without a labelled
    pixel). chunk_size: pixels at full resolution held at a time, in whole rows of one image (default from
    the sizes). Half types are promoted to float32. No (B, C, H, W) tensor exists at any time: each band of
    rows is upsampled, gives its loss and its gradient at the logits' resolution, and is gone. Returns a 0-d
    tensor.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if class_weights is None:
            class_weights = logits.new_ones(logits.shape[1])
            counted = None
        else:
            counted = class_weights
        if scale is None:
            scale = loss_scale([labels], ignore_index, counted)
        loss = _UpsampledCrossEntropy.apply(
            logits, labels, class_weights.to(logits.dtype), ignore_index, chunk_size
        )
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

    def part(self, at: slice) -> "Lerp":
        """Some of the output points."""
        return Lerp(self.low[at], self.high[at], self.weight[at])


class Widening:
    """Linear interpolation (…, w) → (…, W) along rows, and its adjoint.

    On a CPU as products with the banded matrix of the weights, block by block: several times faster than
    torch's kernels. On a GPU, where products may be TF32, by those.
    """

    def __init__(self, width: int, full_width: int, like: Tensor) -> None:
        self.width, self.full_width = width, full_width
        self.lerp = Lerp.between(width, full_width, like)
        self.blocks: list[tuple[slice, slice, Tensor]] = []  # columns of the map, at full size, weights
        if like.is_cuda:
            return
        for start in range(0, full_width, BLOCK):
            at = slice(start, min(start + BLOCK, full_width))
            low, high, weight = self.lerp.part(at)
            # One column more on either side: rounding may differ from that of the tensors.
            first, last = (int((end + 0.5) * width / full_width - 0.5) for end in (at.start, at.stop - 1))
            source = slice(max(first - 1, 0), min(last + 3, width))
            matrix = like.new_zeros(len(low), source.stop - source.start)
            matrix.scatter_add_(1, (low - source.start)[:, None], (1 - weight)[:, None])
            matrix.scatter_add_(1, (high - source.start)[:, None], weight[:, None])
            self.blocks.append((source, at, matrix.t().contiguous()))

    def widen(self, small_Crw: Tensor) -> Tensor:
        """(C, r, w) → (C, r, W)."""
        classes, size, _ = small_Crw.shape
        if not self.blocks:
            wanted = (size, self.full_width)
            return F.interpolate(small_Crw[None], wanted, mode="bilinear", align_corners=False)[0]
        rows_Xw = small_Crw.reshape(-1, self.width)
        full_XW = small_Crw.new_empty(len(rows_Xw), self.full_width)
        for source, at, matrix in self.blocks:
            torch.mm(rows_Xw[:, source], matrix, out=full_XW[:, at])
        return full_XW.view(classes, size, -1)

    def adjoint(self, error_CrW: Tensor) -> Tensor:
        """Gradient (C, r, w) from that of the widened rows (C, r, W)."""
        classes, size, _ = error_CrW.shape
        if self.blocks:
            error_XW = error_CrW.reshape(-1, self.full_width)
            small_Xw = error_CrW.new_zeros(len(error_XW), self.width)
            for source, at, matrix in self.blocks:
                small_Xw[:, source].addmm_(error_XW[:, at], matrix.t())
            return small_Xw.view(classes, size, -1)
        if torch.are_deterministic_algorithms_enabled():
            # The fused kernel adds in no fixed order on a GPU; index_add_ has a mode that does.
            small = error_CrW.new_zeros(classes, size, self.width)
            _add_lerp_adjoint_(small, 2, error_CrW, self.lerp)
            return small
        return torch.ops.aten.upsample_bilinear2d_backward(
            error_CrW[None], [size, self.full_width], [1, classes, size, self.width], False, None, None
        )[0]


def upsampled_rows(map_Chw: Tensor, columns: Widening, rows: Lerp) -> Tensor:
    """Some rows of the map at full size (C, r, W): bilinear, align_corners=False, exact at a band's rim."""
    weight_r1 = rows.weight[:, None]
    return columns.widen(torch.lerp(map_Chw[:, rows.low], map_Chw[:, rows.high], weight_r1))


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies. The gradient is formed in forward, since the loss is one number."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weight_C: Tensor,
        ignore_index: int,
        chunk_size: int | None,
    ) -> Tensor:
        batch, num_classes, height, width = logits.shape
        full_height, full_width = labels.shape[-2:]
        if chunk_size is None:
            elements = CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS["cpu"])
            chunk_size = elements // num_classes
        band = max(1, chunk_size // full_width)
        rows = Lerp.between(height, full_height, logits)
        columns = Widening(width, full_width, logits)
        with_grad = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits if with_grad else logits[:0])
        loss = logits.new_zeros(())
        for image in range(batch):
            for start in range(0, full_height, band):
                at = slice(start, min(start + band, full_height))
                piece = rows.part(at)
                full_Crw = upsampled_rows(logits[image], columns, piece)
                label_rw = labels[image, at].long()
                labelled_rw = label_rw != ignore_index
                label_1rw = label_rw.masked_fill(~labelled_rw, 0)[None]
                weight_rw = weight_C[label_1rw[0]].masked_fill(~labelled_rw, 0)
                own_rw, shift_rw = full_Crw.gather(0, label_1rw)[0], full_Crw.amax(0)
                exp_Crw = full_Crw.sub_(shift_rw).exp_()  # in place: each pass over memory counts
                sum_rw = exp_Crw.sum(0)
                loss = loss + ((sum_rw.log() + (shift_rw - own_rw)) * weight_rw).sum()
                if with_grad:
                    error_Crw = exp_Crw.mul_(weight_rw / sum_rw).scatter_add_(0, label_1rw, -weight_rw[None])
                    _add_lerp_adjoint_(gradient[image], 1, columns.adjoint(error_Crw), piece)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None


def _add_lerp_adjoint_(target: Tensor, dim: int, error: Tensor, lerp: Lerp) -> None:
    """Add to `target` what a linear interpolation along `dim` sends back."""
    weight = lerp.weight[:, None] if dim == 1 else lerp.weight
    target.index_add_(dim, lerp.low, error * (1 - weight))
    target.index_add_(dim, lerp.high, error * weight)


def _summed_with_world(total: Tensor, all_reduce: AllReduce | None) -> tuple[Tensor, Tensor]:
    """The sum of a 0-d tensor over ranks, and the number of ranks, in one collective."""
    both = torch.stack([total, torch.ones_like(total)])
    if all_reduce is not None:
        both = all_reduce(both, "sum")
    return both[0], both[1]
