"""A training step of SegFormer: ours with both classifiers against other programs', alternating in a process.

    python tools/benchmark.py step [--models segformer_b0 ...] [--against hf smp mmseg linear]
        [--classes 150] [--size 256] [--batch 2] [--prototypes 10] [--precision fp32] [--threads 2]

One step: forward, cross-entropy at label size (ours with prototypes: PPC and PPD too), backward, AdamW, and
the update of the prototypes; ours is the trainer's own step. hf is Hugging Face's transformers, smp
segmentation_models_pytorch (extra `peers`), mmseg mmsegmentation; bf16_scores is ours with the products with
prototypes in bfloat16 (`prototypes.score_dtype`). Peak memory: of a process of its own, beyond what it had
after the imports. Floors are what a part cannot be faster than on this machine: its
multiplications at the measured rate of a product of that shape, its exponentials and its bytes at theirs.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmarks._measure import (
    alternating,
    copy_rate,
    exp_rate,
    machine,
    product_rate,
    ratio,
)
from benchmarks._programs import MODELS, PEERS, Case, Program, installed, peaks
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from protoseg.core.similarity import k_major, pixels_at_once
from protoseg.training.step import Run

PROFILED = 3  # steps
PARTS = (
    "backbone",
    "decode head",
    "prototype products",
    "other prototype work",
    "losses",
    "backward of the network",
    "backward of the head",
    "optimiser",
    "update",
)


def shares(run: Run, step: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Seconds of each part of our step and of the whole, profiled."""
    model, head = run.model, run.model.prototypes
    named: list[tuple[Any, str, str]] = [
        (model.backbone, "forward", "backbone"),
        (model.decode_head, "forward", "decode head"),
        (run.objective, "_cross_entropy", "losses"),
        (run.optimizer, "step", "optimiser"),
    ]
    if head is not None:
        named += [(head, "training_step", "other prototype work"), (head, "update_", "update")]
    for owner, method, part in named:
        setattr(owner, method, _ranged(part, getattr(owner, method)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED):
            with torch.profiler.record_function("whole step"):
                step()
    for owner, method, _ in named:
        delattr(owner, method)
    seconds: dict[str, float] = defaultdict(float)
    for event in profile.events():
        parents, parent = [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        taken = (event.time_range.end - event.time_range.start) / 1e6 / PROFILED
        if event.name in PARTS or event.name == "whole step":
            seconds[event.name] += taken
        elif event.name in ("aten::mm", "aten::bmm") and "other prototype work" in parents:
            seconds["prototype products"] += taken
            seconds["other prototype work"] -= taken
        elif event.name.startswith("autograd::engine::evaluate_function") and not any(
            name.startswith("autograd::engine") for name in parents
        ):
            of_head = any(word in event.name for word in ("PrototypeScores", "LogSumExp", "CrossEntropy"))
            seconds["backward of the head" if of_head else "backward of the network"] += taken
    return seconds, seconds.pop("whole step")


def _ranged(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return method(*args, **kwargs)

    return inner


def floors(run: Run, case: Case) -> dict[str, float]:
    """The least seconds of each part, float32 numbers in memory."""
    head = run.model.prototypes
    image = torch.zeros(case.batch, 3, *case.size)
    best = product_rate(2048, 2048, 2048, case.precision)
    flops = []
    with torch.no_grad():
        for module, given in ((run.model.backbone, image), (run.model.decode_head, run.model.maps(image))):
            with FlopCounterMode(display=False) as counter:
                module(given)
            flops.append(counter.get_total_flops())
    cells = case.batch * (case.size[0] // run.model.stride) * (case.size[1] // run.model.stride)
    pixels, weights = case.batch * case.size[0] * case.size[1], run.model.num_parameters
    found = {
        "backbone": flops[0] / best,
        "decode head": flops[1] / best,
        "losses": pixels * case.classes / exp_rate(),
        "backward of the network": 2 * sum(flops) / best,
        "optimiser": 28 * weights / copy_rate(),  # weight, gradient, two moments read; all but one written
    }
    if head is None:
        return found
    rows = k_major(head.prototypes)
    chunk = min(pixels_at_once(rows, len(rows)), cells)
    product = 2 * cells * rows.numel() / product_rate(len(rows), head.dim, chunk, "fp32")
    return found | {
        "prototype products": (1 + 2 * run.config.loss.ppc_pixels) * product,
        "other prototype work": 8 * cells * (head.dim + case.classes) / copy_rate(),
        "backward of the head": 2 * cells * (case.classes + head.num_prototypes) * head.dim / best,
        "update": 4 * cells * head.dim / copy_rate(),
    }


def print_shares(name: str, program: Program, case: Case, seconds: float) -> None:
    """Where the time of our step goes, and the floor under each part."""
    assert program.run is not None
    found, whole = shares(program.run, program.step)
    least = floors(program.run, case)
    table = Table(f"{case.model}, {name}", "share", "ms", "floor, ms", title_justify="left")
    for part in PARTS:
        if found[part]:
            share = found[part] / whole
            floor = f"{1e3 * least[part]:.1f}" if part in least else ""
            table.add_row(part, f"{share:.1%}", f"{1e3 * share * seconds:.1f}", floor)
    rest = 1 - sum(found.values()) / whole
    table.add_row("rest", f"{rest:.1%}", f"{1e3 * rest * seconds:.1f}", "")
    table.add_row("all", "100%", f"{1e3 * seconds:.1f}", f"{1e3 * sum(least.values()):.1f}")
    Console().print(table)


def main(argv: list[str]) -> None:
    """Print times, ratios and memory; then where ours goes."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["segformer_b0", "segformer_b2"], choices=MODELS)
    others = [*PEERS, "linear"]
    parser.add_argument("--against", nargs="*", default=others, choices=[*others, "bf16_scores"])
    for name, default in (("classes", 150), ("size", 256), ("batch", 2), ("prototypes", 10), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without", nargs="*", default=[], choices=("peaks", "shares"), help="to save time")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    builders = installed([*args.against, "prototypes"])
    case = Case(
        MODELS[0], args.classes, (args.size,) * 2, args.batch, args.precision, args.prototypes, device.type
    )
    print(
        f"{machine(device)}; torch {torch.__version__}; {args.classes} classes, K = {args.prototypes},"
        f" {args.size}², batch {args.batch}, {args.precision}; medians of {args.repeats} alternating steps"
    )
    for model in args.models:
        case = replace(case, model=model)
        gb = {} if "peaks" in args.without else peaks(list(builders), case, "step")
        programs = {name: build(case) for name, build in builders.items()}
        works = {name: program.step for name, program in programs.items()}
        seconds = alternating(works, device, args.repeats)
        own = [name for name in ("linear", "prototypes") if name in programs]
        table = Table(model, "ms", *(f"its time / {name}" for name in own), "peak GB")
        for name, its in seconds.items():
            ratios = [f"{ratio(its, seconds[mine]):.2f}" for mine in own]
            memory = f"{gb[name]:.2f}" if gb else ""
            table.add_row(name, f"{1e3 * statistics.median(its):.0f}", *ratios, memory)
        Console().print(table)
        if device.type == "cpu" and "shares" not in args.without:
            for name in own:
                print_shares(name, programs[name], case, statistics.median(seconds[name]))
