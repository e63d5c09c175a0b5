"""Scores on a label tree: IoU of every level, and how far wrong pixels are from right.

C classes, V nodes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.data.tree import LabelTree
from protoseg.runtime.files import none_if_nan


def level_confusion(confusion_VC: Tensor, tree: LabelTree, level: int) -> Tensor:
    """(V, V) pixel counts at a level: row = node of the label, column = node of the predicted class.

    confusion_VC: int64, rows are labels, which may be inner nodes. A class counts at every level; a pixel
    that is labelled with an inner node counts at that node's own level only.
    """
    shown_C = tree.level_of_classes(level)
    own = [v for v in range(tree.num_classes, len(tree.names)) if tree.depths[v] == level]
    rows_VV = torch.zeros(len(tree.names), len(tree.names), dtype=torch.long)
    rows_VV[torch.arange(tree.num_classes), shown_C] = 1
    rows_VV[own, own] = 1
    return rows_VV.t() @ confusion_VC @ F.one_hot(shown_C, len(tree.names))


def mean_tree_distance(confusion_VC: Tensor, tree: LabelTree) -> float:
    """Mean number of edges between label and prediction, of wrong pixels labelled with a class; or NaN."""
    counts_CC = confusion_VC[: tree.num_classes]
    wrong_CC = counts_CC - counts_CC.diag().diag()
    distances_CC = tree.distances_VV[: tree.num_classes, : tree.num_classes]
    return ((wrong_CC * distances_CC).sum().double() / wrong_CC.sum()).item()


def level_scores(confusion_VC: Tensor, tree: LabelTree) -> dict[str, Any]:
    """Plain data for JSON: of each level mIoU, accuracy and the IoU of its nodes; and mean tree distance."""
    levels = {}
    for level in range(1, tree.height + 1):
        counts_VV = level_confusion(confusion_VC, tree, level)
        both = counts_VV.diag()
        iou_V = both.double() / (counts_VV.sum(0) + counts_VV.sum(1) - both)
        nodes = sorted(set(tree.level_of_classes(level).tolist()))
        levels[str(level)] = {
            "mIoU": none_if_nan(iou_V[nodes].nanmean().item()),
            "aAcc": none_if_nan((both.sum().double() / counts_VV.sum()).item()),
            "IoU": {tree.names[v]: none_if_nan(iou_V[v].item()) for v in nodes},
        }
    return {"levels": levels, "tree_distance": none_if_nan(mean_tree_distance(confusion_VC, tree))}


class ConsistencyCount:
    """Counts pixels in which a level, deciding by itself, does not give the node above the predicted class.

    counts: int64, all pixels; those where levels decide by the largest leaf, as predictions here do; those
    where levels decide by the sum of their leaves' probabilities.
    """

    def __init__(self, tree: LabelTree, device: torch.device) -> None:
        self.tree = tree
        self.shown = [tree.level_of_classes(level).to(device) for level in range(1, tree.height)]
        self.counts = torch.zeros(3, dtype=torch.long, device=device)

    def add(self, share_Crw: Tensor, classes_rw: Tensor) -> None:
        """Class probabilities of some pixels, and the classes that were predicted."""
        share_CN, class_N = share_Crw.flatten(1), classes_rw.flatten()
        by_leaf_N, by_sum_N = (torch.zeros_like(class_N, dtype=torch.bool) for _ in range(2))
        for shown_C in self.shown:
            node_CN = shown_C[:, None].expand_as(share_CN)
            nothing_VN = share_CN.new_zeros(len(self.tree.names), len(class_N))
            largest_VN = nothing_VN.scatter_reduce(0, node_CN, share_CN, "amax")
            right_N = shown_C[class_N]
            by_leaf_N |= largest_VN.gather(0, right_N[None])[0] < largest_VN.amax(0)
            by_sum_N |= nothing_VN.scatter_add(0, node_CN, share_CN).argmax(0) != right_N
        self.counts += torch.stack([torch.ones_like(class_N).sum(), by_leaf_N.sum(), by_sum_N.sum()])
