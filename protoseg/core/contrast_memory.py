"""Pixel and region memories of cross-image contrast, and the keyed draws that decide what enters them.

Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV 2021, section 3.2.
Needs torch only. No loop over images or classes, no read of the device by the host.

Axes: B images, P pixels of one image (h*w), N = B*P pixels, C classes, D channels, V pixels that enter per
image and class, T slots of the pixel ring, R slots of the region memory, G groups, Q drawn slots per class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.core.draws import Groups, draw_state, fold, sort_groups, to_key
from protoseg.core.ranks import AllGather
from protoseg.core.settings import ContrastSettings
from protoseg.core.similarity import MIN_NORM, at_least_single


def region_means(rows_ND: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """l2-normalised mean of the rows of each group (section 3.2, "region memory").

    Returns means (G, D) float32 or float64 and valid (G,); a group that is empty, or whose mean has a norm
    below 1e-6, is not valid.
    """
    # a segmented sum over sorted pixels: fast, and added up in the same order in every run; the last
    # segment is what belongs to no group
    sum_GD = F.embedding_bag(groups.order_N, at_least_single(rows_ND), groups.start_G, mode="sum")[:-1]
    count_G1 = groups.start_G.diff()[:, None]
    mean_GD = sum_GD / count_G1.clamp(min=1)
    norm_G1 = mean_GD.norm(dim=1, keepdim=True)
    valid_G = ((count_G1 > 0) & (norm_G1 > MIN_NORM)).squeeze(1)
    return mean_GD / norm_G1.clamp(min=MIN_NORM), valid_G


def memory_slots(
    num_classes: int,
    dim: int,
    num_images: int,
    settings: ContrastSettings,
) -> tuple[int, int, str | None]:
    """Slots per class of the pixel ring and of the region memory, and a message where the cap bites.

    Wanted are `memory_size` (default 10 per image, the paper's T = 10N) and one region per image. Too much
    for `cap_mb` (10**6 bytes): the region table stays whole while it needs at most half of the room, and
    the pixel ring takes the rest. A region memory with fewer slots than images is a ring.
    """
    memory, cap_mb, size = settings.memory, settings.cap_mb, settings.memory_size
    pixels = (10 * num_images if size is None else size) if memory != "region" else 0
    regions = num_images if memory != "pixel" else 0
    bytes_each = num_classes * dim * getattr(torch, settings.storage).itemsize
    room, parts_kept = int(cap_mb * 1e6) // bytes_each, 2 if memory == "both" else 1
    if pixels + regions <= room:
        return pixels, regions, None
    if room < parts_kept:
        need = bytes_each * parts_kept / 1e6
        raise ValueError(
            f"cap_mb={cap_mb} is too small for a memory of {num_classes} classes: at least {need:.3f}"
        )
    kept_regions = min(regions, max(room // 2, room - pixels))
    kept_pixels = min(pixels, room - kept_regions)
    parts = []
    if kept_pixels < pixels:
        parts.append(f"{kept_pixels} pixels per class instead of {pixels}")
    if kept_regions < regions:
        parts.append(f"the last {kept_regions} regions per class instead of one for each of {regions} images")
    text = f"contrast memory is capped at {cap_mb:g} MB: {', '.join(parts)}; raise cap_mb or store float16"
    return kept_pixels, kept_regions, text


class PixelMemory(nn.Module):
    """Pixel ring (C, T, D) and region memory (C, R, D) of all classes; buffers only, nothing is learned.

    The pixel ring keeps the last T pixels of each class, drawn V per image; the oldest leaves first. The
    region memory is a table by dataset index, overwritten at each visit, or a ring where the cap forces it.
    `pixel_CTD` and `region_CRD` are views of one buffer, `rows_SD`: all pixel slots, then all region slots,
    then one spare row, which takes what must not be written and is always zero. The other buffers are
    `pixel_head_C`, `pixel_fill_C`, `region_head_C`, `region_valid_CR`. `message` says what the cap took
    away, or is None.

    Args: dim and num_classes; num_images in the training set; of the settings memory, pixels_per_image V,
    memory_size T, cap_mb for both parts together, and storage.
    Errors: ValueError on a cap that has no room for one slot per class.
    Source: ICCV 2021, section 3.2 and 3.3.
    """

    rows_SD: Tensor
    pixel_head_C: Tensor
    pixel_fill_C: Tensor
    region_head_C: Tensor
    region_valid_CR: Tensor

    def __init__(self, dim: int, num_classes: int, num_images: int, settings: ContrastSettings) -> None:
        super().__init__()
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        pixels, regions, self.message = memory_slots(num_classes, dim, num_images, settings)
        self.dim, self.num_classes = dim, num_classes
        self.pixels_per_image = settings.pixels_per_image
        self.pixel_slots, self.region_slots = pixels, regions
        self.region_is_table = regions == num_images
        counts = torch.zeros(num_classes, dtype=torch.int64)
        self.register_buffer(
            "rows_SD", torch.zeros(self.spare + 1, dim, dtype=getattr(torch, settings.storage))
        )
        self.register_buffer("pixel_head_C", counts.clone())
        self.register_buffer("pixel_fill_C", counts.clone())
        self.register_buffer("region_head_C", counts.clone())
        self.register_buffer("region_valid_CR", torch.zeros(num_classes, regions, dtype=torch.bool))

    @property
    def spare(self) -> int:
        """The row of `rows_SD` that is always zero."""
        return self.num_classes * (self.pixel_slots + self.region_slots)

    @property
    def pixel_CTD(self) -> Tensor:
        """All pixel rings (C, T, D), a view."""
        count = self.num_classes * self.pixel_slots
        return self.rows_SD[:count].view(self.num_classes, self.pixel_slots, self.dim)

    @property
    def region_CRD(self) -> Tensor:
        """The region memory of all classes (C, R, D), a view."""
        first = self.num_classes * self.pixel_slots
        return self.rows_SD[first:-1].view(self.num_classes, self.region_slots, self.dim)

    @torch.no_grad()
    def enqueue_(
        self,
        emb_BPD: Tensor,
        class_BP: Tensor,
        key_BP: Tensor,
        indices_B: Tensor,
        all_gather: AllGather | None = None,
    ) -> None:
        """Write one batch, in global image order: V pixels and one region per image and class.

        emb_BPD unit norm along D; class_BP from `class_map`; key_BP from `pixel_keys`; indices_B dataset
        indices. all_gather concatenates along axis 0 in rank order; with it, all ranks end with the memory
        that one process gets from the joint batch.
        """
        batch, num_classes, drawn = len(emb_BPD), self.num_classes, self.pixels_per_image
        indices_B = indices_B.to(torch.int64)
        image_B1 = torch.arange(batch, device=emb_BPD.device)[:, None]
        group_BP = torch.where(class_BP < num_classes, image_B1 * num_classes + class_BP, batch * num_classes)
        groups = sort_groups(key_BP.flatten(), group_BP.flatten(), batch * num_classes)
        emb_ND = emb_BPD.flatten(0, 1)
        position_GV, exists_GV = groups.first(drawn)
        pixel_GVD = emb_ND.index_select(0, position_GV.flatten()).unflatten(0, position_GV.shape)
        mean_GD, valid_G = region_means(emb_ND, groups)
        rows_GXD = torch.cat([pixel_GVD, mean_GD[:, None]], dim=1).to(self.rows_SD.dtype)
        rows_BCXD = rows_GXD.unflatten(0, (batch, num_classes))
        facts_BC2 = torch.stack([exists_GV.sum(1), valid_G.long()], dim=1).unflatten(0, (batch, num_classes))
        if all_gather is not None:
            rows_BCXD, facts_BC2, indices_B = map(all_gather, (rows_BCXD, facts_BC2, indices_B))
        pixels_BC, regions_BC = facts_BC2.unbind(2)
        if self.pixel_slots:
            written_C = self._append_(0, self.pixel_slots, self.pixel_head_C, rows_BCXD[:, :, :-1], pixels_BC)
            self.pixel_fill_C.add_(written_C).clamp_(max=self.pixel_slots)
        if self.region_slots and self.region_is_table:
            self._write_table_(rows_BCXD[:, :, -1:], regions_BC > 0, indices_B)
        elif self.region_slots:
            first = num_classes * self.pixel_slots
            region_BC1D = rows_BCXD[:, :, -1:]
            written_C = self._append_(first, self.region_slots, self.region_head_C, region_BC1D, regions_BC)
            fill_C1 = (self.region_valid_CR.sum(1) + written_C)[:, None]
            self.region_valid_CR.copy_(torch.arange(self.region_slots, device=fill_C1.device) < fill_C1)

    def _append_(
        self, first: int, slots: int, head_C: Tensor, rows_BCVD: Tensor, count_BC: Tensor
    ) -> Tensor:  # fmt: skip
        # Appends rows_BCVD[b, c, :count_BC[b, c]] to the ring of class c, `slots` rows that begin at
        # first + c * slots; images in order. Returns how many per class. More rows than slots: the earlier
        # ones would be overwritten in the same call, and are left out.
        device, total_C = head_C.device, count_BC.sum(0)
        rank_V = torch.arange(rows_BCVD.shape[2], device=device)
        order_BCV = (count_BC.cumsum(0) - count_BC)[:, :, None] + rank_V
        valid_BCV = (rank_V < count_BC[:, :, None]) & (order_BCV >= (total_C - slots)[:, None])
        ring_C1 = first + slots * torch.arange(self.num_classes, device=device)[:, None]
        self._put_(ring_C1 + (head_C[:, None] + order_BCV) % slots, rows_BCVD, valid_BCV)
        head_C.add_(total_C).remainder_(slots)
        return total_C

    def _write_table_(self, rows_BC1D: Tensor, valid_BC: Tensor, indices_B: Tensor) -> None:
        # The same image twice in one batch: the later visit overwrites, whatever order the device writes in.
        same_later_BB = (indices_B[:, None] == indices_B[None, :]).triu(1)
        valid_BC = valid_BC & ~(same_later_BB[:, :, None] & valid_BC[None, :, :]).any(1)
        first, slots = self.num_classes * self.pixel_slots, self.region_slots
        slot_BC = slots * torch.arange(self.num_classes, device=indices_B.device) + indices_B[:, None]
        # an index beyond the table must fail, and not end in the next class
        known_B1 = ((indices_B >= 0) & (indices_B < slots))[:, None]
        self._put_(torch.where(known_B1, first + slot_BC, self.spare + 1), rows_BC1D, valid_BC)
        seen_F = torch.zeros(self.region_valid_CR.numel() + 1, dtype=torch.bool, device=indices_B.device)
        seen_F.index_fill_(0, torch.where(valid_BC, slot_BC, -1).flatten(), True)
        self.region_valid_CR.logical_or_(seen_F[:-1].view_as(self.region_valid_CR))

    def _put_(self, slot: Tensor, rows: Tensor, valid: Tensor) -> None:
        # Shapes that do not depend on how many rows are valid: the others go to the spare row.
        slot_R = torch.where(valid, slot, self.spare).flatten()
        self.rows_SD.index_copy_(0, slot_R, rows.reshape(-1, self.dim))
        self.rows_SD[self.spare].zero_()

    def fill(self) -> dict[str, Tensor]:
        """Filled share of each class's slots, (C,) float32: `pixel_fill`, `region_fill`, where they exist."""
        shares = {}
        if self.pixel_slots:
            shares["pixel_fill"] = self.pixel_fill_C / self.pixel_slots
        if self.region_slots:
            shares["region_fill"] = self.region_valid_CR.float().mean(1)
        return shares

    @torch.no_grad()
    def draw(self, most_C: Tensor, width: int, seed: int, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Draw up to `most_C[c]` different filled slots of each class, keyed by (seed, step).

        The filled slots form a circle that is cut into as many arcs as are wanted, at a random place, and
        each arc gives one uniform slot: every slot is equally likely, none comes twice. Of the memory only
        one bit per region is read. Returns rows of `rows_SD`, (C, width), and how many were drawn, (C,);
        rows from there on are arbitrary.
        """
        device = most_C.device
        class_C1 = torch.arange(self.num_classes, device=device)[:, None]
        running_CR = F.pad(self.region_valid_CR.cumsum(1), (1, 0))
        filled_C = self.pixel_fill_C + running_CR[:, -1]
        drawn_C = torch.minimum(most_C, filled_C)
        filled_C1, drawn_C1 = filled_C.clamp(min=1)[:, None], drawn_C.clamp(min=1)[:, None]
        state_C1 = fold(draw_state(seed, step, 2), class_C1)
        place = torch.arange(width + 1, device=device)  # of the arcs, and of the turn
        low_CQ, high_CQ = (arc_Q * filled_C1 // drawn_C1 for arc_Q in (place[:-1], place[1:]))
        inside_CQ, turn_C1 = to_key(fold(state_C1, place)).tensor_split([width], dim=1)
        inside_CQ = inside_CQ % (high_CQ - low_CQ).clamp(min=1)
        slot_CQ = (low_CQ + inside_CQ + turn_C1 % filled_C1) % filled_C1
        pixel_CQ = class_C1 * self.pixel_slots + slot_CQ
        if not self.region_slots:
            return pixel_CQ, drawn_C
        # the n-th filled region lies where the running count of filled regions first reaches n
        region_CQ = slot_CQ - self.pixel_fill_C[:, None]
        place_CQ = torch.searchsorted(running_CR, region_CQ + 1) - 1
        first_C1 = self.num_classes * self.pixel_slots + class_C1 * self.region_slots
        place_CQ = place_CQ.clamp(max=self.region_slots - 1)
        return torch.where(region_CQ < 0, pixel_CQ, first_C1 + place_CQ), drawn_C

    def everything(self) -> tuple[Tensor, Tensor]:
        """All slots: embeddings (C, T + R, D) float32 and valid (C, T + R)."""
        filled_CT = torch.arange(self.pixel_slots, device=self.rows_SD.device) < self.pixel_fill_C[:, None]
        rows_CSD = torch.cat([self.pixel_CTD, self.region_CRD], dim=1).float()
        return rows_CSD, torch.cat([filled_CT, self.region_valid_CR], dim=1)
