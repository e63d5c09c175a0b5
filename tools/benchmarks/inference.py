"""Peak memory and time of one large image: python tools/benchmark.py inference [options].

One measurement per call, since a process never gives its peak back: compare calls with other options.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmarks._measure import alternating, machine, ratio
from benchmarks._programs import PEERS, Case, installed, make_batch, peaks

from protoseg.config import config_from
from protoseg.evaluation.inference import InferenceSettings, protocol_for, segment
from protoseg.models.build import build_model
from protoseg.models.segmenter import Segmenter
from protoseg.runtime.extras import import_extra
from protoseg.runtime.memory import peak_memory_gb
from protoseg.weights.graph import EXTRA, graph_of, write_onnx


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py inference", description=__doc__)
    parser.add_argument("--size", nargs=2, type=int, default=[3000, 5000], metavar=("H", "W"))
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--backbone", default="mit_b0")
    parser.add_argument("--dim", type=int, help="embedding channels (default: the architecture's own)")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0])
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--confidence", action="store_true")
    parser.add_argument(
        "--whole", action="store_true", help="no windows (predict takes them for large images)"
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="the exported graph in onnxruntime against torch, whole, medians of 5",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        choices=list(PEERS),
        help="other programs' SegFormer with upsampling and argmax, whole, alternating",
    )
    parser.add_argument("--repeats", type=int, default=5, help="with --against")
    args = parser.parse_args(argv)
    if args.against:
        against_programs(args)
        return
    values = {"backbone": {"name": args.backbone}, "decode_head": {"dim": args.dim}}
    model = build_model(config_from(values | {"prototypes": {"start": "random"}}, "benchmark"), args.classes)
    if args.onnx:
        against_onnxruntime(model.eval(), args.size)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().to(device)
    before = peak_memory_gb(device)
    image = torch.randint(0, 256, (3, *args.size), dtype=torch.uint8, device=device)
    window = (2**20, 2**20) if args.whole else None
    protocol = InferenceSettings(window, scales=tuple(args.scales), flip=args.flip)
    start = time.perf_counter()
    found = segment(model, image, protocol=protocol, confidence=args.confidence)
    found.classes.cpu()  # a GPU is done by then
    seconds = time.perf_counter() - start
    window = protocol_for(image, protocol).window
    shown = "whole" if args.whole or window is None else f"windows of {window}"
    print(
        f"{args.backbone}, {args.classes} classes, {args.size[1]}×{args.size[0]} {shown}, {device.type}:"
        f" peak {peak_memory_gb(device):.2f} GB (before the image {before:.2f} GB), {seconds:.1f} s"
    )


def against_programs(args: argparse.Namespace) -> None:
    """Class ids of one image at its own size, untrained models; 150 classes unless asked otherwise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = args.backbone.replace("mit", "segformer")
    case = Case(model, args.classes, tuple(args.size), batch=1, device=device.type)
    builders = installed([*args.against, "linear", "prototypes"])
    images = make_batch(case).image.to(device)
    predictions = {name: build(case).predict for name, build in builders.items()}
    works = {name: partial(predict, images) for name, predict in predictions.items()}
    seconds, gb = alternating(works, device, args.repeats), peaks(list(works), case, "predict")
    size = f"{args.size[1]}×{args.size[0]}"
    print(f"{machine(device)}: {model}, {args.classes} classes, {size}, medians of {args.repeats}")
    for name, its in seconds.items():
        against = ratio(its, seconds["prototypes"])
        print(
            f"{name}: {1 / statistics.median(its):.2f} images/s, {against:.2f} times the time of prototypes,"
            f" peak {gb[name]:.2f} GB beyond the imports"
        )


def against_onnxruntime(model: Segmenter, size: list[int]) -> None:
    """Both on the CPU with as many threads as torch has, alternating; each once before for nothing."""
    onnxruntime = import_extra("onnxruntime", EXTRA)
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    graph = graph_of(model, "labels")
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(Path(folder) / "model.onnx", graph, {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options)
    runs: dict[str, Callable[[], object]] = {
        "torch": lambda: graph(images),
        "onnxruntime": lambda: session.run(None, {"images": images.numpy()}),
    }
    with torch.inference_mode():
        seconds = alternating(runs, torch.device("cpu"), repeats=5, warmup=1)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(
        f"{size[1]}×{size[0]}, {torch.get_num_threads()} threads:"
        f" torch {medians['torch']:.3f} s, onnxruntime {medians['onnxruntime']:.3f} s"
        f" (ratio {medians['onnxruntime'] / medians['torch']:.2f})"
    )
