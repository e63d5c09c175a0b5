"""The class prior."""

import torch
from torch import Tensor


def log_prior(pixel_counts_C: Tensor, live_C: Tensor) -> Tensor:
    """log π_c (C,), π_c the class's share of the pixels seen of live classes, one pixel added to each.

    0 for classes that are not live.
    """
    counts_C = torch.where(live_C, pixel_counts_C + 1, 0)
    return torch.where(live_C, counts_C / counts_C.sum().clamp(min=1), 1).log()
