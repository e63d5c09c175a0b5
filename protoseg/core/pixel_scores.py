"""What a training step needs of the similarities of pixels and prototypes, with its gradient.

N pixels, C classes, K prototypes per class, D channels, M = K·C prototypes; nothing of N × C × K numbers is
ever held. Pixels go through in chunks of n; layouts as in `similarity`. The gradient goes to the features
alone.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoseg.core import similarity
from protoseg.core.similarity import (
    MIN_NORM,
    at_least_single,
    k_major,
    layout,
    own_similarities,
    rows_and_lengths,
)

GATHERED_BYTES = 3 * 2**19  # of the table of prototypes at a time: about what a core keeps near


class PrototypeScores(NamedTuple):
    """What `prototype_scores` returns."""

    logits: Tensor  # (B, C, h, w), scale_C · max over k of iᵀp_ck + offset_C
    own_NK: Tensor  # iᵀp_yk for the pixel's own class y; class 0 where the label is −1
    right_N: Tensor  # bool, whether the nearest prototype of all is one of the pixel's own class
    emb_ND: Tensor  # unit vectors, detached
    drawn_PD: Tensor  # unit vectors of the drawn pixels, or of all, with a gradient


def prototype_scores(
    features: Tensor,
    protos_CKD: Tensor,
    labels_N: Tensor,
    live_C: Tensor,
    scale_C: Tensor,
    offset_C: Tensor,
    score_dtype: torch.dtype | None = None,
    drawn_P: Tensor | None = None,
) -> PrototypeScores:
    """Class scores, own-class similarities, and which pixels are nearest to a prototype of their own class.

    features (B, D, h, w); half types are promoted to float32, double stays double, and the prototypes follow.
    protos_CKD: unit length. labels_N: int64, −1 takes no part. live_C: bool, classes that have prototypes;
    where not, the logit is offset_C and the similarities −1. score_dtype: of the product with all M
    prototypes, for example bfloat16 on a GPU; own_NK is in the features' (promoted) dtype nevertheless.
    drawn_P: int64, which of the N pixels are wanted as unit vectors with a gradient; None: all.
    Memory: O(N·(C + K + D)) held for backward, n·M in passing. Of prototypes that tie for the maximum the
    first one gets the gradient.
    """
    protos_CKD = protos_CKD.detach().to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        logits_BCP, *rest = _PrototypeScores.apply(
            features, protos_CKD, labels_N, live_C, scale_C, offset_C, score_dtype, drawn_P
        )
    return PrototypeScores(logits_BCP.unflatten(2, features.shape[2:]), *rest)


class _PrototypeScores(torch.autograd.Function):
    """The gradient of the maxima and of the own class touches one prototype per class and K more per pixel.

    A CPU gathers these rows; for a GPU a second product is faster.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        protos_CKD: Tensor,
        labels_N: Tensor,
        live_C: Tensor,
        scale_C: Tensor,
        offset_C: Tensor,
        score_dtype: torch.dtype | None,
        drawn_P: Tensor | None,
    ) -> tuple[Tensor, ...]:
        num_classes, num_prototypes, _ = protos_CKD.shape
        batch, pixels = len(features), features.shape[2] * features.shape[3]
        emb_ND, length_N1 = rows_and_lengths(features)
        rows_MD = k_major(protos_CKD, score_dtype)
        scale_C1 = torch.where(live_C, scale_C, 0).to(emb_ND.dtype)[:, None]
        offset_C1 = offset_C.to(emb_ND.dtype)[:, None]
        hidden_C1 = -3.0 * (~live_C).to(emb_ND.dtype)[:, None]  # a class that is not live is never nearest
        # Not from TF32 or half products: the clustering needs these exactly.
        own_from_product = rows_MD.dtype == emb_ND.dtype and not emb_ND.is_cuda
        label_N = labels_N.clamp(min=0)

        with_grad = ctx.needs_input_grad[0]
        logits_BCP = emb_ND.new_empty(batch, num_classes, pixels)
        if own_from_product:
            own_NK = emb_ND.new_empty(len(emb_ND), num_prototypes)
        else:
            own_NK = own_similarities(emb_ND, protos_CKD, label_N)
        right_N = torch.empty_like(labels_N, dtype=torch.bool)
        best_CN = torch.empty(
            (num_classes if with_grad else 0, len(emb_ND)),
            dtype=torch.int16 if len(rows_MD) < 2**15 else torch.int32,
            device=emb_ND.device,
        )
        chunk = similarity.pixels_at_once(emb_ND, len(rows_MD))
        # The big buffer is made once: fresh memory for each chunk can cost more than the product itself.
        product_X = rows_MD.new_empty(len(rows_MD) * min(chunk, len(emb_ND)))
        for images, at, flat in _pieces(batch, pixels, chunk):
            size = flat.stop - flat.start
            product_Mn = product_X[: len(rows_MD) * size].view(-1, size)
            torch.mm(rows_MD, emb_ND[flat].to(rows_MD.dtype).t(), out=product_Mn)
            sims_KCn = product_Mn.to(emb_ND.dtype).view(num_prototypes, num_classes, size)
            if with_grad:
                top_Cn, row_Cn = _max_and_row(sims_KCn)
                best_CN[:, flat] = row_Cn
            else:
                top_Cn = sims_KCn.amax(0)
            logits_bCp = logits_BCP[images, :, at]
            logits_bCp.copy_(torch.addcmul(offset_C1, _as_maps(top_Cn, logits_bCp), scale_C1))
            label_1n = label_N[None, flat]
            right_N[flat] = (top_Cn.gather(0, label_1n) >= (top_Cn + hidden_C1).amax(0, keepdim=True))[0]
            if own_from_product:
                own_NK[flat] = sims_KCn.gather(1, label_1n.expand(num_prototypes, 1, size))[:, 0].t()
        taking_part_N = (labels_N >= 0) & live_C[label_N]
        # Not in place: torch 2.11 compiles that without own_NK's gradient.
        own_NK = own_NK.masked_fill(~live_C[label_N][:, None], -1.0)
        right_N = right_N & taking_part_N
        # A copy, so that the prototypes may move before backward.
        table_MD = k_major(protos_CKD * live_C[:, None, None])
        drawn_PD = emb_ND if drawn_P is None else emb_ND[drawn_P]
        detached_ND = emb_ND.detach()
        ctx.save_for_backward(emb_ND, length_N1, best_CN, label_N, table_MD, scale_C1, drawn_P)
        ctx.source = features.shape, features.dtype, layout(features)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(right_N, detached_ND)
        return logits_BCP, own_NK, right_N, detached_ND, drawn_PD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _PrototypeScores._gradient(ctx, grads[0], grads[1], grads[4]), *[None] * 7

    @staticmethod
    def _gradient(
        ctx: Any, grad_BCP: Tensor | None, grad_own_NK: Tensor | None, grad_drawn_PD: Tensor | None
    ) -> Tensor:
        emb_ND, length_N1, best_CN, label_N, table_MD, scale_C1, drawn_P = ctx.saved_tensors
        shape, dtype, memory_format = ctx.source
        batch, pixels, num_classes = shape[0], shape[2] * shape[3], len(best_CN)
        if grad_BCP is None:
            grad_BCP = emb_ND.new_zeros(batch, num_classes, pixels)
        if grad_own_NK is None:
            grad_own_NK = emb_ND.new_zeros(len(emb_ND), len(table_MD) // num_classes)
        first_K = torch.arange(0, len(table_MD), num_classes, device=table_MD.device)
        grad = torch.empty(shape, dtype=dtype, device=emb_ND.device, memory_format=memory_format)
        grad_BDP = grad.flatten(2)
        for images, at, flat in _pieces(batch, pixels, ctx.chunk):
            weight_Cn = grad_BCP[images, :, at].transpose(0, 1).flatten(1) * scale_C1
            rows_nD = _weighted_rows(
                table_MD,
                (best_CN[:, flat].t(), weight_Cn.t()),
                (label_N[flat, None] + first_K, grad_own_NK[flat]),
            )
            if grad_drawn_PD is not None and drawn_P is None:
                rows_nD.add_(grad_drawn_PD[flat])
            target_bDp = grad_BDP[images, :, at]
            rows_nD = _through_length_(rows_nD, emb_ND[flat], length_N1[flat])
            target_bDp.copy_(_as_maps(rows_nD.t(), target_bDp))
        if grad_drawn_PD is not None and drawn_P is not None:
            rows_PD = _through_length_(grad_drawn_PD.clone(), emb_ND[drawn_P], length_N1[drawn_P])
            image_P, at_P = drawn_P.div(pixels, rounding_mode="floor"), drawn_P.remainder(pixels)
            grad_BDP.transpose(1, 2).index_put_((image_P, at_P), rows_PD.to(dtype), accumulate=True)
        return grad


def _through_length_(grad_nD: Tensor, emb_nD: Tensor, length_n1: Tensor) -> Tensor:
    """In place, the gradient of x from that of x / ‖x‖; where the length was clamped, of x / constant."""
    along_n1 = torch.linalg.vecdot(grad_nD, emb_nD)[:, None] * (length_n1 > MIN_NORM)
    return grad_nD.addcmul_(emb_nD, along_n1, value=-1).div_(length_n1)


def log_sum_exp(
    emb_ND: Tensor,
    protos_CKD: Tensor,
    temperature: float,
    live_C: Tensor | None = None,
    score_dtype: torch.dtype | None = None,
) -> Tensor:
    """log Σ exp(iᵀp/τ) over the prototypes of all live classes (N,): the denominator of PPC.

    Arguments as in `prototype_scores`, emb_ND unit length. Its gradient, N·D numbers, is formed in forward,
    since the similarities are at hand.
    """
    emb_ND = at_least_single(emb_ND)
    if live_C is None:
        live_C = torch.ones(len(protos_CKD), dtype=torch.bool, device=emb_ND.device)
    protos_CKD = protos_CKD.detach().to(emb_ND.dtype)
    with torch.autocast(emb_ND.device.type, enabled=False):
        return _LogSumExp.apply(emb_ND, protos_CKD, temperature, live_C, score_dtype)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        emb_ND: Tensor,
        protos_CKD: Tensor,
        temperature: float,
        live_C: Tensor,
        score_dtype: torch.dtype | None,
    ) -> Tensor:
        rows_MD = k_major(protos_CKD, score_dtype) / temperature
        lowest_C = emb_ND.new_zeros(len(live_C)).masked_fill(~live_C, torch.finfo(emb_ND.dtype).min)
        lowest_M1 = lowest_C.repeat(protos_CKD.shape[1])[:, None]
        log_sum_exp_N = emb_ND.new_empty(len(emb_ND))
        grad_ND = torch.empty_like(emb_ND) if ctx.needs_input_grad[0] else None
        chunk = similarity.pixels_at_once(emb_ND, len(rows_MD))
        product_X = rows_MD.new_empty(len(rows_MD) * min(chunk, len(emb_ND)))
        for start in range(0, len(emb_ND), chunk):
            at = slice(start, min(start + chunk, len(emb_ND)))
            size = at.stop - start
            product_Mn = product_X[: len(rows_MD) * size].view(-1, size)
            torch.mm(rows_MD, emb_ND[at].to(rows_MD.dtype).t(), out=product_Mn)
            sims_Mn = product_Mn.to(emb_ND.dtype).add_(lowest_M1)
            shift_n = sims_Mn.amax(0)
            exp_Mn = sims_Mn.sub_(shift_n).exp_()
            sum_n = exp_Mn.sum(0)
            log_sum_exp_N[at] = sum_n.log() + shift_n
            if grad_ND is not None:
                torch.div(exp_Mn.to(rows_MD.dtype).t() @ rows_MD, sum_n[:, None], out=grad_ND[at])
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return log_sum_exp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0][:, None], None, None, None, None


