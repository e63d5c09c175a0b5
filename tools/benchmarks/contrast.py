"""Cost of pixel contrast: its draws and memory against plain loops, and a step with and without it.

    python tools/benchmark.py contrast [--part draws|step] [--backbone mit_b0|hrnet_w18] [--device cuda]

draws: anchors, candidate pool and enqueue of one step at 150 classes, all rings full.
step: seconds per iteration (forward, backward, SGD) of one model with and without contrast, 19 classes, all
rings full under the default cap, interleaved.
On the CPU the seconds are those that one thread computes, which other work on the machine changes little.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from protoseg.core.contrast import PixelContrast
from protoseg.core.contrast_memory import PixelMemory
from protoseg.core.contrast_sampling import balanced_pool, select_anchors
from protoseg.core.draws import Groups, class_map, pixel_keys, sort_groups
from protoseg.core.settings import ContrastSettings
from protoseg.models.backbones import build_backbone
from protoseg.models.decode_heads import build_decode_head

MODELS = {"mit_b0": ("mlp", 256), "hrnet_w18": ("hrnet", None), "hrnet_w48": ("hrnet", None)}


def now(device: torch.device) -> float:
    """Seconds: of computing on the CPU, of the clock on a drained GPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def fill_(memory: PixelMemory) -> None:
    """Unit vectors in every slot."""
    memory.rows_SD[:-1].copy_(F.normalize(torch.randn(memory.rows_SD[:-1].shape), dim=1))
    memory.pixel_fill_C.fill_(memory.pixel_slots)
    memory.region_valid_CR.fill_(True)


