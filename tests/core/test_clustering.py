"""The maths of prototypes against brute force."""

import pytest
import torch
from helpers import (
    SIZES,
    assert_close_report,
    brute_sinkhorn,
    brute_update,
    case,
    run_ranks,
    unit_vectors,
)

from protoseg.core import clustering
from protoseg.core.clustering import assign, cluster_means, sinkhorn
from protoseg.core.health import dead_prototypes, health
from protoseg.core.pixel_scores import log_sum_exp, prototype_scores
from protoseg.core.similarity import class_scores, own_similarities, unit
from protoseg.core.start import start_prototypes
from protoseg.core.update import momentum_update


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kappa", [0.05, 0.03, 0.005])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_is_the_class_by_class_one(sizes, kappa, iterations, monkeypatch):
    n, d, c, k = sizes
    emb, protos, labels = case(n, d, c, k)
    own = own_similarities(emb, protos, labels)
    expected = brute_sinkhorn(own, labels, c, kappa, iterations)
    for dtype, atol in ((torch.double, 1e-9), (torch.float32, 3e-4)):
        for below in (0.03, 1.0) + ((0.0,) if kappa >= 0.03 else ()):  # which of the two ways
            monkeypatch.setattr(clustering, "LOG_DOMAIN_BELOW", below)
            got = sinkhorn(own.to(dtype), labels, c, kappa, iterations)
            assert got.dtype == dtype
            assert_close_report(got, expected, f"plan, logarithms below {below}", "NK", atol)


def test_sinkhorn_shares_pixels_equally_and_promotes_half():
    emb, protos, _ = case(400, 8, 2, 4)
    labels = torch.arange(400) % 2
    plan = sinkhorn(own_similarities(emb, protos, labels), labels, 2, iterations=200)
    for c in range(2):
        assert_close_report(plan[labels == c].sum(0), torch.full((4,), 50.0), "marginal", "K", 1e-3)
    half = sinkhorn(torch.ones(400, 4, dtype=torch.bfloat16), labels, 2)
    assert half.dtype == torch.float32
    assert_close_report(half, torch.full((400, 4), 0.25), "plan of identical pixels", "NK")


@pytest.mark.parametrize("sizes", SIZES)
def test_assign_means_and_update(sizes):
    n, d, c, k = sizes
    emb, protos, labels = case(n, d, c, k)
    plan = sinkhorn(own_similarities(emb, protos, labels), labels, c)
    assignment = assign(plan, labels)
    assert torch.equal(assignment, torch.where(labels < 0, -1, plan.argmax(1)))
    means, counts = cluster_means(emb, labels, assignment, c, k)
    for cls in range(c):
        for j in range(k):
            mine = (labels == cls) & (assignment == j)
            assert counts[cls, j] == mine.sum()
            expected = emb[mine].mean(0) if mine.any() else torch.zeros(d, dtype=emb.dtype)
            assert_close_report(means[cls, j], expected, f"mean of class {cls}, prototype {j}", "D", 1e-12)
    got = momentum_update(protos, means, counts, 0.9)
    assert_close_report(got, brute_update(protos, emb, labels, assignment, 0.9), "update", "CKD", 1e-12)
    assert torch.equal(got[counts == 0], protos[counts == 0])


def test_opposite_pixels_leave_their_prototype_where_it_is():
    emb = torch.tensor([[1.0, 0], [-1.0, 0]])
    protos = torch.tensor([[[0.0, 1]]])
    means, counts = cluster_means(
        emb, torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), 1, 1
    )
    assert torch.equal(momentum_update(protos, means, counts, 0.5), protos)


def modes(seed, noise=0.3, classes=2, count=10, per=60, dim=64):
    """Embeddings around `count` separate modes per class; returns them, labels, and modes."""
    generator = torch.Generator().manual_seed(seed)
    centres = unit_vectors(classes, count, dim, seed=seed)
    labels = torch.arange(classes).repeat_interleave(count * per)
    mode = torch.arange(count).repeat_interleave(per).repeat(classes)
    noisy = centres[labels, mode] + noise * torch.randn(len(labels), dim, generator=generator) / dim**0.5
    order = torch.randperm(len(labels), generator=generator)
    return unit(noisy)[order], labels[order], mode[order]


