"""Classes added, removed, merged and clustered anew without a gradient step."""

import pytest
import torch
from helpers import assert_close_report, run_ranks, unit_vectors

from protoseg.core.prototypes import PrototypeHead
from protoseg.core.similarity import unit


def scene(classes, seed=0, noise=0.3, dim=16, per_class=40):
    """Pixels around three directions per class, as a one-row map, the same directions for every seed."""
    generator = torch.Generator().manual_seed(seed)
    centres = unit_vectors(6, 3, dim, seed=77)
    labels = torch.tensor(list(classes)).repeat_interleave(per_class)
    mode = torch.arange(len(labels)) % 3
    pixels = centres[labels, mode] + noise * torch.randn(len(labels), dim, generator=generator) / dim**0.5
    return pixels.t().view(1, dim, 1, -1), labels.view(1, 1, -1)


def accuracy(head, features, labels):
    return (head(features).argmax(1) == labels).double().mean().item()


def trained(classes, **options):
    torch.manual_seed(0)
    head = PrototypeHead(16, len(classes), 3, **options)
    head.prepare_(*scene(classes))
    return head


def test_a_class_is_added_from_a_mask_or_from_labels_and_old_ones_stay():
    features, labels = scene(range(4), seed=1)
    for chosen in (labels, labels == 3):
        head = trained(range(3), score_norm="layer_norm")
        before = head.prototypes.clone()
        assert head.add_class(features, chosen) == 3
        assert torch.equal(head.prototypes[:3], before)
        assert accuracy(head, *scene(range(4), seed=2)) == 1
        assert head.norm_weight.shape == (4,)
    with pytest.raises(ValueError, match="no pixel is labelled as the new class 4"):
        head.add_class(features, labels)


def test_remove_and_merge_move_ids_down():
    head = trained(range(4))
    head.remove_class(1)
    features, labels = scene([0, 2, 3], seed=1)
    assert accuracy(head, features, torch.tensor([0, -1, 1, 2])[labels]) == 1
    head = trained(range(4))
    head.merge_classes(0, 2)
    assert head.num_classes == 3
    features, labels = scene(range(4), seed=1)
    assert accuracy(head, features, torch.tensor([0, 1, 0, 2])[labels]) > 0.8
    for call in (lambda: head.remove_class(3), lambda: head.merge_classes(0, 7)):
        with pytest.raises(ValueError, match=r"no class \d, ids are 0 to 2"):
            call()
    with pytest.raises(ValueError, match="the same class"):
        head.merge_classes(1, 1)


def test_number_of_prototypes_changes_with_and_without_data():
    for data in ((), scene(range(4))):
        head = trained(range(4))
        for count in (7, 2, 3):
            head.set_num_prototypes(count, *data)
            assert head.prototypes.shape == (4, count, 16)
            assert torch.allclose(head.prototypes.norm(dim=-1), torch.ones(4, count))
            cosine = head.prototypes @ head.prototypes.mT - 2 * torch.eye(count)
            assert cosine.max() < 0.9999, "prototypes coincide"
        assert accuracy(head, *scene(range(4), seed=1)) > (0.95 if data else 0.6)
        out = head.training_step(*scene(range(4)))
        head.update_(out)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        head.set_num_prototypes(0)


def test_refit_starts_what_has_no_prototypes_and_leaves_absent_classes():
    head = trained(range(4), start="random")
    head.prototypes.copy_(unit_vectors(4, 3, 16, seed=5))
    head.initialized[:3] = False
    before = head.prototypes.clone()
    head.refit([scene(range(3), seed=s) for s in (1, 2)])
    assert torch.equal(head.prototypes[3], before[3])
    assert accuracy(head, *scene(range(3), seed=3)) == 1
    assert (head.usage[:3].sum(1) == 80).all(), "the pixels of the last round"
    assert torch.equal(head.nearest_usage, head.usage), "they are the pixels of the nearest prototype"
    assert (head.health().agreement[:3] == 1).all()
    assert not head.movement[:3].any()


@pytest.mark.parametrize("rule", ["correct", "all"])
def test_refit_moves_prototypes_to_the_mean_of_the_nearest_pixels_of_the_rule(rule):
    features, labels = scene(range(4), noise=2.0)
    head = trained(range(4), update_pixels=rule)
    expected = head.prototypes.clone()
    pixels = unit(features[0, :, 0].t())
    for _ in range(2):
        cosines = torch.einsum("nd,ckd->nck", pixels, expected)
        right = cosines.amax(2).argmax(1) == labels.flatten()
        assert 0 < right.sum() < len(right)
        for c in range(4):
            mine = labels.flatten() == c
            nearest = cosines[:, c].argmax(1)
            for k in range(3):
                moves = mine & (nearest == k) & (right | (rule == "all"))
                if moves.any():
                    expected[c, k] = unit(pixels[moves].mean(0))
    head.refit([(features, labels)], rounds=2)
    assert_close_report(head.prototypes, expected, "prototypes", "CKD", 1e-5)


@pytest.mark.parametrize("score_norm", ["scale", "layer_norm"])
def test_an_edited_head_loads_into_one_made_for_fewer_or_more_classes(score_norm):
    head = trained(range(3), score_norm=score_norm)
    head.add_class(*scene(range(4), seed=1))
    features, _ = scene(range(4))
    for count in (2, 4, 7):
        fresh = PrototypeHead(16, count, 3, score_norm=score_norm)
        fresh.resize_(4)
        assert not fresh.initialized.any()
        fresh.load_state_dict(head.state_dict())
        assert torch.equal(fresh(features), head(features))


