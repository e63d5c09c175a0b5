"""The prototype head against the method in plain torch (`protoseg.core.reference`): one step of each.

Forward, backward, clustering and update:

    python tools/benchmark.py head [--device cpu|cuda] [--repeats 5] [--case N D C K ...] [--threads 2]

Both start from the same feature map and give the same losses and (up to rounding) the same new prototypes.
"Ours" has PPC of all pixels and no class prior, as the reference; "default" PPC of one pixel in eight and the
prior, as configs have it; "prior + rule" is its time over that of the same without the prior, moved by all
pixels of a class instead of the rightly classified ones.
Times are medians of repeats in random order. Floors are the bare products of pixels and prototypes: two where
scores are kept for backward, three where they are computed again. Memory is the peak of tensors alive beyond
the inputs, from the allocator's own events (CUDA: max_memory_allocated).
"""

import argparse
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks._measure import machine, peak_bytes, timed
from torch import Tensor

from protoseg.config import LossConfig
from protoseg.core import reference
from protoseg.core.draws import draw_pixels
from protoseg.core.prototypes import PrototypeHead

CASES = ((32768, 256, 150, 10), (32768, 256, 19, 10), (8192, 256, 847, 10))
IGNORE = 255 * 255
MOMENTUM = 0.99


def straightforward(protos_CKD: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Loss of one batch by `protoseg.core.reference`; moves the prototypes in place."""
    emb_ND = F.normalize(features.permute(0, 2, 3, 1).reshape(-1, protos_CKD.shape[2]), dim=1)
    label_N = torch.where(labels == IGNORE, -1, labels).flatten()
    loss, moved_CKD = reference.step(emb_ND, label_N, protos_CKD, momentum=MOMENTUM)
    loss.backward()
    protos_CKD.copy_(moved_CKD)
    return loss.detach()


def ours(head: PrototypeHead, features: Tensor, labels: Tensor, drawn: Tensor | None = None) -> Tensor:
    """The same with this package; PPC of the drawn pixels."""
    out = head.training_step(features, labels, drawn=drawn)
    loss = F.cross_entropy(out.logits, labels, ignore_index=IGNORE) + 0.01 * out.ppc + 0.01 * out.ppd
    loss.backward()
    head.update_(out)
    return loss.detach()


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
    features = features.contiguous(
        memory_format=torch.channels_last
    ).requires_grad_()  # as decode heads give it
    labels = torch.randint(0, c, (2, n // 2 // side, side), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = IGNORE
    labels = labels.to(device)

    def new_head(**settings: Any) -> PrototypeHead:
        score_dtype = "float32" if dtype == torch.float32 else "bfloat16"
        return PrototypeHead(
            d,
            c,
            k,
            ignore_index=IGNORE,
            start="random",
            momentum=MOMENTUM,
            score_dtype=score_dtype,
            **settings,
        ).to(device)

    head = new_head(prior="none")  # so that both losses are the same number
    with_prior, without_rule = new_head(), new_head(prior="none", update_pixels="all")
    share = int(LossConfig().ppc_pixels * n / 2)
    drawn = draw_pixels(torch.arange(2), n // 2, share, seed=0, step=0).to(device)
    plain = head.prototypes.clone()
    pixels = features.detach().permute(0, 2, 3, 1).reshape(-1, d)
    rows = head.prototypes.flatten(0, 1).to(dtype, copy=True)
    sims = torch.empty(len(pixels), len(rows), device=device, dtype=dtype)
    back = torch.empty_like(pixels)

    def run_ours() -> Tensor:
        features.grad = None
        return ours(head, features, labels)

    def run_default() -> Tensor:
        features.grad = None
        return ours(with_prior, features, labels, drawn)

    def run_without_rule() -> Tensor:
        features.grad = None
        return ours(without_rule, features, labels, drawn)

    def run_plain() -> Tensor:
        features.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
            return straightforward(plain, features, labels)

    def two_products() -> None:
        torch.mm(pixels, rows.t(), out=sims)
        torch.mm(sims, rows, out=back)

    losses = run_ours(), run_plain()
    grown = [peak_bytes(run, device) for run in (run_ours, run_plain, run_default)]
    run_without_rule()
    two_products()
    runs: dict[str, Callable[[], object]] = {
        "ours": run_ours,
        "default": run_default,
        "without_rule": run_without_rule,
        "plain": run_plain,
        "two": two_products,
    }
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for repeat in range(repeats):
        order.shuffle(names)  # what ran before leaves its mark on caches and allocator
        for name in names:
            if name != "plain" or plain_repeats is None or repeat < plain_repeats:
                seconds[name].append(timed(runs[name], device))
    return {
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()},
        "ours_mb": grown[0] / 1e6,
        "plain_mb": grown[1] / 1e6,
        "default_mb": grown[2] / 1e6,
        "loss_difference": abs(losses[0] - losses[1]).item(),
    }


def print_row(n: int, d: int, c: int, k: int, found: dict[str, float]) -> None:
    """One row of the table."""
    mine, plain, two, default = (found[f"{name}_ms"] for name in ("ours", "plain", "two", "default"))
    print(
        f"| {n} | {d} | {c} | {k} | {default:.0f} | {default / found['without_rule_ms']:.3f}"
        f" | {found['default_mb']:.0f} | {mine:.0f} | {plain:.0f}"
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
    print("| N | D | C | K | default ms | prior + rule | default MB | ours ms"
          " | straightforward ms | times faster | two products ms | ours / two"
          " | ours / three | ours MB | straightforward MB | memory | loss difference |")  # fmt: skip
    print("|" + "---|" * 17)
    for case in args.case or CASES:
        n, d, c, k = case
        print_row(n, d, c, k, measure(n, d, c, k, device, args.repeats))