@pytest.mark.parametrize("noise", [0.3, 0.7])
def test_data_start_finds_ten_modes_in_twenty_of_twenty_seeds(noise):
    for seed in range(20):
        emb, labels, mode = modes(seed, noise)
        protos, placed = start_prototypes(
            emb, labels, unit_vectors(2, 10, 64, seed=seed + 99), torch.ones(2, 10, dtype=torch.bool)
        )
        assert placed.all()
        nearest = own_similarities(emb, protos, labels).argmax(1)
        for c in range(2):
            table = torch.zeros(10, 10)
            mine = labels == c
            table.index_put_((nearest[mine], mode[mine]), torch.ones(int(mine.sum())), accumulate=True)
            assert table.amax(1).sum() / table.sum() >= 0.99, f"purity, seed {seed} class {c}"
            cosine = protos[c] @ protos[c].t() - 2 * torch.eye(10)
            assert cosine.max() <= 0.95, f"seed {seed} class {c}"


def test_fewer_pixels_than_prototypes_start_apart():
    emb = unit_vectors(2, 8)
    protos, _ = start_prototypes(
        emb, torch.zeros(2, dtype=torch.long), unit_vectors(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    )
    assert protos.isfinite().all()
    assert (protos[0] @ protos[0].t() - 2 * torch.eye(5)).max() < 1 - 1e-4
    assert torch.equal(protos[1:], unit_vectors(3, 5, 8)[1:])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kappa", [0.05, 0.01])
def test_ranks_agree_with_one_process(world, kappa):
    emb, protos, labels = case(61, 6, 5, 4)
    own = own_similarities(emb, protos, labels)
    wanted = torch.ones(5, 4, dtype=torch.bool)
    wanted[1, 2:] = False
    one = sinkhorn(own, labels, 5, kappa), start_prototypes(emb, labels, protos, wanted)[0]
    bounds = [0, 3, 40, 61] if world == 3 else [0, 7, 61]

    def work(rank, all_reduce):
        part = slice(bounds[rank], bounds[rank + 1])
        plan = sinkhorn(own[part], labels[part], 5, kappa, all_reduce=all_reduce)
        return plan, start_prototypes(emb[part], labels[part], protos, wanted, all_reduce=all_reduce)[0]

    results = run_ranks(world, work)
    assert_close_report(torch.cat([plan for plan, _ in results]), one[0], "plan", "NK", 1e-9)
    for _, started in results:
        assert_close_report(started, one[1], "start", "CKD", 1e-9)


def test_health_by_hand():
    protos = torch.tensor([[[1.0, 0], [0, 1]], [[1.0, 0], [1, 0]]])
    got = health(
        protos,
        torch.tensor([[5.0, 5.0], [8.0, 0.0]]),
        torch.tensor([[10.0, 0.0], [3.0, 3.0]]),
        torch.tensor([5.0, 6.0]),
        torch.tensor([[0.1, 0.3], [0.0, 0.0]]),
        torch.tensor([True, True]),
    )
    plain = got.to_plain()
    assert plain["effective_k"] == pytest.approx([2.0, 1.0])
    assert plain["in_use"] == pytest.approx([1.0, 2.0])
    assert plain["mean_intra_cosine"] == pytest.approx([0.0, 1.0])
    assert plain["agreement"] == pytest.approx([0.5, 1.0])
    assert plain["dead"] == [1.0, 0.0]
    assert plain["churn"] == pytest.approx([0.2, 0.0])
    nearest = torch.tensor([[96.0, 4.0], [94.0, 6.0], [0.0, 0.0]])  # a tenth of an equal share is 5
    assert dead_prototypes(nearest).tolist() == [[False, True], [False, False], [False, False]]
    assert not dead_prototypes(torch.tensor([[7.0], [0.0]])).any()


def pipeline(emb, protos, labels, kappa=0.05):
    """Every free function in turn: names and results."""
    classes, count, _ = protos.shape
    own = own_similarities(emb, protos, labels)
    plan = sinkhorn(own, labels, classes, kappa)
    assignment = assign(plan, labels)
    means, counts = cluster_means(emb, labels, assignment, classes, count)
    started, placed = start_prototypes(
        emb, labels, protos, torch.ones(classes, count, dtype=torch.bool), kappa
    )
    results = {"own": own, "plan": plan, "means": means, "counts": counts, "start": started}
    live, features = torch.ones(classes, dtype=torch.bool), emb.t()[None, :, None]
    scale, offset = torch.ones(classes), torch.zeros(classes)
    results |= prototype_scores(features, protos, labels.long(), live, scale, offset)._asdict()
    results |= {"class_scores": class_scores(emb, protos), "lse": log_sum_exp(emb, protos, 0.1)}
    results |= {"update": momentum_update(protos, means, counts, 0.9)}
    usage = torch.ones(classes, count, dtype=started.dtype)
    alive = torch.ones(classes, dtype=torch.bool)
    results |= health(protos.to(usage.dtype), usage, usage, usage[:, 0], usage, alive)._asdict()
    return results | {"assignment": assignment, "placed": placed}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.double])
