"""Oracles written from the equations, pixel by pixel, and what several tests need."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor


def assert_close_report(got: Tensor, expected: Tensor, what: str, axes: str = "", atol: float = 1e-6) -> None:
    """Fail with the worst element, its place and both values. `axes`: one letter each (N, C, K)."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel() == 0:
        return
    error = (got.double() - expected.double()).abs()
    worst = int(error.nan_to_num(math.inf).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)]
    names = {"N": "pixel", "C": "class", "K": "prototype", "D": "channel"}
    where = ", ".join(f"{names.get(axes[i : i + 1], f'axis {i}')} {at}" for i, at in enumerate(place))
    value = error.flatten()[worst].item()
    assert value <= atol, (
        f"{what}: worst at {where}: got {got.flatten()[worst].item():.9g},"
        f" expected {expected.flatten()[worst].item():.9g} (off by {value:.3g}, allowed {atol:.3g})"
    )


def unit_vectors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit vectors along the last axis."""
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1
    )


SIZES = [(23, 5, 4, 3), (7, 3, 1, 4), (9, 4, 3, 1), (1, 2, 2, 2), (5, 2, 1, 1), (40, 6, 3, 10)]  # N D C K


def case(
    n: int, d: int, c: int, k: int, dtype: torch.dtype = torch.double, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit embeddings (n, d), prototypes (c, k, d) and labels (n,) from −1 on."""
    emb, protos = (
        unit_vectors(n, d, seed=seed, dtype=dtype),
        unit_vectors(c, k, d, seed=seed + 1, dtype=dtype),
    )
    labels = torch.randint(-1, c, (n,), generator=torch.Generator().manual_seed(seed))
    return emb, protos, labels


def brute_scores(
    emb: Tensor, protos: Tensor, labels: Tensor, temperature: float, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Class scores, own-class similarities and log-sum-exp by loops; differentiable."""
    classes, count, _ = protos.shape
    scores, own, lse = [], [], []
    for n in range(len(emb)):
        sims = [[(emb[n] * protos[c, k]).sum() for k in range(count)] for c in range(classes)]
        minus_one = emb.new_tensor(-1.0)
        scores.append(
            torch.stack([torch.stack(sims[c]).max() if live[c] else minus_one for c in range(classes)])
        )
        y = max(int(labels[n]), 0)
        own.append(torch.stack(sims[y]) if live[y] else emb.new_full((count,), -1.0))
        lse.append(
            torch.stack([s / temperature for c in range(classes) if live[c] for s in sims[c]]).logsumexp(0)
        )
    return torch.stack(scores), torch.stack(own), torch.stack(lse)


def brute_sinkhorn(own: Tensor, labels: Tensor, classes: int, kappa: float, iterations: int) -> Tensor:
    """Class by class in double: prototype marginal N_c/K, then pixel marginal 1."""
    plan = torch.zeros(own.shape, dtype=torch.double)
    for c in range(classes):
        mine = [n for n in range(len(labels)) if labels[n] == c]
        if not mine:
            continue
        log_q = own[mine].double() / kappa
        for _ in range(iterations):
            log_q = log_q - log_q.logsumexp(0, keepdim=True) + math.log(len(mine) / own.shape[1])
            log_q = log_q - log_q.logsumexp(1, keepdim=True)
        plan[mine] = log_q.exp()
    return plan


def brute_update(protos: Tensor, emb: Tensor, labels: Tensor, assignment: Tensor, momentum: float) -> Tensor:
    """Prototype by prototype, from the equation."""
    new = protos.clone()
    for c in range(protos.shape[0]):
        for k in range(protos.shape[1]):
            mine = (labels == c) & (assignment == k)
            if not mine.any():
                continue
            mean = emb[mine].mean(0)
            if mean.norm() < 1e-6:
                continue
            moved = momentum * protos[c, k] + (1 - momentum) * mean / mean.norm()
            new[c, k] = moved / moved.norm()
    return new


def peak_bytes(work: Callable[[], Any]) -> int:
    """Largest sum of tensors alive at a time during one call, beyond those alive before it (CPU)."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        work()
    alive = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def run_ranks(world: int, work: Callable[[int, Callable[[Tensor, str], Tensor]], Any]) -> list[Any]:
    """Run work(rank, all_reduce) on ranks that are threads."""
    return Ranks(world).run(lambda rank, _, all_reduce: work(rank, all_reduce))