class Loops:
    """Anchors, pool and enqueue as plain loops over images and classes, which key each draw as ours are.

    They take the embeddings (B, D, h, w) as a 1x1 convolution leaves them, ours as ProjectionHead does.
    """

    def __init__(self, memory: PixelMemory) -> None:
        self.pixel, self.region = memory.pixel_CTD.clone(), memory.region_CRD.clone()
        self.head = [0] * len(self.pixel)

    def draw(self, class_BP: Tensor, image: int, c: int) -> tuple[Tensor, Tensor]:
        """Positions of the pixels of a class in an image, in random order, and their keys."""
        own = (class_BP[image] == c).nonzero().flatten()
        generator = torch.Generator().manual_seed(image * len(self.pixel) + c)
        key, order = torch.rand(len(own), generator=generator).sort()
        return own[order], key

    def pixels(self, class_BP: Tensor) -> list[Tensor]:
        """Numbers of the pixels of each class in the batch, in random order."""
        found = []
        for c in range(len(self.pixel)):
            parts = [self.draw(class_BP, image, c) for image in range(len(class_BP))]
            own = torch.cat([own + image * class_BP.shape[1] for image, (own, _) in enumerate(parts)])
            found.append(own[torch.cat([key for _, key in parts]).argsort()])
        return found

    def anchors(self, class_BP: Tensor, wrong_N: Tensor, per_class: int) -> Tensor:
        chosen, half = [], per_class - per_class // 2
        for own in self.pixels(class_BP):
            wrong = wrong_N[own[half:]]
            hard = own[half:][wrong][: per_class // 2]
            others = torch.cat([own[half:][wrong][per_class // 2 :], own[half:][~wrong]])
            chosen.append(torch.cat([own[:half], hard, others])[:per_class])
        return torch.cat(chosen)

    def pool(self, emb_BDP: Tensor, pixels: list[Tensor], per_class: int) -> Tensor:
        rows, slots = [], self.pixel.shape[1]
        for c, own in enumerate(pixels):
            own = own[: per_class // 2]
            generator = torch.Generator().manual_seed(c)
            stored = torch.randperm(slots + self.region.shape[1], generator=generator)
            stored = stored[: per_class - len(own)]
            rows.append(emb_BDP[own // emb_BDP.shape[2], :, own % emb_BDP.shape[2]])
            rows.append(self.pixel[c, stored[stored < slots]])
            rows.append(self.region[c, stored[stored >= slots] - slots])
        return torch.cat(rows)

    def enqueue(self, emb_BDP: Tensor, class_BP: Tensor, indices: list[int], drawn: int) -> None:
        slots = self.pixel.shape[1]
        for image, index in enumerate(indices):
            for c in range(len(self.pixel)):
                own, _ = self.draw(class_BP, image, c)
                if len(own) == 0:
                    continue
                rows = emb_BDP[image][:, own].T
                self.region[c, index % self.region.shape[1]] = F.normalize(rows.mean(0), dim=0)
                picked = rows[:drawn]
                place = torch.arange(self.head[c], self.head[c] + len(picked)) % slots
                self.pixel[c, place] = picked
                self.head[c] = (self.head[c] + len(picked)) % slots


def draws(repeats: int, per_class: int = 27) -> Table:
    """Vectorised and looped, on the CPU: 4 maps of 64x64 pixels, 256 channels, 150 classes."""
    classes, batch, size, dim, images, anchors = 150, 4, 64, 256, 1000, 50
    device = torch.device("cpu")
    torch.manual_seed(0)
    memory = PixelMemory(dim, classes, images, ContrastSettings())
    fill_(memory)
    emb_BPD = F.normalize(torch.randn(batch, size * size, dim), dim=2)
    emb_BDP, indices = emb_BPD.transpose(1, 2).contiguous(), torch.arange(batch)
    wrong_N = torch.rand(batch * size * size) < 0.3
    table = Table("labels", "part", "loops (ms)", "ours (ms)", "ratio")
    for name, block in (("every pixel its own", 1), ("blocks of 8x8", 8)):
        labels = torch.randint(0, classes, (batch, size // block, size // block))
        labels = labels.repeat_interleave(block, 1).repeat_interleave(block, 2)
        class_BP = class_map(labels, classes, 255)
        loops = Loops(memory)
        pixels, groups = loops.pixels(class_BP), sorted_pixels(class_BP, indices, classes)
        parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "anchors": (
                partial(loops.anchors, class_BP, wrong_N, anchors),
                partial(our_anchors, class_BP, wrong_N, indices, classes, anchors),
            ),
            "pool": (
                partial(loops.pool, emb_BDP, pixels, per_class),
                partial(balanced_pool, emb_BPD.flatten(0, 1), groups, per_class, memory, 0, 0),
            ),
            "enqueue": (
                partial(loops.enqueue, emb_BDP, class_BP, list(range(batch)), 10),
                partial(our_enqueue, memory, emb_BPD, class_BP, indices),
            ),
        }
        taken: dict[str, list[list[float]]] = {part: [] for part in parts}
        for _ in range(repeats + 1):
            for part, pair in parts.items():
                taken[part].append([])
                for work in pair:
                    start = now(device)
                    work()
                    taken[part][-1].append(now(device) - start)
        medians = {part: [median(each) for each in zip(*times[1:])] for part, times in taken.items()}
        medians["all"] = [sum(each) for each in zip(*medians.values())]
        for part, (theirs, ours) in medians.items():
            table.add_row(name, part, f"{theirs * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{theirs / ours:.1f}")
    return table


def sorted_pixels(class_BP: Tensor, indices: Tensor, classes: int) -> Groups:
    """The pixels of a batch by class and random key."""
    key_BP = pixel_keys(class_BP, indices, 0, 0, 0)
    return sort_groups(key_BP.flatten(), class_BP.flatten(), classes)


def our_anchors(class_BP: Tensor, wrong_N: Tensor, indices: Tensor, classes: int, per_class: int) -> None:
    """With the keys that they need; the pool uses the same."""
    groups = sorted_pixels(class_BP, indices, classes)
    select_anchors(groups, class_BP.flatten(), wrong_N, per_class, "seg_hard")


def our_enqueue(memory: PixelMemory, emb_BPD: Tensor, class_BP: Tensor, indices: Tensor) -> None:
    """With the keys that it needs."""
    memory.enqueue_(emb_BPD, class_BP, pixel_keys(class_BP, indices, 0, 0, 0), indices)


class Model(nn.Module):
    """Backbone, decode head and linear classifier."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        head, dim = MODELS[name]
        self.backbone = build_backbone(name)
        channels, strides = self.backbone.channels, self.backbone.strides
        self.head = build_decode_head(head, channels, strides, classes, dim=dim)
        self.classifier = nn.Conv2d(self.head.dim, classes, 1)


class Step:
    """One training step on one random batch, with and without contrast."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.device, self.classes, self.images = torch.device(args.device), 19, 2975
        torch.manual_seed(0)
        self.model = Model(name, self.classes).to(self.device)
        self.contrast = PixelContrast(
            self.model.head.dim, self.classes, self.images, pool_size=args.pool_size or "full"
        )
        if self.contrast.memory is not None:
            fill_(self.contrast.memory)
        self.contrast = self.contrast.to(self.device)
        self.optimizer = torch.optim.SGD([*self.model.parameters(), *self.contrast.parameters()], lr=1e-4)
        height, width = args.size
        self.image = torch.randn(args.batch, 3, height, width, device=self.device)
        labels = torch.randint(0, self.classes, (args.batch, height // 16, width // 16), device=self.device)
        self.labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)

    def __call__(self, step: int, used: bool) -> dict[str, float]:
        """Seconds of each part: the model itself, and what contrast adds to it."""
        marks = [now(self.device)]
        features = self.model.head(self.model.backbone(self.image))[0]
        logits = self.model.classifier(features)
        full = F.interpolate(logits, size=self.labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(full, self.labels)
        marks.append(now(self.device))
        if used:
            with torch.no_grad():  # forward does this itself; here it is timed alone
                self.contrast.projection(features)
            marks.append(now(self.device))
            small = F.interpolate(self.labels[:, None].float(), size=logits.shape[2:])[:, 0].long()
            batch = len(self.image)
            indices = (torch.arange(batch, device=self.device) + step * batch) % self.images
            out = self.contrast(features, small, logits.argmax(1), indices, step)
            loss = loss + out.loss
            marks.append(now(self.device))
        loss.backward()
        marks.append(now(self.device))
        if used:
            self.contrast.enqueue_(out.projected, small, indices, step)
            marks.append(now(self.device))
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(now(self.device))
        spent = [b - a for a, b in pairwise(marks)]
        if not used:
            return dict(zip(("forward", "backward", "optimizer"), spent))
        names = ("forward", "projection", "loss", "backward", "enqueue", "optimizer")
        times = dict(zip(names, spent))
        times["loss"] -= times["projection"]
        return times


def step_table(args: argparse.Namespace) -> Table:
    """Medians of interleaved steps with and without contrast, and what each part of contrast adds."""
    parts = ("projection", "loss", "backward", "enqueue")
    table = Table("backbone", "without (s)", "with (s)", "extra", *(f"{part} (ms)" for part in parts))
    for name in args.backbone:
        work = Step(name, args)
        times: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for step in range(args.repeats + 2):
            for used in (False, True):
                times[used].append(work(step, used))
        middle = {
            used: {part: median(each[part] for each in all_times[2:]) for part in all_times[0]}
            for used, all_times in times.items()
        }
        without = median(sum(each.values()) for each in times[False][2:])
        with_it = median(sum(each.values()) for each in times[True][2:])
        added = {part: middle[True][part] - middle[False].get(part, 0.0) for part in parts}
        table.add_row(
            name, f"{without:.3f}", f"{with_it:.3f}", f"{100 * (with_it / without - 1):+.1f} %",
            *(f"{1e3 * added[part]:.0f} ({100 * added[part] / without:+.1f} %)" for part in parts),
        )  # fmt: skip
    return table


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmark.py contrast",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=("draws", "step"), nargs="+", default=["draws", "step"])
    parser.add_argument("--backbone", choices=tuple(MODELS), nargs="+", default=["mit_b0", "hrnet_w18"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pool-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console()
    if "draws" in args.part:
        console.print(draws(args.repeats))
    if "step" in args.part:
        console.print(step_table(args))
