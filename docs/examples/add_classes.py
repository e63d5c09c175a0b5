"""Classes added without training: python docs/examples/add_classes.py [--config CONFIG --new 8,9]

Trains on all classes but the new ones, adds these from a few labelled images without a gradient step, and
compares with training on all from scratch, all scored on the same validation images. A new class gets its
share of the labelled pixels for the prior, or an equal one. Once more after the prototypes were moved to the
means of their pixels in training images (`refit`). What the features can give is
shown by a linear classifier learned on them from the same few images. Before the new classes are added, their
pixels are the unknown that distances should reveal. Finished runs in the folder --out are not trained again.
"""

import argparse
import copy
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from protoseg.config import Config, config_from, load_config, to_plain
from protoseg.core.losses import downsample_labels
from protoseg.core.similarity import own_similarities, unit
from protoseg.data.datasets import data_root, dataset_spec, open_dataset
from protoseg.data.file_dataset import Dataset, with_classes
from protoseg.data.reading.label_ids import IGNORE
from protoseg.evaluation.inference import segment
from protoseg.evaluation.scores import evaluate
from protoseg.models.checkpoint import load_segmenter, save_segmenter
from protoseg.models.segmenter import Segmenter
from protoseg.training.loop import train

BATCH = 16


def without(config: Config, names: Sequence[str]) -> Config:
    """The same on the other classes; pixels of these are ignored."""
    spec = dataset_spec(config.data)
    kept = [i for i, name in enumerate(spec.classes) if name not in names]
    values = to_plain(config)
    values["data"]["classes"] = [spec.classes[i] for i in kept]
    if config.data.name != "digits":
        raw_ids = spec.label_map or {i: i for i in range(len(spec.classes))}
        values["data"] |= {
            "name": "folder",
            "root": str(data_root(config.data)),
            "palette": [list(spec.colours[i]) for i in kept],
            "label_map": {raw: kept.index(c) if c in kept else IGNORE for raw, c in raw_ids.items()},
        }
    return config_from(values, "without")


