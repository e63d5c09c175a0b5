"""`export`: a trained model for other programs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from protoseg.commands.parser import parser_of
from protoseg.models.checkpoint import find_checkpoint, load_segmenter
from protoseg.runtime.errors import UserError
from protoseg.runtime.extras import import_extra
from protoseg.weights.graph import (
    EXTRA,
    OUTPUTS,
    SegmentationGraph,
    about_model,
    graph_of,
    smallest_side,
    write_onnx,
    write_program,
)
from protoseg.weights.pretrained import save_model_folder

DEFAULT_NAMES = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "shared"}
CHECKED = ((1, 32, 64), (2, 33, 67), (1, 101, 6))  # batch; height and width beyond the smallest
Runner = Callable[[NDArray[np.uint8]], list[NDArray]]


def main(arguments: Sequence[str]) -> None:
    """Export a trained model."""
    parser = parser_of(
        "export",
        "Write a model as ONNX, as a torch.export program, or as a folder of safetensors."
        " The first two take uint8 RGB images (batch, 3, height, width) of any size from 64 pixels on"
        " (a Swin: from 225, with windows of 12 from 385).",
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--format", choices=DEFAULT_NAMES, default="onnx")
    parser.add_argument("--output", choices=OUTPUTS, help="of the graph (default: labels)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="default: model.onnx, … in the run folder")
    parser.add_argument("--check", action="store_true", help="run what was written and compare it with torch")
    args = parser.parse_args(arguments)
    path = args.out or find_checkpoint(args.run).parent / DEFAULT_NAMES[args.format]
    if args.format == "safetensors" and args.output is not None:
        raise UserError("--output: a folder of safetensors holds the model itself; leave the option out")
    model, _, content = load_segmenter(args.run)
    graph = graph_of(model, args.output or "labels")
    if args.format == "onnx":
        write_onnx(path, graph, about_model(content))
    elif args.format == "torch":
        write_program(path, graph, about_model(content))
    else:
        save_model_folder(path, content, find_checkpoint(args.run).parent)
    outputs = "" if args.format == "safetensors" else f"; outputs {', '.join(graph.names)}"
    print(f"{path}: written ({args.format}{outputs})")
    if args.check:
        check(graph, RUNNERS[args.format](path, args.output or "labels"))


def check(graph: SegmentationGraph, run: Runner) -> None:
    """Print, for three sizes, how far a written model is from the one in memory."""
    generator = np.random.default_rng(0)
    smallest = smallest_side(graph.model)
    for batch, *beyond in CHECKED:
        height, width = (smallest + each for each in beyond)
        images = generator.integers(0, 256, (batch, 3, height, width), np.uint8)
        parts = []
        for name, got, wanted in zip(graph.names, run(images), _in_torch(graph)(images)):
            if np.issubdtype(wanted.dtype, np.integer):
                parts.append(f"{name} equal at {(got == wanted).mean():.4%} of pixels")
            else:
                parts.append(f"{name} off by at most {np.abs(got - wanted).max():.2e}")
        print(f"{batch} × {height} × {width}: {'; '.join(parts)}")


def onnx_runner(path: Path, _: str = "") -> Runner:
    """Runs an ONNX file in onnxruntime on the CPU."""
    session = import_extra("onnxruntime", EXTRA).InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(None, {"images": images})


def program_runner(path: Path, _: str = "") -> Runner:
    """Runs a torch.export program."""
    return _in_torch(torch.export.load(path).module())


def folder_runner(path: Path, output: str) -> Runner:
    """Runs the model of a saved folder."""
    return _in_torch(graph_of(load_segmenter(path)[0], output))


def _in_torch(module: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> Runner:
    def run(images: NDArray[np.uint8]) -> list[NDArray]:
        with torch.inference_mode():
            return [each.numpy() for each in module(torch.from_numpy(images))]

    return run


RUNNERS: dict[str, Callable[[Path, str], Runner]] = {
    "onnx": onnx_runner,
    "torch": program_runner,
    "safetensors": folder_runner,
}
