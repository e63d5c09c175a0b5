"""The prototype head against a straightforward one: forward, backward, clustering and update of one step.

    python tools/benchmark.py head [--device cpu|cuda] [--repeats 5] [--case N D C K ...] [--threads 2]

Both start from the same feature map and give the same losses and (up to rounding) the same new prototypes.
Times are medians of alternating repeats. Floors are the bare products of pixels and prototypes: two where
scores are kept for backward, three where they are computed again. Memory is the peak of tensors
alive beyond the inputs, from the allocator's own events (CUDA: max_memory_allocated).
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.core.prototypes import PrototypeHead

CASES = ((32768, 256, 150, 10), (32768, 256, 19, 10), (8192, 256, 847, 10))
IGNORE = 255 * 255


class StraightforwardHead(nn.Module):
    """What one writes first: a loop over classes, similarities computed twice, PPC by `cross_entropy`."""

    prototypes: Tensor

    def __init__(self, prototypes: Tensor) -> None:
        super().__init__()
        self.register_buffer("prototypes", prototypes.clone())

    def step(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of one batch; moves the prototypes."""
        num_classes, num_prototypes, dim = self.prototypes.shape
        emb = F.normalize(features.permute(0, 2, 3, 1).reshape(-1, dim), dim=1)
        label = labels.flatten()
        scores = torch.einsum("nd,ckd->nck", emb, self.prototypes).amax(2)
        logits = 10 * scores.view(*labels.shape, num_classes).permute(0, 3, 1, 2)
        sims = emb @ self.prototypes.view(-1, dim).t()
        target = torch.full_like(label, IGNORE)
        new = self.prototypes.clone()
        with torch.no_grad():
            for c in range(num_classes):
                mine = label == c
                if not mine.any():
                    continue
                own = sims[mine][:, c * num_prototypes : (c + 1) * num_prototypes]
                plan = ((own - 1) / 0.05).exp()
                for _ in range(3):
                    plan = plan / plan.sum(0, keepdim=True)
                    plan = plan / plan.sum(1, keepdim=True)
                index = plan.argmax(1)
                target[mine] = c * num_prototypes + index
                one_hot = F.one_hot(index, num_prototypes).to(emb.dtype)
                sums = one_hot.t() @ emb[mine]
                moved = F.normalize(0.99 * new[c] + 0.01 * F.normalize(sums, dim=1), dim=1)
                new[c] = torch.where(one_hot.sum(0)[:, None] > 0, moved, new[c])
        valid = target != IGNORE
        ppc = F.cross_entropy(sims / 0.1, target, ignore_index=IGNORE)
        positive = sims[valid].gather(1, target[valid][:, None])
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        loss = loss + 0.01 * ppc + 0.01 * (1 - positive).square().mean()
        loss.backward()
        self.prototypes.copy_(new)
        return loss.detach()


def ours(head: PrototypeHead, features: Tensor, labels: Tensor) -> Tensor:
    """The same with this package."""
    out = head.training_step(features, labels)
    loss = F.cross_entropy(out.logits, labels, ignore_index=IGNORE) + 0.01 * out.ppc + 0.01 * out.ppd
    loss.backward()
    head.update_(out)
    return loss.detach()


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest sum of tensors alive at a time during one call, beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as prof:
        function()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measure(
    n: int,
    d: int,
    c: int,
    k: int,
    device: torch.device,
    repeats: int,
    dtype: torch.dtype = torch.float32,
    plain_repeats: int | None = None,
) -> dict[str, float]:
    """Medians in ms, peaks in 10⁶ bytes, and the difference of the losses, of one case.

    dtype: of the features and of the products with all prototypes; bfloat16 puts the straightforward head
    under autocast.
    """
    generator = torch.Generator().manual_seed(0)
    side = 2 ** ((n // 2).bit_length() // 2)
    features = torch.randn(2, d, n // 2 // side, side, generator=generator).to(device, dtype)
    features.requires_grad_()
    labels = torch.randint(0, c, (2, n // 2 // side, side), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = IGNORE
    labels = labels.to(device)
    head = PrototypeHead(
        d,
        c,
        k,
        ignore_index=IGNORE,
        start="random",
        logit_scale=10,
        momentum=0.99,  # as the other has them
        score_dtype="float32" if dtype == torch.float32 else "bfloat16",
    ).to(device)
    plain = StraightforwardHead(head.prototypes).to(device)
    pixels = features.detach().permute(0, 2, 3, 1).reshape(-1, d)
    rows = head.prototypes.flatten(0, 1).to(dtype, copy=True)
    sims = torch.empty(len(pixels), len(rows), device=device, dtype=dtype)
    back = torch.empty_like(pixels)

    def run_ours() -> Tensor:
        features.grad = None
        return ours(head, features, labels)

    def run_plain() -> Tensor:
        features.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
            return plain.step(features, labels)

    def two_products() -> None:
        torch.mm(pixels, rows.t(), out=sims)
        torch.mm(sims, rows, out=back)

    losses = run_ours(), run_plain()
    grown = [peak_bytes(run, device) for run in (run_ours, run_plain)]
    two_products()
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "two": []}
    for repeat in range(repeats):
        seconds["ours"].append(timed(run_ours, device))
        if plain_repeats is None or repeat < plain_repeats:
            seconds["plain"].append(timed(run_plain, device))
        seconds["two"].append(timed(two_products, device))
    return {
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()},
        "ours_mb": grown[0] / 1e6,
        "plain_mb": grown[1] / 1e6,
        "loss_difference": abs(losses[0] - losses[1]).item(),
    }


def print_row(n: int, d: int, c: int, k: int, found: dict[str, float]) -> None:
    """One row of the table."""
    mine, plain, two = (found[f"{name}_ms"] for name in ("ours", "plain", "two"))
    print(
        f"| {n} | {d} | {c} | {k} | {mine:.0f} | {plain:.0f}"
        f" | {plain / mine:.2f} | {two:.0f} | {mine / two:.2f} | {mine / two / 1.5:.2f}"
        f" | {found['ours_mb']:.0f} | {found['plain_mb']:.0f} | 1/{found['plain_mb'] / found['ours_mb']:.1f}"
        f" | {found['loss_difference']:.1e} |",
        flush=True,
    )


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmark.py head")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--case", type=int, nargs=4, action="append", metavar=("N", "D", "C", "K"))
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"{machine(device)}; torch {torch.__version__}; float32; median of {args.repeats} repeats")
    print("| N | D | C | K | ours ms | straightforward ms | times faster | two products ms | ours / two"
          " | ours / three | ours MB | straightforward MB | memory | loss difference |")  # fmt: skip
    print("|" + "---|" * 14)
    for case in args.case or CASES:
        n, d, c, k = case
        print_row(n, d, c, k, measure(n, d, c, k, device, args.repeats))


def machine(device: torch.device) -> str:
    """Its name and how much of it is used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
