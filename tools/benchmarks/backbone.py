"""Forward and backward of our Mix Transformer against Hugging Face's, alternating in one run; medians.

Both compute the same four maps from the same weights (checked first): python tools/benchmark.py backbone
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from protoseg.backbones import build_backbone
from protoseg.mit import HEADS, MIT
from protoseg.weights import load_backbone_weights


def hugging_face(name: str) -> Any:
    import transformers  # of the `dev` extra; the package itself does not need it

    dims, depths = MIT[name]
    options: dict[str, Any] = {"drop_path_rate": 0.0, "attn_implementation": "sdpa"}
    config = transformers.SegformerConfig(
        hidden_sizes=list(dims), depths=list(depths), num_attention_heads=list(HEADS), **options
    )
    return transformers.SegformerModel(config)


def hidden_states(model: Any, image: Tensor) -> list[Tensor]:
    return list(model(image, output_hidden_states=True).hidden_states)


def seconds(forward: Callable[[], list[Tensor]], sync: Callable[[], None]) -> tuple[float, float]:
    sync()
    start = time.perf_counter()
    loss = torch.stack([m.float().mean() for m in forward()]).sum()
    sync()
    middle = time.perf_counter()
    loss.backward()
    sync()
    return middle - start, time.perf_counter() - middle


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py backbone", description=__doc__)
    parser.add_argument("--names", nargs="+", default=["mit_b0", "mit_b2"], choices=list(MIT))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    sync = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    table = Table("backbone", "ours fwd + bwd (s)", "Hugging Face fwd + bwd (s)", "ratio of sums")
    for name in args.names:
        ours, theirs = build_backbone(name), hugging_face(name)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            load_backbone_weights(ours, name, folder)
        ours, theirs = ours.to(args.device), theirs.to(args.device)
        image = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
        candidates: tuple[Callable[[], list[Tensor]], ...] = (
            partial(ours, image),
            partial(hidden_states, theirs, image),
        )
        for a, b in zip(ours.eval()(image), hidden_states(theirs.eval(), image)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        ours.train()
        theirs.train()
        times: list[list[tuple[float, float]]] = [[], []]
        for step in range(args.repeats + 2):
            for which, forward in enumerate(candidates):
                measured = seconds(forward, sync)
                if step >= 2:  # the first two warm up
                    times[which].append(measured)
        medians = [[statistics.median(part) for part in zip(*rows)] for rows in times]
        totals = [statistics.median(sum(row) for row in rows) for rows in times]
        cells = [f"{forward:.4f} + {backward:.4f}" for forward, backward in medians]
        table.add_row(name, *cells, f"{totals[0] / totals[1]:.3f}")
    Console().print(table)
    print(f"{args.device}, {torch.get_num_threads()} threads, batch {args.batch}, {args.size}², float32")
