"""Which pixels take part in the contrast: anchors, the shared pool of candidates, and the pairs of each
anchor.

Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV 2021, section 3.2. Needs
torch only; no loop over images or classes, no read of the device by the host.

Axes: N pixels of all ranks, C classes, D channels, J anchors per class, Q pool slots per class, L candidates
in the pool, W of them that may be of a given class, K sampled pairs per anchor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.core.contrast_memory import PixelMemory
from protoseg.core.draws import Groups, fold
from protoseg.core.ranks import AllGather, AllReduce, reduced


def select_anchors(
    groups: Groups, class_N: Tensor, wrong_N: Tensor, per_class: int, sampler: str
) -> tuple[Tensor, Tensor]:
    """Draw `per_class` anchors of every class from the global batch; all pixels if there are fewer.

    `random`: uniform. `seg_hard`: half of them uniform among all pixels of the class, the others among those
    left that the classifier got wrong; too few of these are filled up with any others.
    groups: the pixels by class and random key; class_N int64 from `class_map`, wrong_N bool.
    Returns pixel (C, J) int64 in [0, N), arbitrary where not valid, and valid (C, J) bool.
    Source: ICCV 2021, section 3.2.
    """
    if sampler == "random":
        return groups.first(per_class)
    # The keys put the pixels of a class in a uniform random order. Its first pixels are the random half; of
    # the others the wrong ones go first, and otherwise they keep their order. So each pixel has a new place.
    order_N, start_G = groups
    class_N, wrong_N = class_N.index_select(0, order_N), wrong_N.index_select(0, order_N)
    half = per_class - per_class // 2
    place_N = torch.arange(len(order_N), device=order_N.device) - start_G.index_select(0, class_N)
    hard_N = wrong_N & (place_N >= half)
    seen_N = F.pad(hard_N.cumsum(0), (1, 0))
    seen_G = seen_N[start_G]
    nth_N = seen_N[1:] - seen_G.index_select(0, class_N)
    total_N = F.pad(seen_G.diff(), (0, 1)).index_select(0, class_N)
    new_N = torch.where(hard_N, half - 1 + nth_N, place_N + total_N - nth_N)
    new_N = torch.where(place_N < half, place_N, new_N)
    num_classes = len(start_G) - 1
    wanted_N = (new_N < per_class) & (class_N < num_classes)
    slot_N = torch.where(wanted_N, class_N * per_class + new_N, num_classes * per_class)
    pixel = order_N.new_zeros(num_classes * per_class + 1)  # one more, for the pixels that are not chosen
    pixel_CJ = pixel.index_copy(0, slot_N, order_N)[:-1].view(num_classes, per_class)
    return pixel_CJ, torch.arange(per_class, device=order_N.device) < start_G.diff()[:, None]


class Pool(NamedTuple):
    """Candidates of one step, positives and negatives, shared by all anchors.

    The first `loose` of them may be of any class; after these come as many slots for each class, in order.
    """

    emb_LD: Tensor
    class_L: Tensor  # C where there is none
    pixel_L: Tensor  # number of the pixel in the global batch; -1 for the memory
    loose: int

    def own(self, table_CJL: Tensor) -> Tensor:
        """The columns (C, J, W) of a table (C, J, L) that may be of the row's class."""
        classes = len(table_CJL)
        loose_CJX, blocks = table_CJL.tensor_split([self.loose], dim=2)
        blocks_CJCQ = blocks.unflatten(2, (classes, blocks.shape[2] // classes))
        return torch.cat([loose_CJX, blocks_CJCQ.diagonal(dim1=0, dim2=2).movedim(2, 0)], dim=2)


def balanced_pool(
    emb_MD: Tensor,
    groups: Groups,
    per_class: int,
    memory: PixelMemory | None,
    seed: int,
    step: int | Tensor,
    all_reduce: AllReduce | None = None,
    rank: int = 0,
) -> Pool:
    """Random pool with at most `per_class` candidates of each class, half from the batch and half from the
    memory.

    Where one of the two has too few, the other fills up. emb_MD: this rank's pixels; groups: those of all
    ranks by class and random key, of which the batch part are the first.
    """
    pixel_CQ, valid_CQ = groups.first(per_class)
    batch_C = valid_CQ.sum(1)
    memory_C = torch.zeros_like(batch_C)
    if memory is not None:
        room_C = torch.clamp(per_class - batch_C, min=per_class // 2)
        slot_CQ, memory_C = memory.draw(room_C, per_class, seed, step)
        batch_C = torch.minimum(batch_C, per_class - memory_C)
    place_Q = torch.arange(per_class, device=pixel_CQ.device)
    from_batch_CQ = place_Q < batch_C[:, None]
    here_L = (pixel_CQ - rank * len(emb_MD)).flatten()
    mine_L = from_batch_CQ.flatten() & (here_L >= 0) & (here_L < len(emb_MD))
    # the memory's rows, and one more; then the batch's over them, and what is not wanted into that one
    if memory is None:
        rows_LD = emb_MD.new_zeros(len(mine_L) + 1, emb_MD.shape[1])
    else:
        slot_CQ = slot_CQ.gather(1, (place_Q - batch_C[:, None]).clamp(min=0))
        slot_CQ = torch.where(from_batch_CQ | (rank > 0), memory.spare, slot_CQ)
        slot_L = F.pad(slot_CQ.flatten(), (0, 1), value=memory.spare)
        rows_LD = memory.rows_SD.index_select(0, slot_L).to(emb_MD.dtype)
    target_L = torch.where(mine_L, torch.arange(len(mine_L), device=mine_L.device), len(mine_L))
    rows_LD.index_copy_(0, target_L, emb_MD.index_select(0, torch.where(mine_L, here_L, 0)))
    emb_LD = rows_LD[:-1]
    emb_LD = reduced(emb_LD, all_reduce)  # each row has one owner, and rank 0 has the memory's: a copy
    class_C1 = torch.arange(len(batch_C), device=pixel_CQ.device)[:, None]
    class_CQ = torch.where(place_Q < (batch_C + memory_C)[:, None], class_C1, len(batch_C))
    pixel_CQ = torch.where(from_batch_CQ, pixel_CQ, -1)
    return Pool(emb_LD, class_CQ.flatten(), pixel_CQ.flatten(), 0)


def full_pool(
    emb_MD: Tensor,
    class_N: Tensor,
    num_classes: int,
    memory: PixelMemory | None,
    all_gather: AllGather | None = None,
) -> Pool:
    """Pool of every labelled pixel of the global batch and every filled slot of the memory.

    emb_MD: this rank's pixels; class_N: those of all ranks.
    """
    emb_LD = emb_MD if all_gather is None else all_gather(emb_MD)
    class_L, pixel_L = class_N, torch.arange(len(class_N), device=class_N.device)
    if memory is not None:
        rows_CSD, valid_CS = memory.everything()
        class_C1 = torch.arange(num_classes, device=class_N.device)[:, None]
        emb_LD = torch.cat([emb_LD, rows_CSD.to(emb_LD.dtype).flatten(0, 1)])
        class_L = torch.cat([class_L, torch.where(valid_CS, class_C1, num_classes).flatten()])
        pixel_L = F.pad(pixel_L, (0, valid_CS.numel()), value=-1)
    return Pool(emb_LD, class_L, pixel_L, len(class_N))


def select_pairs(
    hardness: Tensor, candidate: Tensor, count: int, sampler: str, anchor_key: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample `count` of each anchor's candidates without replacement; all of them if there are fewer.

    `random`: uniform. `hardest`: the largest hardness. `semi_hard`: uniform among the hardest 10 %, rounded
    down, at least one.
    hardness (..., L): similarity of a negative, minus that of a positive; candidate, bool, broadcasts to it;
    anchor_key (...) int64 keys the draws.
    Returns index (..., K) int64 along L, in no order, and valid (..., K) bool.
    Source: ICCV 2021, section 3.2.
    """
    total = hardness.shape[-1]
    if sampler == "random":
        column = torch.arange(total, device=hardness.device).expand_as(hardness)
        return _thin(column, candidate.expand_as(hardness), count, anchor_key)
    wanted, inf = min(count, total), float("inf")
    bias = torch.where(candidate, 0.0, -inf).to(hardness.dtype)
    if sampler == "semi_hard":
        # One k for all rows, which needs no sorted result: a row whose own tenth is smaller gets fillers
        # from above. There are always enough slots that hold no candidate.
        wanted = max(total // 10, 1)
        tenth = (candidate.sum(-1, keepdim=True) // 10).clamp(min=1)
        filler = ~candidate & ((~candidate).cumsum(-1) <= wanted - tenth)
        bias = bias.masked_fill(filler, inf)
    value, index = (hardness + bias).topk(wanted, dim=-1, sorted=False)
    return _thin(index, ~value.isinf(), count, anchor_key)


def _thin(column: Tensor, valid: Tensor, count: int, anchor_key: Tensor) -> tuple[Tensor, Tensor]:
    # Uniform without replacement: the smallest keys, each a hash of (anchor, candidate).
    if count >= column.shape[-1]:
        return column, valid
    key = torch.where(valid, fold(anchor_key[..., None], column), torch.iinfo(torch.int64).max)
    chosen = key.topk(count, dim=-1, largest=False, sorted=False).indices
    return column.gather(-1, chosen), valid.gather(-1, chosen)
