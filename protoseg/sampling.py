"""Which pixels take part in the contrast: anchors, the shared pool of candidates, and the pairs of each
anchor.

Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV 2021, section 3.2. Needs
torch only; no loop over images or classes, no read of the device by the host.

Axes: B images of this rank, P pixels of one image (h*w), N = B*P, W ranks, C classes, D channels, A anchors
of this rank, J drawn anchors per class, Q pool slots per class, L candidates in the pool, K sampled pairs
per anchor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.memory import NO_KEY, Gather, PixelMemory, Reduce, first_per_group, fold

ANCHOR_SAMPLERS = ("random", "seg_hard")
PAIR_SAMPLERS = ("random", "hardest", "semi_hard")


class Pool(NamedTuple):
    """Candidates of one step, positives and negatives, shared by all anchors; a class lies together."""

    emb_LD: Tensor
    class_L: Tensor  # C where there is none
    pixel_L: Tensor  # number of the pixel in the global batch; -1 for the memory
    start_C: Tensor  # the candidates of class c are start[c] ... start[c] + count[c] - 1
    count_C: Tensor
    width: int  # no class has more candidates than that


def select_anchors(
    class_BP: Tensor,
    wrong_BP: Tensor,
    key_BP: Tensor,
    hard_key_BP: Tensor,
    num_classes: int,
    per_class: int,
    sampler: str,
    all_gather: Gather | None = None,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw `per_class` anchors of every class from the global batch; those of this rank are returned.

    `seg_hard`: half of them are drawn among the pixels the classifier got wrong, and the others among all
    that are left, so that too few of one kind are filled up by the other. `random`: all are drawn among all
    pixels. class_BP int64 from `class_map`, wrong_BP bool, two independent keys per pixel from
    `pixel_keys`.
    Returns pixel (A,) int64 in [0, B*P), 0 where not valid, and valid (A,) bool, A = min(C * per_class, B*P).
    Source: ICCV 2021, section 3.2.
    """
    class_N, key_N = class_BP.flatten(), key_BP.flatten()
    parts = []
    quota_C = torch.full((num_classes,), per_class, dtype=torch.int64, device=class_N.device)
    if sampler == "seg_hard":
        wrong_class_N = torch.where(wrong_BP.flatten(), class_N, num_classes)
        hard_N = hard_key_BP.flatten()
        pixel_CJ, valid_CJ = first_per_group(hard_N, wrong_class_N, num_classes, max(per_class // 2, 1))
        keep_CJ, chosen_C = _keep_across_ranks(
            hard_N[pixel_CJ], valid_CJ, quota_C * 0 + per_class // 2, all_gather, rank
        )
        parts.append((pixel_CJ, keep_CJ))
        quota_C = quota_C - chosen_C
        # a pixel is not drawn twice; the kept positions are scattered, and the spare ones go to an extra
        # entry
        taken_N = torch.zeros(len(class_N) + 1, dtype=torch.bool, device=class_N.device)
        taken_N = taken_N.index_fill(0, torch.where(keep_CJ, pixel_CJ, len(class_N)).flatten(), True)[:-1]
        class_N = torch.where(taken_N, num_classes, class_N)
    pixel_CJ, valid_CJ = first_per_group(key_N, class_N, num_classes, per_class)
    keep_CJ, _ = _keep_across_ranks(key_N[pixel_CJ], valid_CJ, quota_C, all_gather, rank)
    parts.append((pixel_CJ, keep_CJ))
    pixel = torch.cat([pixel.flatten() for pixel, _ in parts])
    valid = torch.cat([keep.flatten() for _, keep in parts])
    first_A = valid.to(torch.uint8).argsort(descending=True, stable=True)
    first_A = first_A[: min(num_classes * per_class, len(class_N))]
    return torch.where(valid[first_A], pixel[first_A], 0), valid[first_A]


def _keep_across_ranks(
    key_CJ: Tensor, valid_CJ: Tensor, quota_C: Tensor, all_gather: Gather | None, rank: int
) -> tuple[Tensor, Tensor]:
    # Of the entries of all ranks, the quota[c] smallest keys of class c are kept: which of this rank's are
    # (C, J), and how many are kept over all ranks (C,). Equal keys: the lower rank first, as in the joint
    # batch.
    count = key_CJ.shape[1]
    key_CJ = torch.where(valid_CJ, key_CJ, NO_KEY)
    all_CJ = key_CJ if all_gather is None else all_gather(key_CJ[None]).transpose(0, 1).flatten(1)
    place_CJ = all_CJ.argsort(dim=1, stable=True).argsort(dim=1)
    keep_CJ = (place_CJ < quota_C[:, None]) & (all_CJ < NO_KEY)
    return keep_CJ[:, rank * count : (rank + 1) * count], keep_CJ.sum(1)


def balanced_pool(
    emb_BPD: Tensor,
    class_BP: Tensor,
    key_BP: Tensor,
    num_classes: int,
    per_class: int,
    memory: PixelMemory | None,
    seed: int,
    step: int,
    all_gather: Gather | None = None,
    all_reduce: Reduce | None = None,
    rank: int = 0,
) -> Pool:
    """Random pool with at most `per_class` candidates of each class, half from the batch and half from the
    memory.

    Where one of the two has too few, the other fills up. The batch part is the smallest keys over all ranks.
    """
    here = rank * class_BP.numel()
    key_N = key_BP.flatten()
    pixel_CQ, valid_CQ = first_per_group(key_N, class_BP.flatten(), num_classes, min(per_class, len(key_N)))
    if all_gather is not None:
        both = torch.stack([torch.where(valid_CQ, key_N[pixel_CQ], NO_KEY), pixel_CQ + here])
        key_CQ, pixel_CQ = all_gather(both[None]).permute(1, 2, 0, 3).flatten(2).unbind(0)
        key_CQ, order_CQ = key_CQ.sort(dim=1, stable=True)
        pixel_CQ = pixel_CQ.gather(1, order_CQ)[:, :per_class] - here
        valid_CQ = key_CQ[:, :per_class] < NO_KEY
    batch_C = valid_CQ.sum(1)
    width, memory_C = pixel_CQ.shape[1], torch.zeros_like(batch_C)
    if memory is not None:
        slots = memory.pixel_slots + memory.region_slots
        memory_C = torch.minimum(
            memory.count_C(), torch.clamp(per_class - batch_C, min=per_class - per_class // 2)
        )
        batch_C = torch.minimum(batch_C, per_class - memory_C)
        pixel_CQ = F.pad(pixel_CQ, (0, max(min(per_class, width + slots) - width, 0)))
        width = pixel_CQ.shape[1]
    place_Q = torch.arange(width, device=pixel_CQ.device)
    from_batch_CQ = place_Q < batch_C[:, None]
    mine_CQ = from_batch_CQ & (pixel_CQ >= 0) & (pixel_CQ < len(key_N))
    source_CQ = torch.where(mine_CQ, pixel_CQ, 0)
    emb_CQD = emb_BPD.flatten(0, 1)[source_CQ]
    if all_reduce is not None:  # each row has one owner, so that the sum is a copy
        emb_CQD = all_reduce(torch.where(mine_CQ[:, :, None], emb_CQD, 0), "sum")
    if memory is not None:
        slot_CQ = memory.draw(memory_C, width, seed, step)
        slot_CQ = slot_CQ.gather(1, (place_Q - batch_C[:, None]).clamp(min=0))
        stored_CQD = memory.rows(slot_CQ).to(emb_CQD.dtype)
        emb_CQD = torch.where(from_batch_CQ[:, :, None], emb_CQD, stored_CQD)
    count_C = batch_C + memory_C
    class_C1 = torch.arange(num_classes, device=pixel_CQ.device)[:, None]
    return Pool(
        emb_CQD.flatten(0, 1),
        torch.where(place_Q < count_C[:, None], class_C1, num_classes).flatten(),
        torch.where(from_batch_CQ, pixel_CQ + here, -1).flatten(),
        class_C1.flatten() * width,
        count_C,
        width,
    )


def full_pool(
    emb_BPD: Tensor,
    class_BP: Tensor,
    num_classes: int,
    memory: PixelMemory | None,
    all_gather: Gather | None = None,
) -> Pool:
    """Pool of every labelled pixel of the global batch and every filled slot of the memory."""
    emb_LD = emb_BPD.flatten(0, 1)
    class_L = class_BP.flatten()
    if all_gather is not None:
        emb_LD, class_L = all_gather(emb_LD), all_gather(class_L)
    pixel_L = torch.arange(len(class_L), device=class_L.device)
    if memory is not None:
        rows_CSD, valid_CS = memory.everything()
        class_C1 = torch.arange(num_classes, device=class_L.device)[:, None]
        emb_LD = torch.cat([emb_LD, rows_CSD.to(emb_LD.dtype).flatten(0, 1)])
        class_L = torch.cat([class_L, torch.where(valid_CS, class_C1, num_classes).flatten()])
        pixel_L = torch.cat([pixel_L, torch.full_like(valid_CS, -1, dtype=torch.int64).flatten()])
    class_L, order_L = class_L.sort(stable=True)
    bound = torch.searchsorted(class_L, torch.arange(num_classes + 1, device=class_L.device))
    return Pool(emb_LD[order_L], class_L, pixel_L[order_L], bound[:-1], bound[1:] - bound[:-1], len(class_L))


def select_pairs(
    hardness_AL: Tensor, count: int, sampler: str, anchor_key_A: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample `count` of each anchor's candidates without replacement; all of them if there are fewer.

    hardness_AL: similarity of a negative, minus that of a positive; -inf where it is no candidate of the
    anchor.
    `random`: uniform. `hardest`: the largest hardness. `semi_hard`: uniform among the hardest 10 %, rounded
    down, at least one. anchor_key_A int64 keys the draws.
    Returns index (A, K) int64 along L and valid (A, K) bool. Source: ICCV 2021, section 3.2.
    """
    total, device = hardness_AL.shape[1], hardness_AL.device
    none = float("-inf")
    if sampler == "random":
        column_AL = torch.arange(total, device=device).expand_as(hardness_AL)
        if count >= total:
            return column_AL, hardness_AL > none
        return _random_pairs(column_AL, hardness_AL > none, count, anchor_key_A)
    wanted = count if sampler == "hardest" else max(total // 10, 1)
    hardest_AK, index_AK = hardness_AL.topk(min(wanted, total), dim=1)
    valid_AK = hardest_AK > none
    if sampler == "semi_hard":
        tenth_A1 = ((hardness_AL > none).sum(1, keepdim=True, dtype=torch.int32) // 10).clamp(min=1)
        valid_AK = valid_AK & (torch.arange(index_AK.shape[1], device=device) < tenth_A1)
        if count < index_AK.shape[1]:
            return _random_pairs(index_AK, valid_AK, count, anchor_key_A)
    return index_AK, valid_AK


def _random_pairs(
    column_AK: Tensor, valid_AK: Tensor, count: int, anchor_key_A: Tensor
) -> tuple[Tensor, Tensor]:
    # Uniform without replacement: the smallest keys, each a hash of (anchor, candidate).
    key_AK = torch.where(valid_AK, fold(anchor_key_A[:, None], column_AK), torch.iinfo(torch.int64).max)
    chosen_AJ = key_AK.topk(count, dim=1, largest=False, sorted=False).indices
    return column_AK.gather(1, chosen_AJ), valid_AK.gather(1, chosen_AJ)
