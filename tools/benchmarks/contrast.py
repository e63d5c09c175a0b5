"""Cost of pixel contrast: its draws and memory against plain loops, and a step with and without it.

    python tools/benchmark.py contrast [--part draws|step] [--device cuda]

draws: anchors, candidate pool and enqueue of one step at 150 classes, all rings full.
step: seconds per iteration (forward, backward, SGD) of one model with and without contrast, interleaved.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from protoseg.backbones import build_backbone
from protoseg.contrast import PixelContrast, ProjectionHead
from protoseg.heads import build_decode_head
from protoseg.memory import PixelMemory, class_map, pixel_keys
from protoseg.sampling import balanced_pool, select_anchors

MODELS = {"segformer_b0": ("mit_b0", "mlp", 256), "hrnet_w18": ("hrnet_w18", "hrnet", None),
          "hrnet_w48": ("hrnet_w48", "hrnet", None)}  # fmt: skip


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def fill_(memory: PixelMemory) -> None:
    """Unit vectors in every slot."""
    for rows in (memory.pixel_CTD, memory.region_CRD):
        rows.copy_(F.normalize(torch.randn(rows.shape), dim=2))
    memory.pixel_fill_C.fill_(memory.pixel_slots)
    memory.region_valid_CR.fill_(True)


class LoopMemory:
    """The same draws, pool and enqueue as plain loops, with torch's own random permutations."""

    def __init__(self, memory: PixelMemory) -> None:
        self.pixel, self.region = memory.pixel_CTD.clone(), memory.region_CRD.clone()
        self.head = [0] * len(self.pixel)

    def enqueue(self, emb_BPD: Tensor, class_BP: Tensor, indices: list[int], drawn: int) -> None:
        classes, slots = self.pixel.shape[:2]
        for image, index in enumerate(indices):
            for c in range(classes):
                own = (class_BP[image] == c).nonzero().flatten()
                if len(own) == 0:
                    continue
                rows = emb_BPD[image, own]
                self.region[c, index % self.region.shape[1]] = F.normalize(rows.mean(0), dim=0)
                picked = rows[torch.randperm(len(own))[:drawn]]
                place = torch.arange(self.head[c], self.head[c] + len(picked)) % slots
                self.pixel[c, place] = picked
                self.head[c] = (self.head[c] + len(picked)) % slots

    def anchors(self, class_BP: Tensor, wrong_BP: Tensor, per_class: int) -> Tensor:
        chosen = []
        class_N, wrong_N = class_BP.flatten(), wrong_BP.flatten()
        for c in range(len(self.pixel)):
            hard = (class_N == c).logical_and(wrong_N).nonzero().flatten()
            hard = hard[torch.randperm(len(hard))[: per_class // 2]]
            rest = (class_N == c).nonzero().flatten()
            rest = rest[~torch.isin(rest, hard)]
            chosen += [hard, rest[torch.randperm(len(rest))[: per_class - len(hard)]]]
        return torch.cat(chosen)

    def pool(self, emb_BPD: Tensor, class_BP: Tensor, per_class: int) -> Tensor:
        rows, class_N = [], class_BP.flatten()
        for c in range(len(self.pixel)):
            own = (class_N == c).nonzero().flatten()
            own = own[torch.randperm(len(own))[: per_class // 2]]
            stored = torch.cat([self.pixel[c], self.region[c]])
            rows += [
                emb_BPD.flatten(0, 1)[own],
                stored[torch.randperm(len(stored))[: per_class - len(own)]],
            ]
        return torch.cat(rows)


def enqueue_(memory: PixelMemory, emb: Tensor, class_BP: Tensor, indices: Tensor) -> None:
    """Ours, with the keys that it needs."""
    memory.enqueue_(emb, class_BP, pixel_keys(class_BP, indices, 0, 0, 0), indices)


def draw_anchors(class_BP: Tensor, wrong_BP: Tensor, indices: Tensor, classes: int) -> None:
    """Ours, with the keys that it needs."""
    keys = [pixel_keys(class_BP, indices, 0, 0, salt) for salt in (0, 1)]
    select_anchors(class_BP, wrong_BP, keys[0], keys[1], classes, 50, "seg_hard")


def draws(repeats: int) -> Table:
    """Vectorised and looped, on the CPU: 4 maps of 64x64 pixels, 256 channels, 150 classes, in 8x8 blocks."""
    classes, batch, size, dim, images = 150, 4, 64, 256, 1000
    device = torch.device("cpu")
    torch.manual_seed(0)
    memory = PixelMemory(dim, classes, images)
    fill_(memory)
    emb = F.normalize(torch.randn(batch, size * size, dim), dim=2)
    table = Table("labels", "part", "loops (ms)", "ours (ms)", "ratio")
    for name, block in (("every pixel its own", 1), ("blocks of 8x8", 8)):
        labels = torch.randint(0, classes, (batch, size // block, size // block))
        labels = labels.repeat_interleave(block, 1).repeat_interleave(block, 2)
        wrong = torch.rand(batch, size * size) < 0.3
        indices = torch.arange(batch)
        class_BP = class_map(labels, classes, 255)

        keys = partial(pixel_keys, class_BP, indices, 0, 0)
        work = LoopMemory(memory)
        parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "enqueue": (
                partial(work.enqueue, emb, class_BP, list(range(batch)), 10),
                partial(enqueue_, memory, emb, class_BP, indices),
            ),
            "anchors": (
                partial(work.anchors, class_BP, wrong, 50),
                partial(draw_anchors, class_BP, wrong, indices, classes),
            ),
            "pool": (
                partial(work.pool, emb, class_BP, 54),
                partial(balanced_pool, emb, class_BP, keys(0), classes, 54, memory, 0, 0),
            ),
        }
        sums = [0.0, 0.0]
        for part, pair in parts.items():
            for each in pair:
                each()
            times = [median(seconds(each, device) for _ in range(repeats)) for each in pair]
            sums = [total + taken for total, taken in zip(sums, times)]
            table.add_row(name, part, *(f"{each * 1e3:.1f}" for each in times), f"{times[0] / times[1]:.1f}")
        table.add_row(name, "all", *(f"{each * 1e3:.1f}" for each in sums), f"{sums[0] / sums[1]:.1f}")
    return table


class Model(nn.Module):
    """Backbone, decode head, linear classifier and projection."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        backbone, head, dim = MODELS[name]
        self.backbone = build_backbone(backbone)
        channels, strides = self.backbone.channels, self.backbone.strides
        self.head = build_decode_head(head, channels, strides, classes, dim=dim)
        self.classifier = nn.Conv2d(self.head.dim, classes, 1)
        self.projection = ProjectionHead(self.head.dim)


def step_table(args: argparse.Namespace) -> Table:
    """Median seconds of interleaved steps with and without contrast."""
    device, classes, images = torch.device(args.device), 19, 2975
    table = Table("model", "without (s)", "with (s)", "extra", "difference")
    for name in args.models:
        torch.manual_seed(0)
        model = Model(name, classes).to(device)
        contrast = PixelContrast(256, classes, images, pool_size=args.pool_size)
        if contrast.memory is not None:
            fill_(contrast.memory)
        contrast = contrast.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        height, width = args.size
        image = torch.randn(args.batch, 3, height, width, device=device)
        labels = torch.randint(0, classes, (args.batch, height // 16, width // 16), device=device)
        labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)

        def iteration(
            step: int,
            used: bool,
            model: Model = model,
            contrast: PixelContrast = contrast,
            image: Tensor = image,
            labels: Tensor = labels,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            features = model.head(model.backbone(image))[0]
            logits = model.classifier(features)
            full = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(full, labels)
            if used:
                small = F.interpolate(labels[:, None].float(), size=logits.shape[2:])[:, 0].long()
                indices = (torch.arange(len(image), device=image.device) + step * len(image)) % images
                out = contrast(features, small, logits.argmax(1), indices, step, model.projection)
                loss = loss + out.loss
            loss.backward()
            if used:
                contrast.enqueue_(out.projected, small, indices, step)
            optimizer.step()
            optimizer.zero_grad()

        times: dict[bool, list[float]] = {False: [], True: []}
        for step in range(args.repeats + 2):
            for used in (False, True):
                taken = seconds(partial(iteration, step, used), device)
                if step >= 2:
                    times[used].append(taken)
        without, with_it = median(times[False]), median(times[True])
        table.add_row(
            name, f"{without:.3f}", f"{with_it:.3f}", f"{100 * (with_it / without - 1):+.1f} %",
            f"{1e3 * (with_it - without):.0f} ms",
        )  # fmt: skip
    return table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py contrast", description=__doc__)
    parser.add_argument("--part", choices=("draws", "step"), nargs="+", default=["draws", "step"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", choices=tuple(MODELS), nargs="+", default=["segformer_b0", "hrnet_w18"])
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pool-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    console = Console()
    if "draws" in args.part:
        console.print(draws(args.repeats))
    if "step" in args.part:
        console.print(step_table(args))
