"""Do ten prototypes find ten modes? Fixed embeddings, the start of the prototypes and Sinkhorn's iterations.

    python tools/benchmark.py modes [--seeds 30] [--steps 200]

One class of 600 pixels around ten random directions (D = 64, noise of length 0.3); K = 10, μ = 0.9, nothing
is revived. A seed counts if every mode is the nearest one of some prototype in the end.
"""

import argparse
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.core.prototypes import PrototypeHead

MODES, PIXELS, DIM, NOISE = 10, 600, 64, 0.3


def modes(seed: int) -> tuple[Tensor, Tensor]:
    """Features (1, D, 1, N) and the modes' directions (MODES, D)."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(MODES, DIM, generator=generator), dim=1)
    noise = NOISE * torch.randn(PIXELS, DIM, generator=generator) / DIM**0.5
    return (centres.repeat(PIXELS // MODES, 1) + noise).t().view(1, DIM, 1, PIXELS), centres


def covered(seed: int, start: Literal["random", "data"], iterations: int, steps: int) -> int:
    """How many modes have a prototype after `steps` updates."""
    features, centres = modes(seed)
    labels = torch.zeros(1, 1, PIXELS, dtype=torch.int64)
    torch.manual_seed(seed + 1000)  # the modes' own seed would put the prototypes onto them
    head = PrototypeHead(DIM, 1, MODES, start=start, sinkhorn_iterations=iterations, momentum=0.9)
    head.prepare_(features, labels)
    for _ in range(steps):
        head.update_(head.training_step(features, labels))
    return len((head.prototypes[0] @ centres.t()).argmax(1).unique())


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmark.py modes")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)
    print(f"seeds of {args.seeds} in which ten prototypes cover ten modes, after {args.steps} updates")
    print("| start | 3 iterations | 20 iterations |\n|---|---|---|")
    starts: tuple[Literal["random", "data"], ...] = ("random", "data")
    for start in starts:
        counts = (
            sum(covered(seed, start, iterations, args.steps) == MODES for seed in range(args.seeds))
            for iterations in (3, 20)
        )
        print(f"| {start} | " + " | ".join(f"{n} ({100 * n / args.seeds:.0f} %)" for n in counts) + " |")
