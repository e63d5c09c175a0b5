"""What a run tells: console lines, metrics.jsonl, TensorBoard, tables, pictures, results.json."""

import contextlib
import io
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from protoseg.config import Config
from protoseg.core.prototypes import PrototypeHead
from protoseg.data.tree import LabelTree
from protoseg.figures.pictures import Colours, png_of, save_figure
from protoseg.figures.prototype_figures import assignment_figure, cosine_figure
from protoseg.figures.sample_figures import sample_figure
from protoseg.figures.training_figures import LOSSES, curves_figure, mean_of_known
from protoseg.models.segmenter import Segmenter
from protoseg.runtime.console import clock
from protoseg.runtime.files import safe_name, write_text
from protoseg.runtime.memory import peak_memory_gb
from protoseg.training.track import TensorBoard, Tracker, start_tracker


class Meter:
    """Wall-clock rates since the last report."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.started = self.last = time.perf_counter()
        self.steps, self.wait = 0, 0.0

    def waited(self, batches: Any) -> Any:
        """The next batch; the time it takes counts as waiting for data."""
        begin = time.perf_counter()
        batch = next(batches)
        self.wait += time.perf_counter() - begin
        return batch

    def step_done(self) -> float:
        """Seconds since the last step ended."""
        now = time.perf_counter()
        taken, self.last = now - self.last, now
        self.steps += 1
        return taken

    def rates(self, steps_left: int) -> dict[str, float]:
        """Images/s, the share of time spent waiting for data, and the seconds left; starts a new interval."""
        elapsed = max(self.last - self.started, 1e-9)
        per_step = elapsed / max(self.steps, 1)
        rates = {
            "images_per_second": self.batch_size / per_step,
            "data_wait": self.wait / elapsed,
            "eta_seconds": per_step * steps_left,
        }
        self.restart()
        return rates


MOST_CLASSES = 30  # in TensorBoard's pictures of the prototypes


class RunLog:
    """Writes one run's folder; only the main rank has one.

    Nothing that only shows a training may end it: what cannot be drawn or written is noted, once per kind.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        classes: Sequence[str],
        palette: Colours,
        track: Sequence[str] = ("tensorboard",),
        tree: LabelTree | None = None,
    ) -> None:
        self.folder, self.classes, self.palette, self.tree = folder, classes, palette, tree
        self.metrics = folder / "metrics.jsonl"
        self.noted: set[str] = set()
        # A killed run may have logged steps that its checkpoint does not hold: they will be made again.
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self.trackers: dict[str, Tracker] = {name: start_tracker(name, folder, first_step) for name in track}
        self.board = self.trackers.get("tensorboard")

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """What goes wrong in the block is noted; training goes on."""
        try:
            yield
        except Exception as error:
            if what not in self.noted:
                reason = " ".join(str(error).split()) or type(error).__name__
                print(f"note: no {what}: {reason}; training goes on without", flush=True)
            self.noted.add(what)

    def line(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to the trackers."""
        with self.optional("line of metrics.jsonl"), open(self.metrics, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {f"{kind}/{name}": each for name, each in values.items() if isinstance(each, int | float)}
        health = values.get("prototype_health", {})
        numbers |= {f"prototypes/{key}": mean_of_known(per_class) for key, per_class in health.items()}
        for name, tracker in self.trackers.items():
            with self.optional(f"numbers for {name}"):
                tracker.numbers(numbers, step)

    def sample(
        self, name: str, image: Tensor, label: Tensor, prediction: Tensor, ignore_index: int, step: int
    ) -> None:
        """A picture of an evaluated image, its label, prediction and errors, in samples/ and TensorBoard."""
        with self.optional(f"picture of {name}"):
            picture = rearrange(image.numpy(), "c h w -> h w c")
            maps = (label.numpy(), prediction.numpy())
            figure = sample_figure(picture, *maps, self.classes, self.palette, ignore_index, self.tree)
            path = f"samples/{safe_name(name.replace('/', '_'))}_{step:06d}"
            save_figure(figure, self.folder / f"{path}.png")  # no pyplot: the backend stays the user's
            self._show(path, (self.folder / f"{path}.png").read_bytes(), step)

    def prototypes(self, head: PrototypeHead, step: int) -> None:
        """TensorBoard: pictures of the prototypes of the most frequent classes, all in the projector."""
        if self.board is not None:
            with self.optional("picture of the prototypes"):
                self._prototypes(head, step)

    def _prototypes(self, head: PrototypeHead, step: int) -> None:
        protos_CKD = head.prototypes.float().cpu().numpy()
        usage_CK = head.nearest_usage.double().cpu().numpy()
        share_CK = usage_CK / usage_CK.sum(1, keepdims=True).clip(1e-12)
        often = np.argsort(-usage_CK.sum(1), kind="stable")
        live = often[head.initialized.cpu().numpy()[often]].tolist()
        if len(live) * head.num_prototypes < 2:
            return
        shown = sorted(live[:MOST_CLASSES])
        names = [self.classes[c] for c in shown]
        colours = [self.palette[c] for c in shown]
        cosines, shares = (
            cosine_figure(protos_CKD[shown], names),
            assignment_figure(share_CK[shown], names, colours),
        )
        self._show("prototypes/cosines", png_of(cosines), step)
        self._show("prototypes/shares", png_of(shares), step)
        rows = [
            (protos_CKD[c, k], " ".join(self.classes[c].split()), k + 1, f"{share_CK[c, k]:.3f}")
            for c in sorted(live)
            for k in range(head.num_prototypes)
        ]
        write_projector(self.folder / "tensorboard", rows)

    def _show(self, tag: str, png: bytes, step: int) -> None:
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        if isinstance(self.board, TensorBoard):
            self.board.writer.add_image(tag, picture, step, dataformats="HWC")

    def curves(self) -> None:
        """curves.png from everything logged so far."""
        with self.optional("curves.png"):
            save_figure(curves_figure(read_metrics(self.folder)), self.folder / "curves.png")

    def close(self) -> None:
        for name, tracker in self.trackers.items():
            with self.optional(f"end of what {name} gets"):
                tracker.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a crash cut short is left out."""
    path = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_projector(folder: Path, rows: Sequence[tuple[NDArray, str, int, str]]) -> None:
    """Prototypes (vector, class, number in the class, share of its pixels) for TensorBoard's projector.

    SummaryWriter.add_embedding would keep those of every evaluation: gigabytes of text with many classes.
    """
    vectors = ["\t".join(f"{x:.5g}" for x in vector) for vector, *_ in rows]
    about = ["class\tprototype\tshare", *("\t".join(map(str, row[1:])) for row in rows)]
    write_text(folder / "prototypes/tensors.tsv", "\n".join(vectors) + "\n")
    write_text(folder / "prototypes/metadata.tsv", "\n".join(about) + "\n")
    paths = 'tensor_path: "prototypes/tensors.tsv" metadata_path: "prototypes/metadata.tsv"'
    write_text(folder / "projector_config.pbtxt", f'embeddings {{ tensor_name: "prototypes" {paths} }}\n')


def progress_line(step: int, iterations: int, values: dict[str, Any]) -> str:
    """One console line of a training step."""
    terms = "  ".join(f"{name} {values[name]:.4f}" for name in LOSSES if name in values)
    return (
        f"{step:>{len(str(iterations))}}/{iterations}  {terms}  lr {values['lr']:.2e}"
        f"  {values['images_per_second']:.1f} img/s  data wait {values['data_wait']:.0%}"
        f"  mem {values['memory_gb']:.1f} GB  left {clock(values['eta_seconds'])}"
    )


def health_line(health: dict[str, list[float | None]]) -> str:
    """One console line on the state of the prototypes, means over classes."""
    dead = sum(int(value or 0) for value in health["dead"])
    return (
        f"prototypes: effective K {mean_of_known(health['effective_k']):.1f}"
        f"  in use {mean_of_known(health['in_use']):.1f}"
        f"  intra-class cosine mean {mean_of_known(health['mean_intra_cosine']):.2f}"
        f" max {max((v for v in health['max_intra_cosine'] if v is not None), default=float('nan')):.2f}"
        f"  dead {dead}  churn {mean_of_known(health['churn']):.3f}"
    )


def run_facts(model: Segmenter, config: Config, device: torch.device) -> dict[str, Any]:
    """What results.json says of a run beside its scores and times."""
    return {
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "parameters": model.num_parameters,
        "seed": config.train.seed,
        **environment(device),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Where a result was made: versions, device and, in a checkout with git at hand, the commit."""
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("protoseg", "torch", "torchvision", "timm"):
        versions[name] = None
        with contextlib.suppress(PackageNotFoundError):  # a checkout on the path, not installed
            versions[name] = version(name)
    return {
        "git_commit": commit or None,
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu × {os.cpu_count()}",
    }
