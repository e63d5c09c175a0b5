"""Similarities of pixels and prototypes, without ever holding all of them.

N pixels, C classes, K prototypes per class, D channels; M = K·C rows, prototype k of class c in row k·C + c.
Pixels go through in chunks of n. Similarities are laid out (K, C, n): reductions over K or M then run along
whole rows of pixels, which is what vector units and GPUs like.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_NORM = 1e-6  # below this a vector has no direction
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}  # similarities at a time, by device
GATHERED_BYTES = 3 * 2**19  # of the table of prototypes at a time: about what a core keeps near
SMALLEST_CHUNK, LARGEST_CHUNK = {"cpu": 512, "cuda": 4096}, {"cpu": 1536, "cuda": 2**18}  # pixels


def at_least_single(x: Tensor) -> Tensor:
    """Half types become float32; float32 and double stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x / max(‖x‖, 1e-6) along `dim`; half types become float32, double stays double."""
    return F.normalize(at_least_single(x), dim=dim, eps=MIN_NORM)


def unit_rows(features: Tensor) -> Tensor:
    """The pixels of a map (B, D, h, w) as unit vectors (N, D), N = B·h·w; dtypes as in `unit`."""
    if features.requires_grad and torch.is_grad_enabled():
        return unit(features.permute(0, 2, 3, 1).flatten(0, 2))
    return _rows_and_lengths(features)[0]


def _rows_and_lengths(features: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (N, D) and the lengths (N, 1) that were divided by: no N × D tensor besides."""
    batch, dim, height, width = features.shape
    emb_ND = features.new_empty(
        batch * height * width, dim, dtype=torch.promote_types(features.dtype, torch.float32)
    )
    emb_ND.view(batch, height, width, dim).copy_(features.permute(0, 2, 3, 1))
    length_N1 = emb_ND.norm(dim=1, keepdim=True).clamp_(min=MIN_NORM)
    return emb_ND.div_(length_N1), length_N1


class PrototypeScores(NamedTuple):
    """What `prototype_scores` returns."""

    classes_NC: Tensor  # scale · max over k of iᵀp_ck; not_live for classes that are not live
    own_NK: Tensor  # iᵀp_yk for the pixel's own class y; class 0 where the label is −1
    log_sum_exp_N: Tensor  # log Σ exp(iᵀp/τ) over the prototypes of all live classes


class MapScores(NamedTuple):
    """What `map_scores` returns: the same, with classes as a map, and the embeddings."""

    classes: Tensor  # (B, C, h, w)
    own_NK: Tensor
    log_sum_exp_N: Tensor
    emb_ND: Tensor  # unit vectors, detached


