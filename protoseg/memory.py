"""Pixel and region memories of cross-image contrast, and the keyed draws that decide what enters them.

Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV 2021, section 3.2.
Needs torch only. No loop over images or classes, no read of the device by the host.

Axes: B images, P pixels of one image (h*w), N = B*P pixels, C classes, D channels, V pixels that enter per
image and class, T slots of the pixel ring, R slots of the region memory, G groups, Q drawn slots per class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEY_BITS = 40  # a key is a uniform integer in [0, 2**40); the bits above it hold the group in a joint sort
NO_KEY = 1 << KEY_BITS
MEMORIES = ("pixel", "region", "both")

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # constants of splitmix64, as signed 64-bit integers
_MUL_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MUL_2 = 0x94D049BB133111EB - (1 << 64)

Gather = Callable[[Tensor], Tensor]
Reduce = Callable[[Tensor, str], Tensor]


def full_precision(x: Tensor) -> Tensor:
    """Half types become float32, double stays double."""
    return x if x.dtype == torch.float64 else x.float()


def mix(x: Tensor) -> Tensor:
    """Scramble int64 integers, one to one (the finaliser of splitmix64; arithmetic modulo 2**64)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MUL_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MUL_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def fold(state: Tensor, value: Tensor) -> Tensor:
    """Add one integer to a hash state; both int64, shapes broadcast."""
    return mix(state + (value + 1) * _GOLDEN)


def draw_state(seed: int, step: int, salt: int, device: torch.device) -> Tensor:
    """Hash state, a 0-d int64 tensor, of one kind of draw (`salt`) in one step."""
    state = torch.full((), seed & ((1 << 62) - 1), dtype=torch.int64, device=device)
    state = fold(state, torch.full((), salt, dtype=torch.int64, device=device))
    return fold(state, torch.full((), step, dtype=torch.int64, device=device))


def to_key(state: Tensor) -> Tensor:
    """Key in [0, 2**40) of a hash state: its upper bits."""
    return (state >> (64 - KEY_BITS)) & (NO_KEY - 1)


def pixel_keys(class_BP: Tensor, indices_B: Tensor, seed: int, step: int, salt: int) -> Tensor:
    """Random key of every pixel, a function of (seed, step, dataset index, class, position) alone.

    The pixels with the smallest keys are "the draw". Nothing else enters, so that any split of a batch over
    ranks and any resumed run draws the same pixels. class_BP int64, indices_B int64; returns (B, P) int64.
    """
    state_B = fold(draw_state(seed, step, salt, class_BP.device), indices_B.to(torch.int64))
    position_P = torch.arange(class_BP.shape[1], device=class_BP.device)
    return to_key(fold(state_B[:, None], (class_BP << 32) + position_P))


