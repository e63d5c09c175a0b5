"""Classes added without training: python docs/examples/add_classes.py [--images 10] [--seeds 3] [--out DIR]

Trains on the digits 0–7, adds 8 and 9 from a few labelled images without a gradient step, and compares with
training on 0–9 from scratch, all scored on the same validation images. Before 8 and 9 are added, their pixels
are the unknown that distances should reveal. Runs that are done already are taken from DIR.
"""

import argparse
import statistics
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

from protoseg.checkpoint import load_segmenter, save_segmenter
from protoseg.config import load_config
from protoseg.data import Dataset, build_dataset
from protoseg.data.digits import CLASSES, colours
from protoseg.data.files import with_classes
from protoseg.evaluate import evaluate
from protoseg.inference import predict
from protoseg.losses import downsample_labels
from protoseg.model import Segmenter
from protoseg.trainer import train

NEW = ("8", "9")
OLD = tuple(name for name in CLASSES if name not in NEW)


def trained(classes: tuple[str, ...], seed: int, out: Path, iterations: int) -> Path:
    """The demo's configuration on these classes, in a minute's budget."""
    names = ", ".join(f'"{name}"' for name in classes)
    overrides = [
        f"data.classes=[{names}]",
        f"train.seed={seed}",
        f"train.iterations={iterations}",
        "eval.interval=1000",
        "eval.samples=0",
    ]
    train(load_config("configs/digits_resnet18_k4.yaml", overrides), out, resume="auto")
    return out / "last.pt"


def add_new_classes(model: Segmenter, classes: list[str], data: Dataset, count: int) -> list[str]:
    """Add each new class from the first `count` images that show it → the longer class list."""
    assert model.prototypes is not None
    for name in NEW:
        wanted = CLASSES.index(name)
        shown = (i for i in range(len(data)) if (data.label(i) == wanted).any())
        samples = [data.read(i) for _, i in zip(range(count), shown)]
        images, labels = (torch.stack(part) for part in zip(*samples))
        with torch.no_grad():
            features, _ = model.embed(images)
        model.prototypes.add_class(features, downsample_labels(labels, features.shape[-2:]) == wanted)
        classes = [*classes, name]
    return classes


def scores(path: Path, val: Dataset) -> tuple[float, float]:
    """Mean IoU in % of the old and of the new classes; labels of classes that the model lacks are ignored."""
    model, _, content = load_segmenter(path)
    data = with_classes(val, content["classes"], content["palette"])
    samples = ((*data.read(i), i, data.name(i)) for i in range(len(data)))
    result = evaluate(
        lambda image, size: predict(model, image, size),
        samples,
        data.classes,
        data.ignore_index,
        torch.device("cpu"),
    )
    iou = dict(zip(data.classes, (100 * result.iou).tolist()))
    new = [iou[name] for name in NEW if name in iou]
    return statistics.mean(iou[name] for name in OLD), statistics.mean(new) if new else float("nan")


def unknown_found(path: Path, val: Dataset) -> dict[str, float]:
    """AUROC in % of two scores for being a pixel of an unknown digit, against pixels of known digits."""
    model, _, _ = load_segmenter(path)
    head = model.prototypes
    assert head is not None
    distances, softmaxes, labels = [], [], []
    for i in range(len(val)):
        image, label = val.read(i)
        with torch.no_grad():
            features, _ = model.embed(image[None])
            logits, distance = head(features, return_distance=True)
        small = downsample_labels(label[None], features.shape[-2:])
        digit = small < CLASSES.index("background")
        distances.append(distance[digit])
        softmaxes.append(1 - logits.softmax(1).amax(1)[digit])
        labels.append(small[digit])
    unknown = torch.isin(torch.cat(labels), torch.tensor([CLASSES.index(name) for name in NEW]))
    return {
        name: 100 * float(roc_auc_score(unknown, torch.cat(values)))
        for name, values in (("1 − largest cosine", distances), ("1 − largest softmax", softmaxes))
    }


def spread(values: list[float]) -> str:
    """Mean, and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Add two digits to a model trained on eight.")
    parser.add_argument("--images", type=int, default=10, metavar="N", help="labelled images per new class")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--iterations", type=int, default=300, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/add_classes"), metavar="DIR")
    args = parser.parse_args()
    all_digits = build_dataset("digits", root=None, split="train")
    val = build_dataset("digits", root=None, split="val")
    rows: dict[str, list[tuple[float, float]]] = {}
    unknown: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        few = trained(OLD, seed, args.out / f"few_{seed}", args.iterations)
        model, config, content = load_segmenter(few)
        classes = add_new_classes(model, content["classes"], all_digits, args.images)
        edited = few.parent / "edited.pt"
        save_segmenter(edited, model, config, classes, colours(classes), content["step"])
        every = trained(CLASSES, seed, args.out / f"all_{seed}", args.iterations)
        for name, path in (
            ("trained on 0–7", few),
            (f"8 and 9 added, {args.images} images each, no training", edited),
            ("trained on 0–9 from scratch", every),
        ):
            rows.setdefault(name, []).append(scores(path, val))
        for name, value in unknown_found(few, val).items():
            unknown.setdefault(name, []).append(value)
    print("\n| | mIoU % of 0–7 and background | mIoU % of 8 and 9 |\n|---|---|---|")
    for name, values in rows.items():
        old, new = (spread([value[part] for value in values]) for part in range(2))
        print(f"| {name} | {old} | {'–' if 'nan' in new else new} |")
    print("\n| score for an unknown digit, model trained on 0–7 | AUROC % |\n|---|---|")
    for name, found in unknown.items():
        print(f"| {name} | {spread(found)} |")


if __name__ == "__main__":
    main()
