"""Tree losses against loops over pixels, nodes and triplets written from the equations."""

import math
import random

import pytest
import torch
from helpers import assert_close_report
from torch import Tensor

from protoseg.core.tree_losses import (
    TreeTables,
    draw_triplets,
    node_log_odds,
    node_scores,
    tree_distances,
    tree_min_cross_entropy,
    tree_triplet_loss,
)


def random_parents(num_classes: int, inner: int, seed: int) -> list[int]:
    """Parents of a tree in which every inner node has a leaf below it; chains of one child occur."""
    draw = random.Random(seed)
    parents = [-1] * (num_classes + inner)
    for node in range(num_classes, num_classes + inner):
        parents[node] = draw.choice([-1, *range(num_classes, node)])
    for c, node in enumerate(draw.sample(range(num_classes), num_classes)):
        parents[node] = num_classes + c if c < inner else draw.choice([-1, *range(num_classes, len(parents))])
    return parents


def above(parents: list[int], v: int) -> list[int]:
    """The node and its ancestors."""
    return [] if v < 0 else [v, *above(parents, parents[v])]


def below(parents: list[int], v: int) -> list[int]:
    """The node and its descendants."""
    return [u for u in range(len(parents)) if v in above(parents, u)]


def brute_distance(parents: list[int], a: int, b: int) -> int:
    ours, theirs = above(parents, a), above(parents, b)
    return len(set(ours) ^ set(theirs))


def brute_tree_min(log_odds: Tensor, labels: list[int], parents: list[int], focus: float) -> Tensor:
    total = log_odds.new_zeros(())
    for n, y in enumerate(labels):
        if y < 0:
            continue
        s = log_odds[:, n].sigmoid()
        for v in range(len(parents)):
            if v in above(parents, y):
                p = torch.stack([s[u] for u in above(parents, v)]).min()
                total = total - (1 - p) ** focus * p.log()
            elif v not in below(parents, y):
                p = torch.stack([s[u] for u in below(parents, v)]).max()
                total = total - p**focus * (1 - p).log()
    return total


TREES = [
    random_parents(5, 2, 0),
    random_parents(7, 5, 1),
    random_parents(12, 9, 2),
    [-1, -1, -1],  # flat
    [3, 4, 4, -1, 5, 3],  # a chain
]
CLASSES = [5, 7, 12, 3, 3]
CASES = list(zip(TREES, CLASSES))


def logits_of(num_classes: int, pixels: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_classes, pixels, generator=generator, dtype=torch.double)


@pytest.mark.parametrize(("parents", "num_classes"), CASES)
def test_node_scores_are_the_largest_leaf(parents: list[int], num_classes: int) -> None:
    logits, tree = logits_of(num_classes), TreeTables(parents, num_classes)
    leaves = [[u for u in below(parents, v) if u < num_classes] for v in range(len(parents))]
    expected = torch.stack([logits[mine].amax(0) for mine in leaves])
    got = node_scores(logits, tree)
    assert torch.equal(got, expected)
    for v, parent in enumerate(parents):
        assert parent < 0 or (got[parent] >= got[v]).all()


@pytest.mark.parametrize(("parents", "num_classes"), CASES)
def test_log_odds_are_against_the_classes_outside(parents: list[int], num_classes: int) -> None:
    logits, tree = logits_of(num_classes), TreeTables(parents, num_classes)
    got = node_log_odds(logits, tree)
    for v in range(len(parents)):
        mine = [u for u in below(parents, v) if u < num_classes]
        others = [c for c in range(num_classes) if c not in mine]
        if others:
            expected = logits[mine].amax(0) - logits[others].logsumexp(0)
            assert_close_report(got[v], expected, f"node {v}", atol=1e-10)
        if v < num_classes:
            assert_close_report(got[v].sigmoid(), logits.softmax(0)[v], f"leaf {v}", atol=1e-10)
    for v, parent in enumerate(parents):
        assert parent < 0 or (got[parent] >= got[v] - 1e-12).all()


@pytest.mark.parametrize("focus", [0.0, 2.0])
@pytest.mark.parametrize(("parents", "num_classes"), CASES)
def test_tree_min_and_its_gradient(parents: list[int], num_classes: int, focus: float) -> None:
    """Of scores that do not obey the tree, with labels at all nodes."""
    tree = TreeTables(parents, num_classes)
    labels = [-1, *range(len(parents))]
    random_odds = logits_of(len(parents), len(labels), 3).requires_grad_()
    got = tree_min_cross_entropy(random_odds, torch.tensor(labels), tree, 0.5, focus)
    (gradient,) = torch.autograd.grad(got, random_odds)
    expected = 0.5 * brute_tree_min(random_odds, labels, parents, focus)
    (wanted,) = torch.autograd.grad(expected, random_odds)
    assert_close_report(got.detach(), expected.detach(), "loss", atol=1e-9)
    assert_close_report(gradient, wanted, "gradient", "VN", atol=1e-9)