def class_map(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels (B, h, w) as (B, P) int64, in which every pixel without a class becomes `num_classes`."""
    class_BP = labels.flatten(1).to(torch.int64)
    known = (class_BP >= 0) & (class_BP < num_classes) & (class_BP != ignore_index)
    return torch.where(known, class_BP, num_classes)


def first_per_group(key_N: Tensor, group_N: Tensor, num_groups: int, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the `count` smallest keys of each group, in order of the key.

    Equal keys keep the order of their positions. Entries of group `num_groups` belong to no group.
    Returns positions (G, count) int64, 0 where the group has no more, and valid (G, count) bool.
    """
    sorted_N, order_N = torch.sort((group_N << KEY_BITS) | key_N, stable=True)
    bounds = torch.arange(num_groups + 1, device=key_N.device) << KEY_BITS
    start_G1 = torch.searchsorted(sorted_N, bounds)
    slot_GK = start_G1[:-1, None] + torch.arange(count, device=key_N.device)
    valid_GK = slot_GK < start_G1[1:, None]
    position_GK = order_N[torch.where(valid_GK, slot_GK, 0)]
    return torch.where(valid_GK, position_GK, 0), valid_GK


def region_means(emb_BPD: Tensor, class_BP: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """l2-normalised mean embedding of each class in each image (section 3.2, "region memory").

    Returns means (B, C, D) float32 or float64 and valid (B, C); a class that is absent, or whose mean has a
    norm below 1e-6, is not valid.
    """
    batch, dim = len(emb_BPD), emb_BPD.shape[2]
    image_B1 = torch.arange(batch, device=class_BP.device)[:, None]
    group_N = (image_B1 * (num_classes + 1) + class_BP).flatten()
    # a segmented sum over pixels sorted by group: fast, and added up in the same order in every run
    groups = batch * (num_classes + 1)
    sorted_N, order_N = group_N.sort(stable=True)
    bound_G1 = torch.searchsorted(sorted_N, torch.arange(groups + 1, device=class_BP.device))
    rows_ND = full_precision(emb_BPD).flatten(0, 1)
    sum_GD = F.embedding_bag(order_N, rows_ND, bound_G1[:-1], mode="sum")
    count_BC = bound_G1.diff().view(batch, -1)[:, :-1]
    mean_BCD = sum_GD.view(batch, num_classes + 1, dim)[:, :-1] / count_BC.clamp(min=1)[:, :, None]
    norm_BC1 = mean_BCD.norm(dim=2, keepdim=True)
    valid_BC = (count_BC > 0) & (norm_BC1.squeeze(2) > 1e-6)
    return mean_BCD / norm_BC1.clamp(min=1e-6), valid_BC


def memory_slots(
    num_classes: int,
    dim: int,
    num_images: int,
    memory: str,
    memory_size: int | None,
    cap_mb: float,
    bytes_each: int,
) -> tuple[int, int, str | None]:
    """Slots per class of the pixel ring and of the region memory, and a message where the cap bites.

    Wanted are `memory_size` (default 10 per image, the paper's T = 10N) and one region per image. Too much
    for `cap_mb` (10**6 bytes): the region table stays whole while it needs at most half of the room, and
    the pixel ring takes the rest. A region memory with fewer slots than images is a ring.
    """
    pixels = (10 * num_images if memory_size is None else memory_size) if memory != "region" else 0
    regions = num_images if memory != "pixel" else 0
    room = int(cap_mb * 1e6) // (num_classes * dim * bytes_each)
    if pixels + regions <= room:
        return pixels, regions, None
    if room < (2 if memory == "both" else 1):
        need = num_classes * dim * bytes_each * (2 if memory == "both" else 1) / 1e6
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


def _put_(table_CSD: Tensor, class_R: Tensor, slot_R: Tensor, rows_RD: Tensor, valid_R: Tensor) -> None:
    # Writes the valid rows, with shapes that do not depend on how many there are: every other row repeats
    # the first valid one, and where there is none at all a slot is overwritten with what it holds.
    first = valid_R.to(torch.uint8).argmax(0, keepdim=True)
    class_R = torch.where(valid_R, class_R, class_R.index_select(0, first))
    slot_R = torch.where(valid_R, slot_R, slot_R.index_select(0, first))
    held_1D = table_CSD[class_R[:1], slot_R[:1]]
    spare_1D = torch.where(valid_R.any(), rows_RD.index_select(0, first), held_1D)
    table_CSD.index_put_((class_R, slot_R), torch.where(valid_R[:, None], rows_RD, spare_1D))


class PixelMemory(nn.Module):
    """Pixel ring (C, T, D) and region memory (C, R, D) of all classes; buffers only, nothing is learned.

    The pixel ring keeps the last T pixels of each class, drawn V per image; the oldest leaves first. The
    region memory is a table by dataset index, overwritten at each visit, or a ring where the cap forces it.
    Buffers are `pixel_CTD`, `pixel_head_C`, `pixel_fill_C`, `region_CRD`, `region_head_C`,
    `region_valid_CR`; `message` says what the cap took away, or is None.

    Args: dim and num_classes; num_images in the training set; memory "pixel", "region" or "both";
    pixels_per_image V; memory_size T (default 10 per image); cap_mb for both parts together; storage_dtype
    float32 or float16.
    Errors: ValueError on an unknown memory, or on a cap that has no room for one slot per class.
    Source: ICCV 2021, section 3.2 and 3.3.
    """

    pixel_CTD: Tensor
    pixel_head_C: Tensor
    pixel_fill_C: Tensor
    region_CRD: Tensor
    region_head_C: Tensor
    region_valid_CR: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_images: int,
        *,
        memory: str = "both",
        pixels_per_image: int = 10,
        memory_size: int | None = None,
        cap_mb: float = 256,
        storage_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if memory not in MEMORIES:
            raise ValueError(f"memory={memory!r} is not one of {', '.join(MEMORIES)}")
        if storage_dtype not in (torch.float32, torch.float16):
            raise ValueError(f"storage_dtype={storage_dtype} is not float32 or float16")
        for name, value in (("num_images", num_images), ("pixels_per_image", pixels_per_image)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if memory_size is not None and memory_size < 1:
            raise ValueError(f"memory_size={memory_size} must be at least 1")
        pixels, regions, self.message = memory_slots(
            num_classes, dim, num_images, memory, memory_size, cap_mb, storage_dtype.itemsize
        )
        self.dim, self.num_classes, self.pixels_per_image = dim, num_classes, pixels_per_image
        self.pixel_slots, self.region_slots = pixels, regions
        self.region_is_table = regions == num_images
        counts = torch.zeros(num_classes, dtype=torch.int64)
        self.register_buffer("pixel_CTD", torch.zeros(num_classes, pixels, dim, dtype=storage_dtype))
        self.register_buffer("pixel_head_C", counts.clone())
        self.register_buffer("pixel_fill_C", counts.clone())
        self.register_buffer("region_CRD", torch.zeros(num_classes, regions, dim, dtype=storage_dtype))
        self.register_buffer("region_head_C", counts.clone())
        self.register_buffer("region_valid_CR", torch.zeros(num_classes, regions, dtype=torch.bool))

    @torch.no_grad()
    def enqueue_(
        self,
        emb_BPD: Tensor,
        class_BP: Tensor,
        key_BP: Tensor,
        indices_B: Tensor,
        all_gather: Gather | None = None,
    ) -> None:
        """Write one batch, in global image order: V pixels and one region per image and class.

        emb_BPD unit norm along D; class_BP from `class_map`; key_BP from `pixel_keys`; indices_B dataset
        indices. all_gather concatenates along axis 0 in rank order; with it, all ranks end with the memory
        that one process gets from the joint batch.
        """
        batch, num_classes, drawn = len(emb_BPD), self.num_classes, self.pixels_per_image
        dtype = self.pixel_CTD.dtype
        rows: list[Tensor] = []
        facts = [indices_B.to(torch.int64)[:, None]]
        if self.pixel_slots:
            image_B1 = torch.arange(batch, device=emb_BPD.device)[:, None]
            group_BP = torch.where(
                class_BP < num_classes, image_B1 * num_classes + class_BP, batch * num_classes
            )
            position_GV, valid_GV = first_per_group(
                key_BP.flatten(), group_BP.flatten(), batch * num_classes, drawn
            )
            picked_GVD = emb_BPD.flatten(0, 1)[position_GV].to(dtype)
            rows.append(picked_GVD.view(batch, num_classes, drawn, self.dim))
            facts.append(valid_GV.sum(1).view(batch, num_classes))
        if self.region_slots:
            mean_BCD, valid_BC = region_means(emb_BPD, class_BP, num_classes)
            rows.append(mean_BCD.to(dtype)[:, :, None])
            facts.append(valid_BC.to(torch.int64))
        if all_gather is not None:  # two collectives: the embeddings, and everything that is an integer
            gathered = all_gather(torch.cat(rows, dim=2))
            rows = list(gathered.split([part.shape[2] for part in rows], dim=2))
            facts = list(all_gather(torch.cat(facts, dim=1)).split([part.shape[1] for part in facts], dim=1))
        if self.pixel_slots:
            fill_C = _ring_write_(self.pixel_CTD, self.pixel_head_C, rows[0], facts[1])
            self.pixel_fill_C.add_(fill_C).clamp_(max=self.pixel_slots)
        if self.region_slots and self.region_is_table:
            self._write_table_(rows[-1][:, :, 0], facts[-1] > 0, facts[0][:, 0])
        elif self.region_slots:
            written_C = _ring_write_(self.region_CRD, self.region_head_C, rows[-1], facts[-1])
            fill_C = self.region_valid_CR.sum(1) + written_C
            slot_R = torch.arange(self.region_slots, device=fill_C.device)
            self.region_valid_CR.copy_(slot_R < fill_C[:, None])

    def _write_table_(self, mean_BCD: Tensor, valid_BC: Tensor, indices_B: Tensor) -> None:
        # The same image twice in one batch: the later visit overwrites, whatever order the device writes in.
        same_later_BB = (indices_B[:, None] == indices_B[None, :]).triu(1)
        valid_BC = valid_BC & ~(same_later_BB[:, :, None] & valid_BC[None, :, :]).any(1)
        batch, num_classes, _ = mean_BCD.shape
        class_R = torch.arange(num_classes, device=mean_BCD.device).repeat(batch)
        slot_R, valid_R = indices_B.repeat_interleave(num_classes), valid_BC.flatten()
        _put_(self.region_CRD, class_R, slot_R, mean_BCD.flatten(0, 1), valid_R)
        _put_(self.region_valid_CR[:, :, None], class_R, slot_R, torch.ones_like(valid_R)[:, None], valid_R)

    def count_C(self) -> Tensor:
        """Number of filled slots of each class, (C,) int64."""
        return self.pixel_fill_C + self.region_valid_CR.sum(1)

    def fill(self) -> dict[str, Tensor]:
        """Filled share of each class's slots, (C,) float32: `pixel_fill`, `region_fill`, where they exist."""
        shares = {}
        if self.pixel_slots:
            shares["pixel_fill"] = self.pixel_fill_C / self.pixel_slots
        if self.region_slots:
            shares["region_fill"] = self.region_valid_CR.float().mean(1)
        return shares

    @torch.no_grad()
    def draw(self, want_C: Tensor, width: int, seed: int, step: int) -> Tensor:
        """Draw `want_C[c]` (at most what is filled) different filled slots of each class, keyed by (seed,
        step).

        The filled slots form a circle that is cut into as many arcs as are wanted, at a random place, and
        each arc gives one uniform slot: every slot is equally likely, none comes twice, and the work does
        not grow with the memory. Returns slots (C, width) in [0, T + R), region slots after the pixel
        slots; entries from want_C on are arbitrary.
        """
        device = want_C.device
        filled_C1 = self.count_C().clamp(min=1)[:, None]
        want_C1 = want_C.clamp(min=1)[:, None]
        state_C1 = fold(draw_state(seed, step, 2, device), torch.arange(self.num_classes, device=device))[
            :, None
        ]
        arc_Q = torch.arange(width, device=device)
        low_CQ, high_CQ = arc_Q * filled_C1 // want_C1, (arc_Q + 1) * filled_C1 // want_C1
        inside_CQ = to_key(fold(state_C1, arc_Q)) % (high_CQ - low_CQ).clamp(min=1)
        turn_C1 = to_key(fold(state_C1, torch.full_like(state_C1, width))) % filled_C1
        slot_CQ = (low_CQ + inside_CQ + turn_C1) % filled_C1
        if not self.region_slots:
            return slot_CQ
        # the n-th filled region lies where the running count of filled regions first reaches n
        region_CQ = slot_CQ - self.pixel_fill_C[:, None]
        reached_CR = self.region_valid_CR.cumsum(1)
        region_slot_CQ = torch.searchsorted(reached_CR, region_CQ + 1).clamp(max=self.region_slots - 1)
        return torch.where(region_CQ < 0, slot_CQ, self.pixel_slots + region_slot_CQ)

    @torch.no_grad()
    def rows(self, slot_CQ: Tensor) -> Tensor:
        """Embeddings (C, Q, D), float32, of slots given as by `draw`."""
        class_C1 = torch.arange(self.num_classes, device=slot_CQ.device)[:, None]
        if not self.region_slots:
            return self.pixel_CTD[class_C1, slot_CQ].float()
        region_CQ = (slot_CQ - self.pixel_slots).clamp(min=0)
        region_CQD = self.region_CRD[class_C1, region_CQ]
        if not self.pixel_slots:
            return region_CQD.float()
        pixel_CQD = self.pixel_CTD[class_C1, slot_CQ.clamp(max=self.pixel_slots - 1)]
        return torch.where((slot_CQ < self.pixel_slots)[:, :, None], pixel_CQD, region_CQD).float()

    def everything(self) -> tuple[Tensor, Tensor]:
        """All slots: embeddings (C, T + R, D) float32 and valid (C, T + R)."""
        filled_CT = torch.arange(self.pixel_slots, device=self.pixel_CTD.device) < self.pixel_fill_C[:, None]
        rows_CSD = torch.cat([self.pixel_CTD, self.region_CRD], dim=1).float()
        return rows_CSD, torch.cat([filled_CT, self.region_valid_CR], dim=1)


def _ring_write_(ring_CTD: Tensor, head_C: Tensor, rows_BCVD: Tensor, count_BC: Tensor) -> Tensor:
    # Appends rows_BCVD[b, c, :count_BC[b, c]] to the ring of class c, images in order; returns how many per
    # class. More than T rows for one class: the earlier ones would be overwritten in the same call, and are
    # left out.
    batch, num_classes, drawn, dim = rows_BCVD.shape
    slots, device = ring_CTD.shape[1], ring_CTD.device
    total_C = count_BC.sum(0)
    rank_V = torch.arange(drawn, device=device)
    order_BCV = (count_BC.cumsum(0) - count_BC)[:, :, None] + rank_V
    valid_BCV = (rank_V < count_BC[:, :, None]) & (order_BCV >= (total_C - slots)[:, None])
    slot_BCV = (head_C[:, None] + order_BCV) % slots
    class_BCV = torch.arange(num_classes, device=device)[:, None].expand(batch, num_classes, drawn)
    _put_(ring_CTD, class_BCV.flatten(), slot_BCV.flatten(), rows_BCVD.reshape(-1, dim), valid_BCV.flatten())
    head_C.add_(total_C).remainder_(slots)
    return total_C
