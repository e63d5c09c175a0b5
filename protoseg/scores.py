"""Similarities of pixels and prototypes, without ever holding all of them.

N pixels, C classes, K prototypes per class, D channels; M = K·C rows, prototype k of class c in row k·C + c.
Pixels go through in chunks of n. Similarities are laid out (K, C, n): reductions over K or M then run along
whole rows of pixels, which is what vector units and GPUs like.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_NORM = 1e-6  # below this a vector has no direction
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # similarities at a time, by device
BLOCK = {"cpu": 1024, "cuda": 2**30}  # pixels of an image that are transposed at a time, by device
GATHERED_BYTES = 3 * 2**19  # of the table of prototypes at a time: about what a core keeps near
SMALLEST_CHUNK, LARGEST_CHUNK = {"cpu": 512, "cuda": 4096}, {"cpu": 2048, "cuda": 2**18}  # pixels


def at_least_single(x: Tensor) -> Tensor:
    """Half types become float32; float32 and double stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x / max(‖x‖, 1e-6) along `dim`; half types become float32, double stays double."""
    return F.normalize(at_least_single(x), dim=dim, eps=MIN_NORM)


def unit_rows(features: Tensor) -> Tensor:
    """The pixels of a map (B, D, h, w) as unit vectors (N, D), N = B·h·w; dtypes as in `unit`."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    if not features.requires_grad:
        return _rows_and_lengths(features, dtype)[0]
    return _UnitRows.apply(features, dtype)


def _rows_and_lengths(features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit vectors (N, D) and the lengths (N, 1) that were divided by."""
    batch, dim = features.shape[:2]
    block = _by_device(BLOCK, features)
    flat_BDP = features.flatten(2)
    emb_BPD = features.new_empty(batch, flat_BDP.shape[2], dim, dtype=dtype)
    length_BP1 = features.new_empty(batch, flat_BDP.shape[2], 1, dtype=dtype)
    for image in range(batch):
        for start in range(0, flat_BDP.shape[2], block):
            at = slice(start, start + block)
            rows_nD = emb_BPD[image, at]
            rows_nD.copy_(flat_BDP[image, :, at].contiguous().t())
            length_BP1[image, at] = rows_nD.norm(dim=1, keepdim=True).clamp_(min=MIN_NORM)
            rows_nD.div_(length_BP1[image, at])
    return emb_BPD.view(-1, dim), length_BP1.view(-1, 1)


class _UnitRows(torch.autograd.Function):
    """`unit` of the transposed map, in one pass of blocks: two N × D tensors less, and faster transposes."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, dtype: torch.dtype) -> Tensor:
        emb_ND, length_N1 = _rows_and_lengths(features, dtype)
        ctx.save_for_backward(emb_ND, length_N1)
        ctx.shape = features.shape
        ctx.dtype = features.dtype
        return emb_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        emb_ND, length_N1 = ctx.saved_tensors
        batch = ctx.shape[0]
        grad_BDP = emb_ND.new_empty(ctx.shape, dtype=ctx.dtype).flatten(2)
        pixels, block = grad_BDP.shape[2], _by_device(BLOCK, emb_ND)
        for image in range(batch):
            for start in range(0, pixels, block):
                stop = min(start + block, pixels)
                at = slice(image * pixels + start, image * pixels + stop)
                rows_nD = emb_ND[at]
                along_n1 = (grads[0][at] * rows_nD).sum(1, keepdim=True)
                # Where the length was clamped the division is by a constant.
                along_n1 = along_n1 * (length_N1[at] > MIN_NORM)
                rows_nD = torch.addcmul(grads[0][at], rows_nD, along_n1, value=-1).div_(length_N1[at])
                grad_BDP[image, :, start:stop] = rows_nD.t()
        return grad_BDP.view(ctx.shape), None


class Scores(NamedTuple):
    """What `prototype_scores` returns."""

    classes_NC: Tensor  # scale · max over k of iᵀp_ck; not_live for classes that are not live
    own_NK: Tensor  # iᵀp_yk for the pixel's own class y; class 0 where the label is −1
    log_sum_exp_N: Tensor  # log Σ exp(iᵀp/τ) over the prototypes of all live classes


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
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
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
) -> Scores:
    """Class scores, own-class similarities and the log-sum-exp over all prototypes.

    emb_ND, protos_CKD: unit length; half types are promoted to float32, double stays double, and the
    prototypes follow the embeddings. labels_N: integer, −1 takes no part. live_C: bool, classes that have
    prototypes (default all). scale, not_live: see `Scores`. score_dtype: of the products with all M
    prototypes, for example bfloat16 on a GPU; own_NK and all sums are in the dtype of emb_ND nevertheless.
    chunk_size: pixels at a time (default from the sizes). Memory: O(N·(C + K + D)) held for backward, n·M
    in passing. The gradient goes to emb_ND only; of prototypes that tie for the maximum the first one gets
    it.
    """
    if live_C is None:
        live_C = torch.ones(len(protos_CKD), dtype=torch.bool, device=emb_ND.device)
    emb_ND = at_least_single(emb_ND)
    with torch.autocast(emb_ND.device.type, enabled=False):
        classes_CN, own_NK, log_sum_exp_N = _PrototypeScores.apply(
            emb_ND,
            protos_CKD.to(emb_ND.dtype),
            labels_N.long(),
            live_C,
            temperature,
            scale,
            not_live,
            score_dtype,
            chunk_size,
        )
    return Scores(classes_CN.t(), own_NK, log_sum_exp_N)