def class_scores(
    emb_ND: Tensor,
    protos_CKD: Tensor,
    live_C: Tensor | None = None,
    *,
    score_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """max over k of iᵀp_ck (N, C), −1 for classes that are not live: all that inference needs.

    Arguments as in `prototype_scores`. Plain operations on chunks of pixels: can be exported, and
    differentiated (then autograd keeps N × CK).
    """
    emb_ND = at_least_single(emb_ND)
    num_classes, num_prototypes, _ = protos_CKD.shape
    rows_MD = _k_major(protos_CKD, score_dtype or emb_ND.dtype)
    chunk = _chunk(emb_ND, len(rows_MD), chunk_size)

    def best_Cn(chunk_nD: Tensor) -> Tensor:
        sims_Mn = rows_MD @ chunk_nD.to(rows_MD.dtype).t()
        return sims_Mn.view(num_prototypes, num_classes, -1).amax(0).to(emb_ND.dtype)

    with torch.autocast(emb_ND.device.type, enabled=False):
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            scores_CN = best_Cn(emb_ND)  # a graph for all sizes: the loop would be unrolled for this one
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            scores_CN = torch.cat([best_Cn(chunk_nD) for chunk_nD in emb_ND.split(chunk)], 1)
        else:
            # Results of their own would lie between the products and keep the heap from being used again:
            # gigabytes at 847 classes.
            scores_CN = emb_ND.new_empty(num_classes, len(emb_ND))
            for chunk_nD, target_Cn in zip(emb_ND.split(chunk), scores_CN.split(chunk, 1)):
                target_Cn.copy_(best_Cn(chunk_nD))
    return (scores_CN if live_C is None else scores_CN.masked_fill(~live_C[:, None], -1.0)).t()


def prototype_scores(
    emb_ND: Tensor,
    protos_CKD: Tensor,
    labels_N: Tensor,
    temperature: float = 0.1,
    live_C: Tensor | None = None,
    *,
    scale: float = 1.0,
    not_live: float = -1.0,
    score_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> PrototypeScores:
    """Class scores, own-class similarities and the log-sum-exp over all prototypes.

    emb_ND, protos_CKD: unit length; half types are promoted to float32, double stays double, and the
    prototypes follow the embeddings. labels_N: integer, −1 takes no part. live_C: bool, classes that have
    prototypes (default all). scale, not_live: see `PrototypeScores`. score_dtype: of the products with all M
    prototypes, for example bfloat16 on a GPU; own_NK and all sums are in the dtype of emb_ND nevertheless.
    chunk_size: pixels at a time (default from the sizes). Memory: O(N·(C + K + D)) held for backward, n·M
    in passing. The gradient goes to emb_ND only; of prototypes that tie for the maximum the first one gets
    it.
    """
    classes_BCP, *rest, _ = _scores(
        at_least_single(emb_ND), protos_CKD, labels_N, temperature, live_C, scale, not_live, score_dtype,
        chunk_size,
    )  # fmt: skip
    return PrototypeScores(classes_BCP[0].t(), *rest)


def map_scores(
    features: Tensor,
    protos_CKD: Tensor,
    labels_N: Tensor,
    temperature: float = 0.1,
    live_C: Tensor | None = None,
    *,
    scale: float = 1.0,
    not_live: float = -1.0,
    score_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> MapScores:
    """`prototype_scores` of a map (B, D, h, w), whose pixels are brought to unit length here.

    The same as `prototype_scores(unit_rows(features), …)`, with fewer N × D tensors and fewer transposes: the
    gradient of a chunk goes through the unit length and back into the map while it is at hand. protos_CKD
    must have unit length: longer ones can make exponentials overflow, as no maximum is subtracted.
    """
    classes_BCP, own_NK, log_sum_exp_N, emb_ND = _scores(
        features, protos_CKD, labels_N, temperature, live_C, scale, not_live, score_dtype, chunk_size
    )
    return MapScores(classes_BCP.unflatten(2, features.shape[2:]), own_NK, log_sum_exp_N, emb_ND)


def _scores(
    source: Tensor,
    protos_CKD: Tensor,
    labels_N: Tensor,
    temperature: float,
    live_C: Tensor | None,
    *options: Any,
) -> tuple[Any, ...]:
    if live_C is None:
        live_C = torch.ones(len(protos_CKD), dtype=torch.bool, device=source.device)
    protos_CKD = protos_CKD.detach().to(torch.promote_types(source.dtype, torch.float32))
    with torch.autocast(source.device.type, enabled=False):
        return _PrototypeScores.apply(source, protos_CKD, labels_N.long(), live_C, temperature, *options)


class _PrototypeScores(torch.autograd.Function):
    """Of rows (N, D) of unit length, or of a map (B, D, h, w).

    Forward already forms the gradient of the log-sum-exp, N·D numbers, since the similarities are at hand.
    Backward then needs no similarities again. What is left, the gradient of the maxima and of the own class,
    touches one prototype per class and K more per pixel: a CPU gathers these rows, two products with all
    prototypes in all; for a GPU a third product is faster.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        protos_CKD: Tensor,
        labels_N: Tensor,
        live_C: Tensor,
        temperature: float,
        scale: float,
        not_live: float,
        score_dtype: torch.dtype | None,
        chunk_size: int | None,
    ) -> tuple[Tensor | None, ...]:
        num_classes, num_prototypes, dim = protos_CKD.shape
        is_map = source.ndim == 4
        emb_ND, length_N1 = _rows_and_lengths(source) if is_map else (source, None)
        batch, pixels = (len(source), source.shape[2] * source.shape[3]) if is_map else (1, len(source))
        # A class that is not live shows another's prototypes, with weight 0: no overflow, no extra pass.
        shown_C = torch.where(live_C, torch.arange(num_classes, device=live_C.device), live_C.int().argmax())
        weight_M = live_C.to(emb_ND.dtype).repeat(num_prototypes)
        rows_MD = _k_major(protos_CKD[shown_C] / temperature, score_dtype)
        scale_C1 = scale * temperature * live_C[:, None].to(emb_ND.dtype)
        lowest_C1 = not_live * (~live_C[:, None]).to(emb_ND.dtype)
        weighted_DM = rows_MD.t() * weight_M.to(rows_MD.dtype)
        # No shift by the maximum where exponentials of cosines / τ, and their sum, cannot come near the ends
        # of the dtype. Rows, which the caller gives, are always shifted: they may be longer than they should.
        largest = math.log(torch.finfo(rows_MD.dtype).max) / 2
        shifts = not is_map or 1 / temperature + math.log(len(rows_MD)) > largest
        # Not from TF32 or half products: the clustering needs these exactly.
        own_from_product = rows_MD.dtype == emb_ND.dtype and not emb_ND.is_cuda
        label_N = labels_N.clamp(min=0)

        with_grad = ctx.needs_input_grad[0]
        classes_BCP = emb_ND.new_empty(batch, num_classes, pixels)
        own_NK = emb_ND.new_empty(len(emb_ND), num_prototypes)
        log_sum_exp_N = emb_ND.new_empty(len(emb_ND))
        best_CN = torch.empty(
            (num_classes if with_grad else 0, len(emb_ND)),
            dtype=torch.int16 if len(rows_MD) < 2**15 else torch.int32,
            device=emb_ND.device,
        )
        lse_grad_BDP = emb_ND.new_empty(batch if with_grad else 0, dim, pixels)
        chunk = _chunk(emb_ND, len(rows_MD), chunk_size)
        # The big buffer is made once: fresh memory for each chunk can cost more than the product itself.
        product_X = rows_MD.new_empty(len(rows_MD) * min(chunk, len(emb_ND)))
        for images, at, flat in _pieces(batch, pixels, chunk):
            size = flat.stop - flat.start
            product_Mn = product_X[: len(rows_MD) * size].view(-1, size)
            torch.mm(rows_MD, emb_ND[flat].to(rows_MD.dtype).t(), out=product_Mn)
            sims_Mn = product_Mn.to(emb_ND.dtype)  # divided by τ
            sims_KCn = sims_Mn.view(num_prototypes, num_classes, size)
            if with_grad:
                top_Cn, row_Cn = _max_and_row(sims_KCn)
                best_CN[:, flat] = row_Cn
            else:
                top_Cn = sims_KCn.amax(0)
            classes_bCp = classes_BCP[images, :, at]
            classes_bCp.copy_(torch.addcmul(lowest_C1, _as_maps(top_Cn, classes_bCp), scale_C1))
            if own_from_product:
                index_K1n = label_N[flat].expand(num_prototypes, 1, size)
                torch.mul(sims_KCn.gather(1, index_K1n)[:, 0].t(), temperature, out=own_NK[flat])
            else:
                own_NK[flat] = own_similarities(emb_ND[flat], protos_CKD, label_N[flat])
            if shifts:
                shift_n = top_Cn.amax(0)
                sims_Mn.sub_(shift_n)
            exp_Mn = sims_Mn.exp_()
            sum_n = (weight_M @ exp_Mn).clamp(min=torch.finfo(emb_ND.dtype).tiny)  # 0 if no class is live
            log_sum_exp_N[flat] = sum_n.log().add_(shift_n) if shifts else sum_n.log()
            if with_grad:
                lse_grad_bDp = lse_grad_BDP[images, :, at]
                lse_grad_Dn = weighted_DM @ exp_Mn.to(rows_MD.dtype)
                lse_grad_bDp.copy_(_as_maps(lse_grad_Dn.div_(sum_n), lse_grad_bDp))
        # Not in place: torch 2.11 compiles that without own_NK's gradient.
        own_NK = own_NK.masked_fill(~live_C[label_N][:, None], -1.0)
        # A copy, so that the prototypes may move before backward.
        table_MD = _k_major(protos_CKD * live_C[:, None, None])
        ctx.save_for_backward(emb_ND if is_map else None, length_N1, lse_grad_BDP, best_CN, label_N, table_MD)
        ctx.source = source.shape, source.dtype
        ctx.scale = scale
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        if not is_map:
            return classes_BCP, own_NK, log_sum_exp_N, None
        ctx.mark_non_differentiable(emb_ND)
        return classes_BCP, own_NK, log_sum_exp_N, emb_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.saved_tensors[-1].device.type, enabled=False):
            return _PrototypeScores._gradient(ctx, *grads[:3]), *[None] * 8

    @staticmethod
    def _gradient(ctx: Any, *grads: Tensor | None) -> Tensor:
        emb_ND, length_N1, lse_grad_BDP, best_CN, label_N, table_MD = ctx.saved_tensors
        shape, dtype = ctx.source
        batch, pixels = (shape[0], shape[2] * shape[3]) if emb_ND is not None else (1, shape[0])
        num_classes, num_prototypes = len(best_CN), len(table_MD) // len(best_CN)
        sizes = (batch, num_classes, pixels), (len(label_N), num_prototypes), (len(label_N),)
        grad_BCP, grad_own_NK, grad_lse_N = (
            lse_grad_BDP.new_zeros(size) if grad is None else grad for grad, size in zip(grads, sizes)
        )
        first_K = torch.arange(0, len(table_MD), num_classes, device=table_MD.device)
        grad = lse_grad_BDP.new_empty(shape, dtype=dtype)
        for images, at, flat in _pieces(batch, pixels, ctx.chunk):
            weight_Cn = grad_BCP[images, :, at].transpose(0, 1).flatten(1)
            rows_nD = _weighted_rows(
                table_MD,
                (best_CN[:, flat].t(), weight_Cn.t(), ctx.scale),
                (label_N[flat, None] + first_K, grad_own_NK[flat], 1.0),
            )
            lse_grad_bDp = lse_grad_BDP[images, :, at]
            rows_bDp = _as_maps(rows_nD.t(), lse_grad_bDp)  # the same memory
            rows_bDp.addcmul_(lse_grad_bDp, _as_maps(grad_lse_N[None, flat], lse_grad_bDp))
            if emb_ND is None:
                grad[flat] = rows_nD
                continue
            # Through x / ‖x‖; where the length was clamped the division is by a constant.
            along_n1 = torch.linalg.vecdot(rows_nD, emb_ND[flat])[:, None] * (length_N1[flat] > MIN_NORM)
            rows_nD.addcmul_(emb_ND[flat], along_n1, value=-1).div_(length_N1[flat])
            target_bDp = grad.flatten(2)[images, :, at]
            target_bDp.copy_(rows_bDp)
        return grad


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


def _weighted_rows(table_MD: Tensor, *terms: tuple[Tensor, Tensor, float]) -> Tensor:
    """Σ over terms (row_nJ, weight_nJ, scale) and j of scale · weight_nj · table[row_nj] (n, D).

    No row may come twice for one n within a term.
    """
    size = len(terms[0][0])
    if table_MD.is_cuda:
        # Matrix units multiply the zeros faster than a GPU gathers n·J rows. No scatter_add_, whose order is
        # not fixed.
        dense_nM = table_MD.new_zeros(size, len(table_MD))
        for row_nJ, weight_nJ, scale in terms:
            row_nJ = row_nJ.long()
            dense_nM.scatter_(1, row_nJ, dense_nM.gather(1, row_nJ) + scale * weight_nJ)
        return dense_nM @ table_MD
    # Blocks of columns, so that the part of the table that belongs to their classes stays in the cache for
    # all pixels, and what is transposed as well.
    blocks = min(-(-table_MD.numel() * table_MD.itemsize // GATHERED_BYTES), terms[0][0].shape[1])
    rows = [row_nJ.tensor_split(blocks, 1) for row_nJ, _, _ in terms]
    weights = [weight_nJ.tensor_split(blocks, 1) for _, weight_nJ, _ in terms]
    parts = []
    for block in range(blocks):
        counts = [row[block].shape[1] for row in rows]
        row_nj = torch.empty(size, sum(counts), dtype=torch.int32, device=table_MD.device)
        weight_nj = table_MD.new_empty(row_nj.shape)
        for i, (row_nx, weight_nx) in enumerate(zip(row_nj.split(counts, 1), weight_nj.split(counts, 1))):
            row_nx.copy_(rows[i][block])
            weight_nx.copy_(weights[i][block]).mul_(terms[i][2])
        parts.append(F.embedding_bag(row_nj, table_MD, per_sample_weights=weight_nj, mode="sum"))
    return functools.reduce(Tensor.add_, parts)


def own_similarities(emb_ND: Tensor, protos_CKD: Tensor, labels_N: Tensor) -> Tensor:
    """iᵀp_yk (N, K) with the pixel's own class y, one k at a time; class 0 where the label is −1."""
    emb_ND, protos_CKD = at_least_single(emb_ND), at_least_single(protos_CKD)
    class_N = labels_N.clamp(min=0).long()
    return torch.stack([(emb_ND * protos_KD[class_N]).sum(1) for protos_KD in protos_CKD.unbind(1)], 1)


def _by_device(values: dict[str, int], like: Tensor) -> int:
    return values["cuda" if like.is_cuda else "cpu"]


def _k_major(protos_CKD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Prototypes as rows k·C + c, (M, D)."""
    return protos_CKD.transpose(0, 1).flatten(0, 1).to(dtype or protos_CKD.dtype)


def _chunk(emb_ND: Tensor, num_rows: int, chunk_size: int | None) -> int:
    """Pixels at a time."""
    if chunk_size is not None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        return chunk_size
    fitting = _by_device(CHUNK_ELEMENTS, emb_ND) // num_rows // 128 * 128
    return min(max(fitting, _by_device(SMALLEST_CHUNK, emb_ND)), _by_device(LARGEST_CHUNK, emb_ND))
