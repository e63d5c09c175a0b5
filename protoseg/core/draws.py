"""Keyed random draws: which pixels are drawn is a function of (seed, step, dataset index, class) alone.

Axes: B images, P pixels of one image (h*w), N = B*P pixels, G groups, K drawn pixels per group.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

KEY_BITS = 40  # a key is a uniform integer in [0, 2**40); the bits above it hold the group in a joint sort
NO_KEY = 1 << KEY_BITS
Integers = TypeVar("Integers", int, Tensor)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # constants of splitmix64, as signed 64-bit integers
_MUL_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MUL_2 = 0x94D049BB133111EB - (1 << 64)


def mix(x: Integers) -> Integers:
    """Scramble int64 integers, one to one (the finaliser of splitmix64; arithmetic modulo 2**64).

    Of a Python integer, whose bits never end, the lower 64 are the result.
    """
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MUL_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MUL_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def fold(state: Integers | int, value: Integers) -> Integers:
    """Add one integer to a hash state; shapes of tensors broadcast."""
    return mix(state + (value + 1) * _GOLDEN)


def draw_state(seed: int, step: int | Tensor, salt: int) -> int | Tensor:
    """Hash state of one kind of draw (`salt`) in one step, of the type of `step`: an int, or 0-d int64."""
    state = _signed(fold(seed & ((1 << 62) - 1), salt))
    return fold(state, step) if isinstance(step, Tensor) else _signed(fold(state, step))


def _signed(x: int) -> int:
    """The lower 64 bits, as int64 reads them."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def to_key(state: Tensor) -> Tensor:
    """Key in [0, 2**40) of a hash state: its upper bits."""
    return (state >> (64 - KEY_BITS)) & (NO_KEY - 1)


def pixel_keys(class_BP: Tensor, indices_B: Tensor, seed: int, step: int | Tensor, salt: int) -> Tensor:
    """Random key of every pixel, a function of (seed, step, dataset index, class, position) alone.

    The pixels with the smallest keys are "the draw". Nothing else enters, so that any split of a batch over
    ranks and any resumed run draws the same pixels. class_BP int64, indices_B int64; returns (B, P) int64.
    """
    state_B = fold(draw_state(seed, step, salt), indices_B.to(torch.int64))
    position_P = torch.arange(class_BP.shape[1], device=class_BP.device)
    return to_key(fold(state_B[:, None], (class_BP << 32) + position_P))


def class_map(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels (B, h, w) as (B, P) int64, in which every pixel without a class becomes `num_classes`."""
    class_BP = labels.flatten(1).to(torch.int64)
    known = (class_BP >= 0) & (class_BP < num_classes) & (class_BP != ignore_index)
    return torch.where(known, class_BP, num_classes)


def draw_pixels(indices_B: Tensor, pixels: int, count: int, seed: int, step: int | Tensor) -> Tensor:
    """`count` different pixels of 0 … pixels − 1 of each image, ascending (B, count) int64; uniform.

    indices_B: in the dataset. A function of (seed, step, dataset index), as `pixel_keys`.
    """
    key_BP = pixel_keys(
        torch.zeros_like(indices_B)[:, None].expand(-1, pixels).long(), indices_B, seed, step, 5
    )
    return key_BP.argsort(1)[:, :count].sort(1).values


class Groups(NamedTuple):
    """Pixels sorted by group, and by key within it: group g is order[start[g]], ..., order[start[g + 1] - 1].

    order_N (N,) and start_G (G + 1,), int64; the rest of `order_N` belongs to no group.
    """

    order_N: Tensor
    start_G: Tensor

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Positions (G, count) of the smallest keys of each group, in order, and which of them exist.

        Those that do not are some other pixel, always the same.
        """
        slot_GK = self.start_G[:-1, None] + torch.arange(count, device=self.start_G.device)
        valid_GK = slot_GK < self.start_G[1:, None]
        return self.order_N[torch.where(valid_GK, slot_GK, 0)], valid_GK


def sort_groups(key_N: Tensor, group_N: Tensor, num_groups: int) -> Groups:
    """Sort pixels by (group, key, position); pixels of group `num_groups` belong to none."""
    sorted_N, order_N = torch.sort((group_N << KEY_BITS) | key_N, stable=True)
    bound_G = torch.arange(num_groups + 1, device=key_N.device) << KEY_BITS
    return Groups(order_N, torch.searchsorted(sorted_N, bound_G))