def embedded(model: Segmenter, data: Dataset, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Features (B, D, h, w) and labels (B, h, w) of some images."""
    features, labels = [], []
    for index in indices:
        image, label = data.read(index)
        with torch.no_grad():
            features.append(model.embed(image[None]))
        labels.append(downsample_labels(label[None], features[-1].shape[-2:]))
    return torch.cat(features), torch.cat(labels)


def showing(data: Dataset, name: str, count: int) -> list[int]:
    """`count` images with a pixel of the class, spread over the dataset: neighbours may be of one video."""
    wanted = list(data.classes).index(name)
    found = [i for i in range(len(data)) if (data.label(i) == wanted).any()]
    return found[:: max(len(found) // count, 1)][:count]


class LinearOnUnitVectors(nn.Module):
    """A linear classifier learned from cells (N, D) with labels 0…C−1, at most 1,500 of each class."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        super().__init__()
        known = labels < num_classes
        pixels, label = unit(features, 1).permute(0, 2, 3, 1)[known], labels[known]
        order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
        keep = torch.cat([order[label[order] == c][:1500] for c in range(num_classes)])
        fitted = LogisticRegression(C=100, max_iter=1000).fit(pixels[keep], label[keep])
        self.weight = torch.zeros(num_classes, pixels.shape[1], 1, 1)
        self.bias = torch.full((num_classes,), -1e4)  # where no image shows the class
        at = torch.from_numpy(fitted.classes_).long()
        self.weight[at] = torch.tensor(fitted.coef_, dtype=torch.float32)[..., None, None]
        self.bias[at] = torch.tensor(fitted.intercept_, dtype=torch.float32)

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.conv2d(unit(features, 1), self.weight, self.bias)


def scores(
    model: Segmenter, data: Dataset, classes: Sequence[str], new: Sequence[str]
) -> tuple[float, float]:
    """Mean IoU in % of the old and of the new classes; labels of classes that the model lacks are ignored."""
    data = with_classes(data, classes, [(0, 0, 0)] * len(classes))
    result = evaluate(
        lambda image, size: segment(model, image, size),
        ((*data.read(i), i, data.name(i)) for i in range(len(data))),
        data.classes,
        data.ignore_index,
        torch.device("cpu"),
    )
    iou = dict(zip(data.classes, (100 * result.iou).tolist()))
    groups = [[value for name, value in iou.items() if (name in new) == wanted] for wanted in (False, True)]
    old_iou, new_iou = (statistics.mean(group) if group else float("nan") for group in groups)
    return old_iou, new_iou


def unknown_found(
    model: Segmenter, old: tuple[Tensor, Tensor], val: Dataset, new: Sequence[str]
) -> tuple[float, ...]:
    """AUROC in % of five scores, new classes' pixels against those of the old ones, a background aside:
    distance, with the class prior, standardised by the cosines of each prototype's own pixels in `old`,
    softmax, energy."""
    head = model.prototypes
    assert head is not None
    own_NK = own_similarities(
        head.unit_rows(old[0]), head.prototypes, old[1].flatten().clamp(max=head.num_classes - 1)
    )
    cosine_N, nearest_N = own_NK.max(1)
    at_N = old[1].flatten() * head.num_prototypes + nearest_N
    moments = []
    for p in range(head.num_classes * head.num_prototypes):
        mine = cosine_N[(at_N == p) & (old[1].flatten() < head.num_classes)]
        moments.append((mine.mean(), mine.std()) if len(mine) > 20 else (cosine_N.mean(), cosine_N.std()))
    mean_P, spread_P = (torch.stack(part) for part in zip(*moments))
    found: list[list[Tensor]] = [[] for _ in range(5)]
    unknown = []
    for i in range(0, len(val), BATCH):
        features, labels = embedded(model, val, range(i, min(i + BATCH, len(val))))
        names = list(val.classes)
        aside = [len(names) - 1] if names[-1] == "background" else []
        asked = (labels < len(names)) & ~torch.isin(labels, torch.tensor(aside))
        unknown.append(torch.isin(labels, torch.tensor([names.index(name) for name in new]))[asked])
        logits, distance = head(features, return_distance=True)
        cosines_NP = head.unit_rows(features) @ head.prototypes.flatten(0, 1).t()
        best_N, at_N = cosines_NP.max(1)
        standardised = ((mean_P[at_N] - best_N) / spread_P[at_N]).view_as(labels)
        each = (
            distance, -logits.amax(1), standardised, 1 - logits.softmax(1).amax(1), -logits.logsumexp(1)
        )  # fmt: skip
        for values, score in zip(found, each):
            values.append(score[asked])
    return tuple(100 * float(roc_auc_score(torch.cat(unknown), torch.cat(values))) for values in found)


def table(columns: Sequence[str], rows: dict[str, list[tuple[float, ...]]]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, seeds in rows.items():
        cells = []
        for values in zip(*seeds):
            known = [value for value in values if value == value]
            spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
            cells.append(f"{statistics.mean(known):.1f}{spread}" if known else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Add classes to a model trained without them.")
    parser.add_argument("--config", type=Path, default=Path("configs/digits_resnet18_k4.yaml"))
    parser.add_argument("--new", default="8,9", metavar="CLASS,CLASS", help="classes left out at first")
    parser.add_argument("--images", type=int, default=10, metavar="N", help="labelled images per new class")
    parser.add_argument("--refit", type=int, default=128, metavar="N", help="training images for refit")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N")
    parser.add_argument("--out", type=Path, default=Path("runs/add_classes"), metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of both trainings")
    args = parser.parse_intermixed_args()
    new = args.new.split(",")
    both = " and ".join(new)
    iou: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    auroc: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for seed in map(int, args.seeds.split(",")):
        overrides = [*args.overrides, f"train.seed={seed}", "eval.samples=0"]
        config = load_config(args.config, overrides)
        data, val = open_dataset(config, config.data.train_split), open_dataset(config, config.data.val_split)
        old = [name for name in data.classes if name not in new]
        few, every = args.out / f"few_{seed}", args.out / f"all_{seed}"
        train(without(config, new), few, resume="auto")
        train(config, every, resume="auto")
        chosen = {name: showing(data, name, args.images) for name in new}
        as_old = with_classes(data, old, [(0, 0, 0)] * len(old))
        for anew in (False, True):
            model, trained, content = load_segmenter(few / "last.pt")
            head = model.prototypes
            assert head is not None
            seen = embedded(model, as_old, range(args.refit))
            if anew:
                head.refit([seen])
            name = "the same, then refit" if anew else f"trained without {both}"
            iou[name].append(scores(model, val, old, new))
            auroc[name].append(unknown_found(model, seen, val, new))
            for which, share in (("", None), (", equal shares", 1 / len(data.classes))):
                model.classifier = longer_head = copy.deepcopy(head)
                for each in new:
                    features, labels = embedded(model, data, chosen[each])
                    longer_head.add_class(features, labels == list(data.classes).index(each), share)
                longer = few / "longer.pt"
                colours = [(0, 0, 0)] * len(data.classes)
                save_segmenter(longer, model, trained, [*old, *new], colours, content["step"])
                added = load_segmenter(longer)[0]
                iou[f"{name}, then both added{which}"].append(scores(added, val, [*old, *new], new))
        model, _, _ = load_segmenter(few / "last.pt")
        images = embedded(model, data, sorted({i for indices in chosen.values() for i in indices}))
        model.classifier = LinearOnUnitVectors(*images, len(data.classes))
        iou["… then a linear classifier learned from the same images"].append(
            scores(model, val, data.classes, new)
        )
        iou["trained on all"].append(scores(load_segmenter(every / "last.pt")[0], val, data.classes, new))
        print(table(("mIoU %", "the other classes", both), iou))
        columns = (
            f"AUROC % for {both}",
            "1 − largest cosine",
            "with the prior",
            "standardised",
            "1 − largest softmax",
            "energy",
        )
        print(table(columns, auroc), flush=True)


if __name__ == "__main__":
    main()