@pytest.mark.parametrize("kappa", [0.05, 0.01])
def test_half_types_are_promoted_and_double_is_kept(dtype, kappa):
    emb, protos, labels = case(60, 8, 4, 3, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    got, expected = (pipeline(*(x.to(t) for x in (emb, protos)), labels, kappa) for t in (dtype, wide))
    for name, value in got.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
        if value.is_floating_point():
            assert value.dtype == wide, name


@pytest.mark.parametrize("kappa", [0.05, 0.01])
def test_autocast_label_types_and_strides_change_nothing(kappa):
    emb, protos, labels = case(60, 8, 4, 3, torch.float32)
    expected = pipeline(emb, protos, labels, kappa)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (emb, protos)]
    assert not strided[0].is_contiguous()
    shown = labels.repeat_interleave(2)[::2]
    variants = {"strides": (*strided, shown), "int32": (emb, protos, labels.int())}
    variants |= {"int16": (emb, protos, labels.short())}
    for variant, arguments in variants.items():
        for name, value in pipeline(*arguments, kappa).items():
            assert_close_report(value, expected[name], f"{name}, {variant}", atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        got = pipeline(emb, protos, labels, kappa)
    for name, value in got.items():
        assert torch.equal(value, expected[name]), f"{name} under autocast"


HOSTILE = {
    "no pixel": (torch.zeros(0, 8), []),
    "one pixel": (unit_vectors(1, 8), [1]),
    "all ignored": (unit_vectors(5, 8), [-1] * 5),
    "fewer pixels than K": (unit_vectors(5, 8), [0, 0, 1, -1, 1]),
    "identical embeddings": (unit_vectors(1, 8).expand(6, 8), [2] * 6),
    "opposite embeddings": (torch.cat([unit_vectors(3, 8), -unit_vectors(3, 8)]), [1] * 6),
    "no direction": (torch.zeros(5, 8), [0, 1, 1, 1, -1]),
    "one class only": (unit_vectors(40, 8), [1] * 40),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(("classes", "count"), [(4, 3), (4, 1), (4, 50)])
@pytest.mark.parametrize("kappa", [0.05, 0.03, 0.001])
def test_hostile_pixels_give_numbers_and_leave_absent_classes_alone(name, classes, count, kappa):
    emb, labels = HOSTILE[name][0], torch.tensor(HOSTILE[name][1], dtype=torch.long)
    protos = unit_vectors(classes, count, 8, seed=3)
    got = pipeline(emb, protos, labels, kappa)
    for key, value in got.items():
        known = value if count > 1 else value.nan_to_num() if "intra" in key else value
        assert known.isfinite().all(), key
    absent = [c for c in range(classes) if c not in HOSTILE[name][1]]
    for key in ("start", "update"):
        assert torch.equal(got[key][absent], protos[absent]), f"{key}: an absent class changed"
        assert_close_report(got[key].norm(dim=-1), torch.ones(classes, count), f"length, {key}", "CK", 1e-5)
    assert not got["placed"][absent].any()
    rows = got["plan"].sum(1)
    assert_close_report(rows, (labels >= 0).float(), "row sums of the plan", "N", 1e-5)


def test_exp_domain_below_its_range_gives_no_nan(monkeypatch):
    monkeypatch.setattr(clustering, "LOG_DOMAIN_BELOW", 0.0)
    own = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kappa in (0.02, 0.01, 0.001):
        assert sinkhorn(own, torch.arange(50) % 4, 4, kappa).isfinite().all()
