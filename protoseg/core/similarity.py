"""Similarities of pixels and prototypes, a few pixels at a time.

N pixels, C classes, K prototypes per class, D channels; M = K·C rows, prototype k of class c in row k·C + c.
Pixels go through in chunks of n. Similarities are laid out (K, C, n): reductions over K or M then run along
whole rows of pixels, which is what vector units and GPUs like.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_NORM = 1e-6  # below this a vector has no direction
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}  # similarities at a time, by device
GATHERED_ELEMENTS = 2**27  # of prototypes at a time, one for each pixel, on a GPU
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
    return rows_and_lengths(features)[0]


def rows_and_lengths(features: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (N, D) and the lengths (N, 1) that were divided by: no N × D tensor besides."""
    batch, dim, height, width = features.shape
    emb_ND = features.new_empty(
        batch * height * width, dim, dtype=torch.promote_types(features.dtype, torch.float32)
    )
    emb_ND.view(batch, height, width, dim).copy_(features.permute(0, 2, 3, 1))
    length_N1 = emb_ND.norm(dim=1, keepdim=True).clamp_(min=MIN_NORM)
    return emb_ND.div_(length_N1), length_N1


def layout(maps: Tensor) -> torch.memory_format:
    """How a map (B, D, h, w) lies in memory: pixel by pixel, or else channel by channel."""
    by_pixel = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return torch.channels_last if by_pixel else torch.contiguous_format


def class_scores(
    emb_ND: Tensor,
    protos_CKD: Tensor,
    live_C: Tensor | None = None,
    *,
    score_dtype: torch.dtype | None = None,
) -> Tensor:
    """max over k of iᵀp_ck (N, C), −1 for classes that are not live: all that inference needs.

    emb_ND, protos_CKD: unit length. live_C: bool, classes that have prototypes (default all). score_dtype: of
    the product. Plain operations on chunks of pixels: can be exported, and differentiated (then autograd
    keeps N × CK).
    """
    emb_ND = at_least_single(emb_ND)
    num_classes, num_prototypes, _ = protos_CKD.shape
    rows_MD = k_major(protos_CKD, score_dtype or emb_ND.dtype)
    chunk = pixels_at_once(emb_ND, len(rows_MD))

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


def own_similarities(emb_ND: Tensor, protos_CKD: Tensor, labels_N: Tensor) -> Tensor:
    """iᵀp_yk (N, K) with the pixel's own class y, by no product in reduced precision; class 0 at label −1."""
    emb_ND, protos_CKD = at_least_single(emb_ND), at_least_single(protos_CKD)
    class_N = labels_N.clamp(min=0).long()
    if emb_ND.is_cuda:  # all k of as many pixels as half a gigabyte holds: fewer launches
        parts = zip(*(x.split(max(GATHERED_ELEMENTS // protos_CKD[0].numel(), 1)) for x in (emb_ND, class_N)))
        return torch.cat([protos_CKD[class_n].mul_(emb_nD[:, None]).sum(2) for emb_nD, class_n in parts])
    return torch.stack([(emb_ND * protos_KD[class_N]).sum(1) for protos_KD in protos_CKD.unbind(1)], 1)


def k_major(protos_CKD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Prototypes as rows k·C + c, (M, D)."""
    return protos_CKD.transpose(0, 1).flatten(0, 1).to(dtype or protos_CKD.dtype)


def pixels_at_once(like: Tensor, num_rows: int) -> int:
    """Pixels of a chunk, from the number of rows that they are compared with and the device."""
    device = "cuda" if like.is_cuda else "cpu"
    fitting = CHUNK_ELEMENTS[device] // num_rows // 128 * 128
    return min(max(fitting, SMALLEST_CHUNK[device]), LARGEST_CHUNK[device])