def _pieces(batch: int, pixels: int, chunk: int) -> Iterator[tuple[slice, slice, slice]]:
    """At most `chunk` pixels at a time, of one image or of whole ones.

    Yields the images, the pixels within them, and the same pixels in a row of all.
    """
    images = max(1, chunk // max(pixels, 1))
    for image in range(0, batch, images):
        for start in range(0, pixels, chunk):
            stop = min(start + chunk, pixels)
            last = min(image + images, batch) - 1
            yield (
                slice(image, last + 1),
                slice(start, stop),
                slice(image * pixels + start, last * pixels + stop),
            )


def _max_and_row(sims_KCn: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over k (C, n), and its row k·C + c, the first one of those that tie."""
    num_prototypes, num_classes, size = sims_KCn.shape
    if sims_KCn.is_cuda:
        top_Cn, k_Cn = sims_KCn.max(0)
        return top_Cn, k_Cn * num_classes + torch.arange(num_classes, device=k_Cn.device)[:, None]
    # Pooling over an image of K rows and C columns whose channels, the pixels, lie last in memory. `max` does
    # the same ten times slower.
    image_1nKC = sims_KCn.view(1, num_prototypes, num_classes, size).permute(0, 3, 1, 2)
    top_1n1C, row_1n1C = F.max_pool2d(image_1nKC, (num_prototypes, 1), return_indices=True)
    return top_1n1C[0, :, 0].t(), row_1n1C[0, :, 0].t()


def _as_maps(flat_Xn: Tensor, like_bYp: Tensor) -> Tensor:
    """(X, b·p) as (b, X, p)."""
    return flat_Xn.unflatten(1, (like_bYp.shape[0], like_bYp.shape[2])).transpose(0, 1)


def _weighted_rows(table_MD: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Σ over terms (row_nJ, weight_nJ) and j of weight_nj · table[row_nj] (n, D).

    No row may come twice for one n within a term.
    """
    size = len(terms[0][0])
    if table_MD.is_cuda:
        # Matrix units multiply the zeros faster than a GPU gathers n·J rows. No scatter_add_, whose order is
        # not fixed.
        dense_nM = table_MD.new_zeros(size, len(table_MD))
        for row_nJ, weight_nJ in terms:
            row_nJ = row_nJ.long()
            dense_nM.scatter_(1, row_nJ, dense_nM.gather(1, row_nJ) + weight_nJ)
        return dense_nM @ table_MD
    # Blocks of columns, so that the part of the table that belongs to their classes stays in the cache for
    # all pixels, and what is transposed as well.
    blocks = min(-(-table_MD.numel() * table_MD.itemsize // GATHERED_BYTES), terms[0][0].shape[1])
    rows = [row_nJ.tensor_split(blocks, 1) for row_nJ, _ in terms]
    weights = [weight_nJ.tensor_split(blocks, 1) for _, weight_nJ in terms]
    parts = []
    for block in range(blocks):
        counts = [row[block].shape[1] for row in rows]
        row_nj = torch.empty(size, sum(counts), dtype=torch.int32, device=table_MD.device)
        weight_nj = table_MD.new_empty(row_nj.shape)
        for i, (row_nx, weight_nx) in enumerate(zip(row_nj.split(counts, 1), weight_nj.split(counts, 1))):
            row_nx.copy_(rows[i][block])
            weight_nx.copy_(weights[i][block])
        parts.append(F.embedding_bag(row_nj, table_MD, per_sample_weights=weight_nj, mode="sum"))
    return functools.reduce(Tensor.add_, parts)
