"""Forward and backward of our Mix Transformer and of other programs', alternating in one run; medians.

All compute the same four maps from the same weights (checked first). Hugging Face's comes with the `dev`
extra, mmsegmentation's takes part where `mmseg` can be imported:
    python tools/benchmark.py backbone --threads 1
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from protoseg.models.backbones import build_backbone
from protoseg.models.mit import HEADS, MIT
from protoseg.weights.foreign_backbone import load_backbone_weights

Forward = Callable[[Tensor], list[Tensor]]


def hugging_face(name: str, folder: str) -> tuple[Any, Forward]:
    import transformers

    dims, depths = MIT[name]
    options: dict[str, Any] = {"drop_path_rate": 0.0, "attn_implementation": "sdpa"}
    config = transformers.SegformerConfig(
        hidden_sizes=list(dims), depths=list(depths), num_attention_heads=list(HEADS), **options
    )
    model: Any = transformers.SegformerModel(config)
    model.save_pretrained(folder)
    return model, lambda image: list(model(image, output_hidden_states=True).hidden_states)


def mmsegmentation(name: str, folder: str) -> tuple[Any, Forward]:
    from mmseg.models.backbones import MixVisionTransformer

    dims, depths = MIT[name]
    model = MixVisionTransformer(
        embed_dims=dims[0], num_layers=list(depths), num_heads=list(HEADS), drop_path_rate=0.0, qkv_bias=True
    )
    torch.save(model.state_dict(), Path(folder) / "pytorch_model.bin")
    return model, model


PEERS = {"Hugging Face": hugging_face, "mmsegmentation": mmsegmentation}


def peers(name: str, image: Tensor, note: Callable[[str], None]) -> dict[str, Forward]:
    """The other programs' forward functions that can be had, each found equal to ours on `image`."""
    found = {}
    for program, build in PEERS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                theirs, forward = build(name, folder)
            except ImportError as error:
                note(f"without {program}: {error}")
                continue
            ours = build_backbone(name)
            load_backbone_weights(ours, name, folder)
        for model in (ours, theirs):
            model.to(image.device).eval()
        with torch.no_grad():
            for a, b in zip(ours(image), forward(image)):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        theirs.train()
        found[program] = forward
    return found


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
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sync = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    table = Table("backbone", "program", "forward + backward (s)", "ours / theirs")
    notes: set[str] = set()
    for name in args.names:
        image = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
        ours = build_backbone(name).to(args.device).train()
        forwards: dict[str, Forward] = {"ours": ours, **peers(name, image, notes.add)}
        times: dict[str, list[tuple[float, float]]] = {program: [] for program in forwards}
        for step in range(args.repeats + 2):
            for program, forward in forwards.items():
                measured = seconds(partial(forward, image), sync)
                if step >= 2:  # the first two warm up
                    times[program].append(measured)
        totals = {program: [sum(row) for row in rows] for program, rows in times.items()}
        for program, rows in times.items():
            cell = " + ".join(f"{statistics.median(part):.4f}" for part in zip(*rows))
            # Each repeat gives one ratio: what else the machine does hits both of its parts.
            ratio = statistics.median(a / b for a, b in zip(totals["ours"], totals[program]))
            table.add_row(name, program, cell, f"{ratio:.3f}")
    Console().print(table)
    print(
        f"{args.device}, {args.threads} threads, batch {args.batch}, {args.size}², float32",
        *sorted(notes),
        sep="\n",
    )
