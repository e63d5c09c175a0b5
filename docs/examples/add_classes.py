"""Classes added without training: python docs/examples/add_classes.py [--seeds 3] [key.sub=value …]

Trains on the digits 0–7, adds 8 and 9 from a few labelled images without a gradient step, and compares with
training on 0–9 from scratch, all scored on the same validation images. Once more after all prototypes were
clustered anew (`refit`) on training images. What the features of 0–7 can give at best is shown by a linear
classifier learned on them. Before 8 and 9 are added, their pixels are the unknown that distances should
reveal. Finished runs in the folder --out are not trained again.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from protoseg.config import load_config
from protoseg.core.losses import downsample_labels
from protoseg.core.similarity import unit
from protoseg.data.datasets import build_dataset
from protoseg.data.digits import CLASSES, colours
from protoseg.data.file_dataset import Dataset, with_classes
from protoseg.evaluation.inference import segment
from protoseg.evaluation.scores import evaluate
from protoseg.models.checkpoint import load_segmenter, save_segmenter
from protoseg.models.segmenter import Segmenter
from protoseg.training.loop import train

NEW = ("8", "9")
OLD = tuple(name for name in CLASSES if name not in NEW)
BATCH = 16


def trained(classes: tuple[str, ...], seed: int, out: Path, overrides: list[str]) -> Path:
    """The demo's configuration on these classes, in a minute's budget."""
    fixed = [f"data.classes={list(classes)}", f"train.seed={seed}", "train.iterations=300"]
    fixed += ["eval.interval=1000", "eval.samples=0"]
    train(load_config("configs/digits_resnet18_k4.yaml", [*fixed, *overrides]), out, resume="auto")
    return out / "last.pt"


def embedded(model: Segmenter, data: Dataset, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Features (B, D, h, w) and labels (B, h, w) of some images."""
    features, labels = [], []
    for index in indices:
        image, label = data.read(index)
        with torch.no_grad():
            features.append(model.embed(image[None]))
        labels.append(downsample_labels(label[None], features[-1].shape[-2:]))
    return torch.cat(features), torch.cat(labels)


def refit(model: Segmenter, count: int) -> None:
    """Cluster the old classes anew on the first training images."""
    assert model.prototypes is not None
    data = build_dataset("digits", root=None, split="train", classes=OLD)
    model.prototypes.refit(
        [embedded(model, data, range(i, min(i + BATCH, count))) for i in range(0, count, BATCH)]
    )


def add_new_classes(model: Segmenter, count: int) -> list[str]:
    """Add each new class from the first `count` images that show it → the longer class list."""
    assert model.prototypes is not None
    data = build_dataset("digits", root=None, split="train")
    for name in NEW:
        wanted = CLASSES.index(name)
        shown = (i for i in range(len(data)) if (data.label(i) == wanted).any())
        features, labels = embedded(model, data, islice(shown, count))
        model.prototypes.add_class(features, labels == wanted)
    return [*OLD, *NEW]


class LinearOnUnitVectors(nn.Module):
    """A linear classifier learned from cells (N, D) with labels 0…C−1, at most 1,500 of each class."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        super().__init__()
        known = labels < len(CLASSES)
        pixels, label = unit(features, 1).permute(0, 2, 3, 1)[known], labels[known]
        order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
        keep = torch.cat([order[label[order] == c][:1500] for c in range(len(CLASSES))])
        fitted = LogisticRegression(C=100, max_iter=1000).fit(pixels[keep], label[keep])
        self.weight = torch.tensor(fitted.coef_, dtype=torch.float32)[..., None, None]
        self.bias = torch.tensor(fitted.intercept_, dtype=torch.float32)

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.conv2d(unit(features, 1), self.weight, self.bias)


def scores(model: Segmenter, classes: Sequence[str]) -> tuple[float, float]:
    """Mean IoU in % of the old and of the new classes; labels of classes that the model lacks are ignored."""
    data = with_classes(build_dataset("digits", root=None, split="val"), classes, colours(classes))
    result = evaluate(
        lambda image, size: segment(model, image, size),
        ((*data.read(i), i, data.name(i)) for i in range(len(data))),
        data.classes,
        data.ignore_index,
        torch.device("cpu"),
    )
    iou = dict(zip(data.classes, (100 * result.iou).tolist()))
    new = [iou[name] for name in NEW if name in iou]
    return statistics.mean(iou[name] for name in OLD), statistics.mean(new) if new else float("nan")


def unknown_found(path: Path) -> tuple[float, float]:
    """AUROC in % of distance and softmax as scores of unknown digits, against pixels of known digits."""
    model, _, _ = load_segmenter(path)
    assert model.prototypes is not None
    val = build_dataset("digits", root=None, split="val")
    features, labels = embedded(model, val, range(len(val)))
    logits, distance = model.prototypes(features, return_distance=True)
    digit = labels < CLASSES.index("background")
    unknown = torch.isin(labels, torch.tensor([CLASSES.index(name) for name in NEW]))[digit]
    by_distance, by_softmax = (
        100 * float(roc_auc_score(unknown, score[digit]))
        for score in (distance, 1 - logits.softmax(1).amax(1))
    )
    return by_distance, by_softmax


def table(head: str, rows: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = [head, "|---|---|---|"]
    for name, seeds in rows.items():
        cells = []
        for values in zip(*seeds):
            known = [value for value in values if value == value]
            spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
            cells.append(f"{statistics.mean(known):.1f}{spread}" if known else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Add two digits to a model trained on eight.")
    parser.add_argument("--images", type=int, default=10, metavar="N", help="labelled images per new class")
    parser.add_argument("--refit", type=int, default=128, metavar="N", help="training images for refit")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/add_classes"), metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of both trainings")
    args = parser.parse_intermixed_args()
    iou: dict[str, list[tuple[float, float]]] = defaultdict(list)
    auroc: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in range(args.seeds):
        few = trained(OLD, seed, args.out / f"few_{seed}", args.overrides)
        every = trained(CLASSES, seed, args.out / f"all_{seed}", args.overrides)
        for name, anew in (("trained on 0–7", False), ("the same, refit", True)):
            model, config, content = load_segmenter(few)
            if anew:
                refit(model, args.refit)
            known, longer = few.with_name("known.pt"), few.with_name("longer.pt")
            save_segmenter(known, model, config, OLD, colours(OLD), content["step"])
            classes = add_new_classes(model, args.images)
            save_segmenter(longer, model, config, classes, colours(classes), content["step"])
            iou[name].append(scores(load_segmenter(known)[0], OLD))
            iou[f"{name}, then 8 and 9 added"].append(scores(load_segmenter(longer)[0], classes))
            auroc[name].append(unknown_found(known))
        model, _, _ = load_segmenter(few)
        images = embedded(model, build_dataset("digits", root=None, split="train"), range(args.refit))
        model.classifier = LinearOnUnitVectors(*images)
        iou["trained on 0–7, then a linear classifier of 0–9"].append(scores(model, CLASSES))
        iou["trained on 0–9"].append(scores(load_segmenter(every)[0], CLASSES))
        print(table("\n| mIoU % | 0–7 and background | 8 and 9 |", iou))
        print(
            table("\n| AUROC % for 8 and 9 | 1 − largest cosine | 1 − largest softmax |", auroc), flush=True
        )


if __name__ == "__main__":
    main()
