"""Losses on a label tree: tree-min cross-entropy and tree-triplet (HSSN, Li et al., CVPR 2022, 2203.14335).

C classes are the leaves and the first of V nodes; N pixels, T triplets, D channels. The root is no node: it
would be right everywhere.

The equations are taken from the paper as it is remembered; its text was not at hand. Where it leaves a
choice, the form here is: the score of an inner node is the largest logit of its leaves, so that prototypes of
a parent are those of its children (the paper learns an output per node); s_v = σ(log-odds of v against the
classes outside v), since a cosine times 20 plus a log-prior is no log-odds by itself (for a leaf σ gives the
softmax probability); a loss is the sum over nodes and the mean over pixels; the cosine distance is (1 − cos)
/ 2, which lies in 0 … 1 like the margin.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.core.draws import draw_state, fold, to_key
from protoseg.core.similarity import unit

FOCUS = 2.0  # γ of the paper
MARGIN = 0.1  # m_ε of the paper
SALT = 6  # of the draw of triplets


def ancestor_matrix(parents: Sequence[int]) -> Tensor:
    """(V, V) bool: whether node u (column) is v (row) or above it. parents: −1 below the root."""
    ancestors_VV = torch.eye(len(parents), dtype=torch.bool)
    for v in range(len(parents)):
        u = parents[v]
        while u >= 0:
            ancestors_VV[v, u] = True
            u = parents[u]
    return ancestors_VV


def tree_distances(ancestors_VV: Tensor) -> Tensor:
    """(V, V) int64: edges between two nodes, by way of the root if they share no ancestor."""
    shared_VV = ancestors_VV.double() @ ancestors_VV.double().t()  # depth of the lowest common ancestor
    depth_V = shared_VV.diag()
    return (depth_V[:, None] + depth_V - 2 * shared_VV).long()


class TreeTables(nn.Module):
    """A label tree as the tensors that the losses index. No parameters, and no state to save.

    parents: of the V nodes, −1 for the children of the root; the first num_classes are the leaves.
    """

    ancestors_VV: Tensor
    distances_VV: Tensor
    path_VH: Tensor
    outside_VC: Tensor
    unrelated_VV: Tensor
    pair_node_P: Tensor
    pair_leaf_P: Tensor
    below_node_Q: Tensor
    below_Q: Tensor

    def __init__(self, parents: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.num_nodes = num_classes, len(parents)
        ancestors_VV = ancestor_matrix(parents)
        depth_V = ancestors_VV.sum(1)
        self.height = int(depth_V.max())
        path_VH = torch.full((len(parents), self.height), -1)
        for v, depth in enumerate(depth_V.tolist()):
            mine = ancestors_VV[v].nonzero()[:, 0]
            path_VH[v, :depth] = mine[depth_V[mine].argsort()]
        descendants_VV = ancestors_VV.t()
        inner_IV = descendants_VV[num_classes:]
        pair_node_P, pair_leaf_P = inner_IV[:, :num_classes].nonzero().unbind(1)
        below_node_Q, below_Q = inner_IV.nonzero().unbind(1)
        for name, table in {
            "ancestors_VV": ancestors_VV,
            "distances_VV": tree_distances(ancestors_VV),
            "path_VH": path_VH,  # from the top down to the node itself, then −1
            "outside_VC": (~descendants_VV[:, :num_classes]).float(),
            "unrelated_VV": ~(ancestors_VV | descendants_VV),
            "pair_node_P": pair_node_P,  # inner nodes, from 0, with each of their leaves
            "pair_leaf_P": pair_leaf_P,
            "below_node_Q": below_node_Q,  # inner nodes, from 0, with themselves and all below
            "below_Q": below_Q,
        }.items():
            self.register_buffer(name, table, persistent=False)

    def live_nodes(self, live_C: Tensor) -> Tensor:
        """(V,) bool: nodes with a live class among their leaves; the others are not to be learned from."""
        return (live_C[:, None] & self.ancestors_VV[: self.num_classes]).any(0)


def node_scores(logits_CN: Tensor, tree: TreeTables) -> Tensor:
    """(V, N): of each node the largest logit of its leaves, so that no node is below one of its children."""
    inner_IN = _largest(logits_CN[tree.pair_leaf_P], tree.pair_node_P, tree.num_nodes - tree.num_classes)
    return torch.cat([logits_CN, inner_IN])


def node_log_odds(logits_CN: Tensor, tree: TreeTables) -> Tensor:
    """(V, N): the score of each node less the log-sum-exp of the classes outside it.

    σ of it is the softmax probability for a leaf, and never less for a node than for its child. Finite in
    float32 where next to nothing, or nothing at all, is outside.
    """
    highest_N = logits_CN.detach().amax(0)
    mass_VN = tree.outside_VC.to(logits_CN.dtype) @ (logits_CN - highest_N).exp()
    outside_VN = mass_VN.clamp(min=torch.finfo(torch.float32).tiny).log() + highest_N
    return node_scores(logits_CN, tree) - outside_VN


def tree_min_cross_entropy(
    log_odds_VN: Tensor,
    labels_N: Tensor,
    tree: TreeTables,
    scale: Tensor | float,
    focus: float = FOCUS,
    consistent: bool = False,
) -> Tensor:
    """Focal tree-min loss: scale · Σ over pixels and the nodes that the label decides.

    With s = σ(log-odds) and y the label, p_v = min of s over v and its ancestors for the nodes v on the path
    to y (true), 1 − p_v = min of 1 − s over v and its descendants for those off it (false); the loss is −(1 −
    p_v)^γ log p_v where true and −p_v^γ log(1 − p_v) where false. What is below the label is unknown and left
    out; so a label may be any node. labels_N: int64 node ids, −1 takes no part. consistent: the scores obey
    the tree already (those of `node_log_odds` do), and p = s. Returns a 0-d tensor.
    """
    known_N = labels_N >= 0
    label_N = labels_N.clamp(min=0)
    path_HN = tree.path_VH[label_N].t()
    # Sigmoid is monotone: minimum and maximum can be taken of the log-odds.
    true_HN = log_odds_VN.gather(0, path_HN.clamp(min=0))
    if not consistent:
        true_HN = true_HN.cummin(0).values
        inner_IN = _largest(log_odds_VN[tree.below_Q], tree.below_node_Q, tree.num_nodes - tree.num_classes)
        log_odds_VN = torch.cat([log_odds_VN[: tree.num_classes], inner_IN])
    counted_HN = (path_HN >= 0) & known_N
    loss = torch.where(counted_HN, _focal(-true_HN, focus), 0).sum()
    false_VN = tree.unrelated_VV[:, label_N] & known_N
    return scale * (loss + (_focal(log_odds_VN, focus) * false_VN).sum())


def draw_triplets(
    labels_N: Tensor, num_classes: int, count: int, seed: int, step: int | Tensor, indices_B: Tensor
) -> Tensor:
    """(3, count) int64: triples of pixels; each of a class drawn among those present, then a pixel of it.

    labels_N: int64; ids from num_classes on take no part. A function of (seed, step, dataset indices) and the
    labels; no host sync. Where no pixel has a class, the triples are of any pixels.
    """
    state = fold(draw_state(seed, step, SALT), indices_B.sum())
    number_23T = torch.arange(6 * count, device=labels_N.device).view(2, 3, count)
    class_u_3T, pixel_u_3T = to_key(fold(state, number_23T))  # 40 bits each
    group_N = torch.where((labels_N >= 0) & (labels_N < num_classes), labels_N, num_classes)
    sorted_N, order_N = group_N.sort(stable=True)
    start_G = torch.searchsorted(sorted_N, torch.arange(num_classes + 1, device=labels_N.device))
    size_C = start_G.diff()
    rank_C = (size_C > 0).cumsum(0)
    class_3T = torch.searchsorted(rank_C, 1 + (class_u_3T * rank_C[-1] >> 40)).clamp(max=num_classes - 1)
    place_3T = start_G[class_3T] + (pixel_u_3T * size_C[class_3T] >> 40)
    return order_N[place_3T.clamp(max=len(order_N) - 1)]


def tree_triplet_loss(emb_3TD: Tensor, labels_3T: Tensor, tree: TreeTables, margin: float = MARGIN) -> Tensor:
    """Tree-triplet loss: the mean of max(0, ⟨i, i⁺⟩ − ⟨i, i⁻⟩ + m) over the triplets that the tree can order.

    emb_3TD: anchors i and two partners, of any length; of these i⁺ is the one nearer in the tree, i⁻ the
    other; a triple takes no part where both are equally far, or a label is −1 or no class. ⟨a, b⟩ = (1 − cos)
    / 2; m = m_ε + ½·m_τ, m_τ = (ψ(i, i⁻) − ψ(i, i⁺)) / 2H with the tree distance ψ and the height H. 0
    without a triplet.
    """
    emb_3TD = unit(emb_3TD)
    valid_T = ((labels_3T >= 0) & (labels_3T < tree.num_classes)).all(0)
    label_3T = torch.where(valid_T, labels_3T, 0)
    psi_2T = tree.distances_VV[label_3T[0], label_3T[1:]]
    gap_T = psi_2T[1] - psi_2T[0]  # above 0 where the first partner is the nearer one
    half_2T = (1 - (emb_3TD[0] * emb_3TD[1:]).sum(-1)) / 2
    difference_T = (half_2T[0] - half_2T[1]) * gap_T.sign()
    margin_T = margin + 0.5 * gap_T.abs().to(emb_3TD.dtype) / (2 * tree.height)
    valid_T = valid_T & (gap_T != 0)
    loss_T = torch.where(valid_T, F.relu(difference_T + margin_T), 0)
    return loss_T.sum() / valid_T.sum().clamp(min=1)


def _focal(log_odds: Tensor, focus: float) -> Tensor:
    """−p^γ log(1 − p) with p = σ(log-odds): the focal cross-entropy of what should be 0."""
    return log_odds.sigmoid() ** focus * F.softplus(log_odds)


def _largest(rows_PN: Tensor, group_P: Tensor, groups: int) -> Tensor:
    """(groups, N): the largest of the rows of each group."""
    lowest = rows_PN.new_full((groups, rows_PN.shape[1]), -torch.inf)
    return lowest.scatter_reduce(0, group_P[:, None].expand_as(rows_PN), rows_PN, "amax", include_self=False)