def edits(head, features, labels, all_reduce=None):
    """Every edit in turn."""
    head.all_reduce = all_reduce
    head.add_class(features, labels)
    head.set_num_prototypes(5)
    head.set_num_prototypes(4, features, labels)
    head.merge_classes(0, 2)
    head.remove_class(1)
    head.refit([(features, labels)])
    return head.prototypes


def test_ranks_edit_alike_and_like_one_process():
    parts = [scene(range(4), seed=1), scene([3, 0], seed=2, per_class=7), scene([1, 2], seed=3)]
    joined = [torch.cat(pieces, -1) for pieces in zip(*parts)]
    one = edits(trained(range(3)).double(), joined[0].double(), joined[1])

    def work(rank, all_reduce):
        torch.manual_seed(rank)  # as in training, where dropout differs between ranks
        return edits(heads[rank], parts[rank][0].double(), parts[rank][1], all_reduce)

    heads = [trained(range(3)).double() for _ in range(3)]
    for mine in run_ranks(3, work):
        assert_close_report(mine, one, "prototypes", "CKD", 1e-9)


def test_autocast_changes_no_edit():
    plain = edits(trained(range(3)), *scene(range(4), seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edits(trained(range(3)), *scene(range(4), seed=1)), plain)


def test_what_cannot_be_edited_is_named():
    head = trained(range(3), ignore_index=3)
    with pytest.raises(ValueError, match="the new class would be 3, which is the ignore index"):
        head.add_class(*scene(range(4)))
    with pytest.raises(ValueError, match="several times; give a list or a loader"):
        head.refit(part for part in [scene(range(3))])
    with pytest.raises(ValueError, match="refit: at least 1 round, got 0"):
        head.refit([scene(range(3))], rounds=0)


def test_refit_takes_all_batches_of_a_round_as_one_step():
    features, labels = scene(range(4), noise=2.0)
    heads = [trained(range(4)) for _ in range(2)]
    heads[0].prototypes[3] = heads[1].prototypes[3] = -unit(features[0, :, 0, -3:].t())  # few pixels right
    few = [(part, label) for part, label in zip(features.split(10, 3), labels.split(10, 2))]
    with_right = [(head_out.right & (label == 3)).any() for head_out, label in (
        (heads[0].training_step(part, label), label) for part, label in few
    )]  # fmt: skip
    assert any(with_right)
    assert not all(right for right, (_, label) in zip(with_right, few) if (label == 3).any())
    heads[0].refit([(features, labels)])
    heads[1].refit(few)
    assert_close_report(heads[1].prototypes, heads[0].prototypes, "prototypes", "CKD", 1e-5)
    assert torch.equal(heads[1].usage, heads[0].usage)


def shares(head):
    return head.log_prior().exp().tolist()


def counted(classes, count):
    """A head that has seen so many pixels of each class."""
    head = trained(classes)
    head.pixel_counts.fill_(count)
    return head


def test_an_added_class_gets_the_share_of_its_pixels_or_the_one_given():
    features, labels = scene(range(4), seed=1)
    for options, expected in (
        ({}, [0.25] * 4),  # 40 of the 160 labelled pixels
        ({"share": 0.1}, [0.3, 0.3, 0.3, 0.1]),
    ):
        for head in (counted(range(3), 1e7), trained(range(3))):
            head.add_class(features, labels, **options)
            assert shares(head) == pytest.approx(expected, abs=1e-5)
    head = counted(range(3), 1e7)
    head.add_class(features, torch.where(labels == 0, -1, labels))  # they take no part
    assert shares(head)[3] == pytest.approx(40 / 120, abs=1e-5)
    for share in (0, 1, 1.5):
        with pytest.raises(ValueError, match=f"share must be above 0 and below 1, got {share}"):
            head.add_class(features, labels == 1, share)
    assert head.num_classes == 4


def test_where_only_the_new_class_is_labelled_its_share_is_equal_and_old_ones_are_still_found():
    features, labels = scene(range(4), seed=1)
    for chosen in (torch.where(labels == 3, 3, 255), torch.where(labels == 3, 3, -1)):
        head = counted(range(3), 1e7)
        head.add_class(features, chosen)
        assert shares(head) == pytest.approx([0.25] * 4, abs=1e-5)
        assert accuracy(head, *scene(range(4), seed=2)) == 1
    head = counted(range(3), 1e7)
    cut_out = features[..., labels[0, 0] == 3]
    head.add_class(cut_out, torch.ones(1, *cut_out.shape[2:], dtype=torch.bool))
    assert shares(head) == pytest.approx([0.25] * 4, abs=1e-5)


@pytest.mark.parametrize("edit", ["refit", "set_num_prototypes"])
def test_classes_that_an_edit_starts_get_their_share_of_the_labels(edit):
    head = counted(range(4), 1e7)
    head.initialized[3] = False
    head.pixel_counts[3] = 0
    data = scene([0, 1, 2, 3, 3], seed=1)
    head.refit([data]) if edit == "refit" else head.set_num_prototypes(3, *data)
    assert shares(head) == pytest.approx([0.2, 0.2, 0.2, 0.4], abs=1e-5)
    assert accuracy(head, *scene(range(4), seed=2)) == 1
    fresh = PrototypeHead(16, 4, 3)
    fresh.refit([data])
    assert shares(fresh) == pytest.approx([0.2, 0.2, 0.2, 0.4], abs=1e-5)


def test_edited_classes_take_their_counts_along():
    head = trained(range(4))
    head.pixel_counts.copy_(torch.tensor([1.0, 2, 4, 8]))
    head.merge_classes(0, 2)
    assert head.pixel_counts.tolist() == [5, 2, 8]
    head.remove_class(1)
    assert head.pixel_counts.tolist() == [5, 8]