@pytest.mark.parametrize(("parents", "num_classes"), CASES)
def test_consistent_scores_need_no_minimum(parents: list[int], num_classes: int) -> None:
    tree = TreeTables(parents, num_classes)
    labels = torch.arange(-1, len(parents))
    odds = node_log_odds(logits_of(num_classes, len(labels)), tree)
    short = tree_min_cross_entropy(odds, labels, tree, 1.0, consistent=True)
    assert_close_report(short, tree_min_cross_entropy(odds, labels, tree, 1.0), "loss", atol=1e-10)


def test_what_is_below_the_label_is_left_alone() -> None:
    """Classes 0 and 1 below node 3, class 2 beside it; a pixel labelled 3."""
    tree = TreeTables([3, 3, -1, -1], 3)
    odds = torch.zeros(4, 1, dtype=torch.double, requires_grad=True)
    loss = tree_min_cross_entropy(odds, torch.tensor([3]), tree, 1.0)
    (gradient,) = torch.autograd.grad(loss, odds)
    assert gradient[:2].abs().max() == 0
    assert gradient[2] > 0 > gradient[3]
    assert math.isclose(loss.item(), 2 * 0.25 * math.log(2))


def test_the_loss_is_finite_where_scores_are_extreme() -> None:
    tree = TreeTables([3, 3, -1, -1], 3)
    logits = torch.tensor([[-1e4, 300.0, 0.0], [-1e4, -300.0, 0.0], [5.0, -300.0, -1e4]], requires_grad=True)
    for y in range(4):
        odds = node_log_odds(logits, tree)
        loss = tree_min_cross_entropy(odds, torch.full((3,), y), tree, 1.0, consistent=True)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_live_nodes_have_a_live_leaf() -> None:
    tree = TreeTables([4, 4, 5, -1, 5, -1], 4)
    assert tree.live_nodes(torch.tensor([False, False, True, False])).tolist() == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(("parents", "num_classes"), CASES)
def test_distances_count_edges(parents: list[int], num_classes: int) -> None:
    tree, nodes = TreeTables(parents, num_classes), range(len(parents))
    expected = torch.tensor([[brute_distance(parents, a, b) for b in nodes] for a in nodes])
    assert torch.equal(tree.distances_VV, expected)
    assert torch.equal(tree_distances(tree.ancestors_VV), expected)


@pytest.mark.parametrize(("parents", "num_classes"), CASES)
def test_triplets(parents: list[int], num_classes: int) -> None:
    tree = TreeTables(parents, num_classes)
    generator = torch.Generator().manual_seed(0)
    emb = torch.randn(3, 300, 6, generator=generator, dtype=torch.double, requires_grad=True)
    labels = torch.randint(-1, len(parents), (3, 300), generator=generator)
    got = tree_triplet_loss(emb, labels, tree)
    terms = []
    for t in range(300):
        i, j, k = labels[:, t].tolist()
        if min(i, j, k) < 0 or max(i, j, k) >= num_classes:
            continue
        near, far = brute_distance(parents, i, j), brute_distance(parents, i, k)
        if near == far:
            continue
        positive, negative = (emb[1, t], emb[2, t]) if near < far else (emb[2, t], emb[1, t])

        def distance(a: Tensor, b: Tensor) -> Tensor:
            return (1 - torch.dot(a, b) / (a.norm() * b.norm())) / 2

        height = max(len(above(parents, v)) for v in range(len(parents)))
        margin = 0.1 + 0.5 * abs(far - near) / (2 * height)
        terms.append((distance(emb[0, t], positive) - distance(emb[0, t], negative) + margin).clamp(min=0))
    expected = torch.stack(terms).mean()
    assert len(terms) > 3
    assert_close_report(got.detach(), expected.detach(), "loss", atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, emb)[0] for loss in (got, expected))
    assert_close_report(ours, theirs, "gradient", "", atol=1e-12)


def test_no_triplet_gives_zero() -> None:
    tree = TreeTables([2, 2, -1], 2)
    emb = torch.randn(3, 4, 5, requires_grad=True)
    loss = tree_triplet_loss(emb, torch.tensor([[0, -1, 2, 1]] * 3), tree)
    loss.backward()
    assert loss == 0
    assert emb.grad is not None
    assert emb.grad.abs().max() == 0


def test_triples_are_drawn_of_all_classes_alike() -> None:
    labels = torch.tensor([0] * 900 + [2] * 30 + [-1] * 50 + [5] * 20 + [3] * 10)[torch.randperm(1010)]
    drawn = draw_triplets(labels, 5, 3000, 0, 7, torch.tensor([3, 4]))
    shares = [(labels[drawn] == c).double().mean().item() for c in (0, 2, 3)]
    assert max(abs(share - 1 / 3) for share in shares) < 0.02
    assert len(drawn[0].unique()) > 500, "different pixels"
    again = draw_triplets(labels, 5, 3000, 0, torch.tensor(7), torch.tensor([3, 4]))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, draw_triplets(labels, 5, 3000, 0, 8, torch.tensor([3, 4])))


def test_nothing_labelled_can_be_drawn_from() -> None:
    drawn = draw_triplets(torch.full((7,), -1), 5, 10, 0, 0, torch.tensor([1]))
    assert drawn.shape == (3, 10)
    assert (drawn < 7).all()
