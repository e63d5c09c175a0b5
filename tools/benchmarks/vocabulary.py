"""Training steps with a large vocabulary: what memory they need, against what they avoid.

    python tools/benchmark.py vocabulary [--classes 847] [--prototypes 10] [--dim 768] [--images 2]
                                         [--size 512] [--steps 3] [--device cpu|cuda] [--threads 2]

A 1×1 convolution from 256 channels at stride 4 stands for the model; a step is its forward pass, the head,
cross-entropy at label resolution, PPC and PPD, backward, AdamW and the update of the prototypes. Peak: on the
CPU of the process (resident) beyond what it had before the first step, on CUDA of the allocator.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from benchmarks.head import machine
from torch import Tensor, nn

from protoseg.core.losses import downsample_labels, upsampled_cross_entropy
from protoseg.core.prototypes import PrototypeHead

STRIDE, CHANNELS = 4, 256


def step(
    project: nn.Module, head: PrototypeHead, optimizer: torch.optim.Optimizer, maps: Tensor, labels: Tensor
) -> Tensor:
    """One training step; returns the loss."""
    features = project(maps)
    out = head.training_step(features, downsample_labels(labels, features.shape[-2:]))
    loss = upsampled_cross_entropy(out.logits, labels, ignore_index=head.ignore_index)
    loss = loss + 0.01 * out.ppc + 0.01 * out.ppd
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    head.update_(out)
    return loss.detach()


def resident_now() -> int:
    """Bytes of memory that this process has now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def resident_peak() -> int:
    """Largest number of bytes that it ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: list[str]) -> None:
    """Print sizes, the peak and the time of each step."""
    parser = argparse.ArgumentParser(prog="benchmark.py vocabulary")
    for name, default in (("classes", 847), ("prototypes", 10), ("dim", 768), ("images", 2), ("size", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)
    side = args.size // STRIDE
    pixels = args.images * side**2
    ignore = 65535
    head = PrototypeHead(args.dim, args.classes, args.prototypes, ignore_index=ignore, start="random")
    project = nn.Conv2d(CHANNELS, args.dim, 1)
    head, project = head.to(device), project.to(device)
    optimizer = torch.optim.AdamW(project.parameters(), lr=1e-3)
    maps = torch.randn(args.images, CHANNELS, side, side, device=device)
    cells = torch.randint(0, args.classes, (args.images, side, side), device=device)
    labels = cells.repeat_interleave(STRIDE, 1).repeat_interleave(STRIDE, 2)
    labels[:, :STRIDE] = ignore

    similarities = 4 * pixels * args.classes * args.prototypes
    full_logits = 4 * args.images * args.classes * args.size**2
    print(f"{machine(device)}; torch {torch.__version__}; float32")
    print(f"C = {args.classes}, K = {args.prototypes}, D = {args.dim}, {args.images} × {args.size}²")
    print(
        f"N = {pixels}; N × C × K: {similarities / 2**20:.0f} MB; B × C × H × W: {full_logits / 2**20:.0f} MB"
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident_now()
    for number in range(args.steps):
        start = time.perf_counter()
        loss = step(project, head, optimizer, maps, labels).item()
        print(f"step {number + 1}: loss {loss:.4f}, {time.perf_counter() - start:.2f} s", flush=True)
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()
    extra = after - before
    print(
        f"peak {after / 2**20:.0f} MB, {extra / 2**20:.0f} MB of it for the steps:"
        f" {extra / similarities:.2f} of N × C × K, {extra / full_logits:.2f} of B × C × H × W"
    )
