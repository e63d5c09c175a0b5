"""Scores of a tree's levels against counting pixel by pixel."""

import math

import pytest
import torch
from torch import Tensor

from protoseg.data.tree import label_tree
from protoseg.evaluation.inference import Prediction, most_likely
from protoseg.evaluation.level_scores import ConsistencyCount, mean_tree_distance
from protoseg.evaluation.scores import Scores, evaluate

CLASSES = ("road", "car", "bus", "truck", "sky")
TREE = label_tree(
    {"flat": ["road"], "vehicle": {"light": ["car"], "heavy": ["bus", "truck"]}, "sky": None}, CLASSES
)
PARENT = {
    "road": "flat",
    "car": "light",
    "bus": "heavy",
    "truck": "heavy",
    "light": "vehicle",
    "heavy": "vehicle",
}
CPU = torch.device("cpu")


def path(name: str) -> list[str]:
    return [*(path(PARENT[name]) if name in PARENT else []), name]


def shown(name: str, level: int) -> str:
    return path(name)[:level][-1]


def maps(seed: int) -> tuple[Tensor, Tensor]:
    """Labels at all nodes, some ignored, and predicted classes."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, len(TREE.names) + 1, (20, 30), generator=generator)
    label[label == len(TREE.names)] = 255
    return label, torch.randint(0, len(CLASSES), label.shape, generator=generator)


def scores_of(label: Tensor, prediction: Tensor) -> Scores:
    samples = [(torch.zeros(3, 4, 4), label, 0, "")]
    return evaluate(
        lambda image, size: Prediction(prediction, None, None), samples, CLASSES, 255, CPU, tree=TREE
    )


@pytest.mark.parametrize("level", [1, 2, 3])
def test_iou_of_a_level_by_counting(level: int) -> None:
    label, prediction = maps(level)
    pairs = []
    for y, p in zip(label.flatten().tolist(), prediction.flatten().tolist()):
        if y == 255:
            continue
        name = TREE.names[y]
        inner = y >= len(CLASSES)
        if inner and len(path(name)) != level:
            continue  # counts at its own level only
        pairs.append((name if inner else shown(name, level), shown(CLASSES[p], level)))
    nodes = {shown(name, level) for name in CLASSES}
    got = scores_of(label, prediction).to_plain()["levels"][str(level)]
    assert got["IoU"].keys() == nodes
    values = []
    for node in nodes:
        both = sum(pair == (node, node) for pair in pairs)
        values.append(both / sum(node in pair for pair in pairs))
        assert math.isclose(got["IoU"][node], values[-1])
    assert math.isclose(got["mIoU"], sum(values) / len(values))
    assert math.isclose(got["aAcc"], sum(a == b for a, b in pairs) / len(pairs))


def test_last_level_without_inner_labels_is_that_of_the_classes() -> None:
    label, prediction = maps(0)
    label[label >= len(CLASSES)] = 255
    plain = scores_of(label, prediction).to_plain()
    assert plain["levels"]["3"]["IoU"] == plain["IoU"]


def test_inner_labels_leave_the_scores_of_classes_alone() -> None:
    label, prediction = maps(0)
    with_inner = scores_of(label, prediction).to_plain()
    label[label >= len(CLASSES)] = 255
    without = scores_of(label, prediction).to_plain()
    assert {k: with_inner[k] for k in ("mIoU", "IoU", "Acc")} == {
        k: without[k] for k in ("mIoU", "IoU", "Acc")
    }
    assert with_inner["levels"]["1"] != without["levels"]["1"]


def test_mean_tree_distance_by_counting() -> None:
    label, prediction = maps(5)
    found = []
    for y, p in zip(label.flatten().tolist(), prediction.flatten().tolist()):
        if y < len(CLASSES) and y != p:
            found.append(len(set(path(CLASSES[y])) ^ set(path(CLASSES[p]))))
    scores = scores_of(label, prediction)
    assert math.isclose(scores.to_plain()["tree_distance"], sum(found) / len(found))
    right = torch.eye(len(TREE.names), len(CLASSES), dtype=torch.long)
    assert math.isnan(mean_tree_distance(right, TREE))


@pytest.mark.parametrize("views", [1, 2])
def test_levels_that_decide_by_themselves(views: int) -> None:
    """By the largest leaf they always agree with the predicted class, by the sum of leaves not always."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(len(CLASSES), 6, 7, generator=generator) for _ in range(views)]
    count = ConsistencyCount(TREE, CPU)
    classes, _ = most_likely(logits, (6, 7), on_band=count.add)
    share = torch.stack([each.softmax(0) for each in logits]).mean(0)
    wrong = 0
    for n in range(42):
        y, x = divmod(n, 7)
        best = CLASSES[int(classes[y, x])]
        agree = True
        for level in (1, 2):
            sums: dict[str, float] = {}
            for c, name in enumerate(CLASSES):
                sums[shown(name, level)] = sums.get(shown(name, level), 0) + share[c, y, x].item()
            agree &= max(sums, key=sums.__getitem__) == shown(best, level)
        wrong += not agree
    assert wrong > 0
    assert count.counts.tolist() == [42, 0, wrong]