class _PrototypeScores(torch.autograd.Function):
    """Forward already forms the gradient of the log-sum-exp, N·D numbers, since the similarities are at hand.

    Backward then needs no similarities again. What is left, the gradient of the maxima and of the own class,
    touches one prototype per class and K more per pixel: a CPU gathers these rows, two products with all
    prototypes in all; for a GPU a third product is faster.
    """

    @staticmethod
    def forward(
        ctx: Any,
        emb_ND: Tensor,
        protos_CKD: Tensor,
        labels_N: Tensor,
        live_C: Tensor,
        temperature: float,
        scale: float,
        not_live: float,
        score_dtype: torch.dtype | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_classes, num_prototypes, dim = protos_CKD.shape
        num_pixels = len(emb_ND)
        # A class that is not live shows another's prototypes, with weight 0: no overflow, no extra pass.
        shown_C = torch.where(live_C, torch.arange(num_classes, device=live_C.device), live_C.int().argmax())
        weight_M = live_C.to(emb_ND.dtype).repeat(num_prototypes)
        rows_MD = _k_major(protos_CKD[shown_C] / temperature, score_dtype)
        scale_C1 = scale * temperature * live_C[:, None].to(emb_ND.dtype)
        lowest_C1 = not_live * (~live_C[:, None]).to(emb_ND.dtype)
        weighted_MD = rows_MD * weight_M[:, None].to(rows_MD.dtype)
        # Not from TF32 or half products: the clustering needs these exactly.
        own_from_product = rows_MD.dtype == emb_ND.dtype and not emb_ND.is_cuda
        label_N = labels_N.clamp(min=0)
        # k of the maximum by a product of bytes: `max(0)` with its indices is many times slower.
        small_int = (
            torch.int8 if num_prototypes < 128 else torch.int16 if num_prototypes < 2**15 else torch.int32
        )
        code_K11 = torch.arange(num_prototypes, 0, -1, device=emb_ND.device).to(small_int)[:, None, None]

        classes_CN = emb_ND.new_empty(num_classes, num_pixels)
        own_NK = emb_ND.new_empty(num_pixels, num_prototypes)
        log_sum_exp_N = emb_ND.new_empty(num_pixels)
        with_grad = ctx.needs_input_grad[0]
        best_CN = torch.empty(
            num_classes if with_grad else 0, num_pixels, dtype=small_int, device=emb_ND.device
        )
        lse_grad_ND = emb_ND.new_empty(num_pixels if with_grad else 0, dim)
        chunk = _chunk(emb_ND, len(rows_MD), chunk_size)
        # The big buffers are made once: fresh memory for each chunk can cost more than the product itself.
        product_X = rows_MD.new_empty(len(rows_MD) * min(chunk, num_pixels))
        is_top_X = torch.empty_like(product_X, dtype=torch.bool)
        for start in range(0, num_pixels, chunk):
            at = slice(start, min(start + chunk, num_pixels))
            size = at.stop - start
            product_Mn = product_X[: len(rows_MD) * size].view(-1, size)
            torch.mm(rows_MD, emb_ND[at].to(rows_MD.dtype).t(), out=product_Mn)
            sims_Mn = product_Mn.to(emb_ND.dtype)  # divided by τ
            sims_KCn = sims_Mn.view(num_prototypes, num_classes, size)
            top_Cn = sims_KCn.amax(0)
            torch.addcmul(lowest_C1, top_Cn, scale_C1, out=classes_CN[:, at])
            if own_from_product:
                index_K1n = label_N[at].expand(num_prototypes, 1, size)
                own_NK[at] = sims_KCn.gather(1, index_K1n)[:, 0].t() * temperature
            else:
                own_NK[at] = own_similarities(emb_ND[at], protos_CKD, label_N[at])
            if with_grad:
                is_top_KCn = torch.ge(sims_KCn, top_Cn, out=is_top_X[: sims_KCn.numel()].view_as(sims_KCn))
                code_Cn = (is_top_KCn.view(torch.int8) * code_K11).amax(0)
                best_CN[:, at] = (num_prototypes - code_Cn).clamp(max=num_prototypes - 1)
            shift_n = top_Cn.amax(0)
            exp_Mn = sims_Mn.sub_(shift_n).exp_()
            sum_n = (weight_M @ exp_Mn).clamp(min=torch.finfo(emb_ND.dtype).tiny)  # 0 if no class is live
            log_sum_exp_N[at] = sum_n.log() + shift_n
            if with_grad:
                lse_grad_nD = exp_Mn.to(rows_MD.dtype).t() @ weighted_MD
                torch.div(lse_grad_nD, sum_n[:, None], out=lse_grad_ND[at])
        own_NK.masked_fill_(~live_C[label_N][:, None], -1.0)
        # Row c·K + k; a copy, so that the prototypes may move before backward.
        table_MD = (protos_CKD * live_C[:, None, None]).flatten(0, 1)
        ctx.save_for_backward(lse_grad_ND, best_CN, label_N, table_MD)
        ctx.num_prototypes = num_prototypes
        ctx.scale = scale
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        return classes_CN, own_NK, log_sum_exp_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_CN, grad_own_NK, grad_lse_N = grads
        lse_grad_ND, best_CN, label_N, table_MD = ctx.saved_tensors
        num_prototypes = ctx.num_prototypes
        first_C = torch.arange(0, len(table_MD), num_prototypes, device=table_MD.device, dtype=torch.int32)
        k_K = torch.arange(num_prototypes, device=table_MD.device)
        per_block = max(1, GATHERED_BYTES // table_MD[:num_prototypes].nbytes)
        grad_ND = torch.zeros_like(lse_grad_ND) if grad_lse_N is None else lse_grad_ND * grad_lse_N[:, None]
        for start in range(0, len(grad_ND), ctx.chunk):
            at = slice(start, min(start + ctx.chunk, len(grad_ND)))
            terms = []
            if grad_CN is not None:
                terms.append((first_C[:, None] + best_CN[:, at], grad_CN[:, at] * ctx.scale))
            if grad_own_NK is not None:
                terms.append((label_N[at] * num_prototypes + k_K[:, None], grad_own_NK[at].t()))
            if terms:
                grad_ND[at] += _weighted_rows(table_MD, terms, per_block)
        return grad_ND, *[None] * 8


def _weighted_rows(table_MD: Tensor, terms: list[tuple[Tensor, Tensor]], per_block: int) -> Tensor:
    """Σ over terms (row_Jn, weight_Jn) and j of weight_jn · table[row_jn] (n, D).

    No row may come twice for one n within a term. per_block: how many j a CPU takes at a time; where row_j
    lies in a part of the table of its own, a block of that part stays in the cache for all pixels.
    """
    if table_MD.is_cuda:
        # Matrix units multiply the zeros faster than a GPU gathers n·J rows. No scatter_add_, whose order is
        # not fixed.
        dense_Mn = table_MD.new_zeros(len(table_MD), terms[0][0].shape[1])
        for row_Jn, weight_Jn in terms:
            row_Jn = row_Jn.long()
            dense_Mn.scatter_(0, row_Jn, dense_Mn.gather(0, row_Jn) + weight_Jn)
        return dense_Mn.t() @ table_MD
    parts = [
        F.embedding_bag(
            rows.t().contiguous(), table_MD, per_sample_weights=weights.t().contiguous(), mode="sum"
        )
        for row_Jn, weight_Jn in terms
        for rows, weights in zip(row_Jn.split(per_block), weight_Jn.split(per_block))
    ]
    return torch.stack(parts).sum(0)


def own_similarities(emb_ND: Tensor, protos_CKD: Tensor, labels_N: Tensor) -> Tensor:
    """iᵀp_yk (N, K) with the pixel's own class y, one k at a time; class 0 where the label is −1."""
    emb_ND, protos_CKD = at_least_single(emb_ND), at_least_single(protos_CKD)
    class_N = labels_N.clamp(min=0).long()
    return torch.stack([(emb_ND * protos_KD[class_N]).sum(1) for protos_KD in protos_CKD.unbind(1)], 1)


def _by_device(values: dict[str, int], like: Tensor) -> int:
    return values["cuda" if like.is_cuda else "cpu"]


def _k_major(protos_CKD: Tensor, dtype: torch.dtype | None) -> Tensor:
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
