"""The maths of prototypes against brute force."""

import pytest
import torch
from helpers import (
    assert_close_report,
    brute_scores,
    brute_sinkhorn,
    brute_update,
    run_ranks,
    unit_vectors,
)

from protoseg.core import similarity as scores
from protoseg.core.clustering import assign, cluster_means, momentum_update, sinkhorn, start_prototypes
from protoseg.core.health import health
from protoseg.core.similarity import (
    class_scores,
    map_scores,
    own_similarities,
    prototype_scores,
    unit,
    unit_rows,
)

SIZES = [(23, 5, 4, 3), (7, 3, 1, 4), (9, 4, 3, 1), (1, 2, 2, 2), (5, 2, 1, 1), (40, 6, 3, 10)]  # N D C K


def case(n, d, c, k, dtype=torch.double, seed=0):
    emb, protos = (
        unit_vectors(n, d, seed=seed, dtype=dtype),
        unit_vectors(c, k, d, seed=seed + 1, dtype=dtype),
    )
    labels = torch.randint(-1, c, (n,), generator=torch.Generator().manual_seed(seed))
    return emb, protos, labels


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("all_live", [True, False])
@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_scores_and_their_gradient(sizes, chunk_size, all_live, as_on_gpu, monkeypatch):
    if as_on_gpu:  # takes the branches for a GPU, here on the CPU
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    if chunk_size:
        monkeypatch.setattr(scores, "GATHERED_BYTES", 8 * 2 * sizes[1] * sizes[3])  # two classes at a time
    emb, protos, labels = case(*sizes)
    live = torch.ones(sizes[2], dtype=torch.bool)
    if not all_live and sizes[2] > 1:
        live[0] = False
    emb.requires_grad_()
    got = prototype_scores(emb, protos, labels, 0.1, live, scale=7, not_live=-30, chunk_size=chunk_size)
    expected = brute_scores(emb, protos, labels, 0.1, live)
    logits = torch.where(live, 7 * expected[0], -30)
    for name, a, b, axes in zip(got._fields, got, (logits, *expected[1:]), ("NC", "NK", "N")):
        assert_close_report(a, b, name, axes, 1e-12)
        weight = torch.randn(a.shape, generator=torch.Generator().manual_seed(3), dtype=a.dtype)
        grads = [
            torch.autograd.grad((x * weight).sum(), emb, retain_graph=True, allow_unused=True)[0]
            for x in (a, b)
        ]
        assert_close_report(
            grads[0], torch.zeros_like(emb) if grads[1] is None else grads[1], name, "ND", 1e-11
        )
    for grad in (True, False):  # two ways of putting the chunks together
        with torch.set_grad_enabled(grad):
            best = class_scores(emb, protos, live, chunk_size=chunk_size)
        assert_close_report(best, expected[0], "class_scores", "NC", 1e-12)


def test_scores_gradcheck():
    emb, protos, labels = case(11, 5, 4, 3)
    assert torch.autograd.gradcheck(
        lambda x: tuple(prototype_scores(x, protos, labels, chunk_size=4)), emb.requires_grad_()
    )
    maps = torch.randn(2, 5, 3, 4, dtype=torch.double, requires_grad=True)
    labels = torch.randint(-1, 4, (24,))
    assert torch.autograd.gradcheck(lambda x: tuple(map_scores(x, protos, labels, chunk_size=5)[:3]), maps)
    for given in (maps, maps.detach()):  # two ways
        expected = unit(given.permute(0, 2, 3, 1).reshape(-1, 5))
        assert_close_report(unit_rows(given), expected, "unit_rows", "ND", 1e-15)


@pytest.mark.parametrize("temperature", [0.1, 0.002])  # without and with a shift before the exponentials
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 12, 30, 100])  # parts of an image, images, all
@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_scores_of_a_map_are_those_of_its_unit_rows(temperature, chunk_size, as_on_gpu, monkeypatch):
    if as_on_gpu:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    _, protos, _ = case(1, 5, 4, 3)
    features = torch.randn(3, 5, 4, 3, dtype=torch.double)
    features[0, :, 0, 0] = 0
    features[1, :, 0, 0] = 1e-9
    labels = torch.randint(-1, 4, (36,))
    live = torch.tensor([True, True, False, True])
    options = {"scale": 7.0, "not_live": -30.0, "chunk_size": chunk_size}
    grads = []
    for of_map in (True, False):
        x = features.clone().requires_grad_()
        if of_map:
            scores = map_scores(x, protos, labels, temperature, live, **options)
            assert torch.equal(scores.emb_ND, unit_rows(features))
            assert not scores.emb_ND.requires_grad
            results = (scores.classes, *scores[1:3])
        else:
            classes, *others = prototype_scores(unit_rows(x), protos, labels, temperature, live, **options)
            results = (classes.view(3, 4, 3, 4).permute(0, 3, 1, 2), *others)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (result * torch.randn(result.shape, generator=generator, dtype=result.dtype)).sum()
            for result in results
        )
        grads.append((*results, *torch.autograd.grad(loss, x)))
    for name, mine, plain in zip(("classes", "own", "lse", "gradient"), *grads):
        relative = (mine - plain).abs() / plain.abs().clamp(min=1)
        assert relative.max() < 1e-10, name


def test_scores_of_half_maps_come_in_single_and_their_gradient_in_half():
    _, protos, _ = case(1, 8, 4, 3, torch.float32)
    features = torch.randn(2, 8, 4, 3).bfloat16().requires_grad_()
    labels = torch.randint(-1, 4, (24,))
    half = map_scores(features, protos, labels)
    single = map_scores(features.float(), protos, labels)
    for mine, plain in zip(half, single):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, plain)
    half.classes.square().sum().backward()
    assert features.grad.dtype == torch.bfloat16


def test_the_gradient_is_that_of_the_embedding_and_only_once():
    emb, protos, labels = case(20, 8, 4, 3, torch.float32)
    features = emb.t().reshape(1, 8, 4, 5)
    learnable = protos.clone().requires_grad_()
    assert not map_scores(features, learnable, labels).classes.requires_grad
    assert not prototype_scores(emb, learnable, labels).classes_NC.requires_grad

    x = features.clone().requires_grad_()
    value = map_scores(x, protos, labels).log_sum_exp_N.square().sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_autocast_around_backward_changes_nothing():
    emb, protos, labels = case(20, 8, 4, 3, torch.float32)
    grads = []
    for enabled in (False, True):
        x = emb.t().reshape(1, 8, 4, 5).clone().requires_grad_()
        value = map_scores(x, protos, labels).classes.square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(value, x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("length", [1e-3, 1e3])
def test_rows_of_any_length_stay_finite(length):
    emb, protos, labels = case(20, 8, 4, 3, torch.float32)
    emb = (emb * length).requires_grad_()
    for temperature in (0.1, 0.001):
        scores = prototype_scores(emb, protos, labels, temperature)
        sum(x.sum() for x in scores).backward()
        assert all(x.isfinite().all() for x in (*scores, emb.grad))


@pytest.mark.parametrize("of_map", [False, True])
def test_scores_in_single_are_as_exact_as_the_plain_version(of_map):
    emb, protos, labels = case(500, 64, 20, 10)

    def ours(x, protos):
        if not of_map:
            return prototype_scores(x, protos, labels).log_sum_exp_N
        return map_scores(x.t().view(1, 64, 20, 25), protos, labels).log_sum_exp_N

    def plain(x, protos):
        x = unit(x) if of_map else x
        return (torch.einsum("nd,ckd->nck", x, protos) / 0.1).flatten(1).logsumexp(1)

    def value_and_gradient(function, dtype):
        x = emb.to(dtype, copy=True).requires_grad_()
        value = function(x, protos.to(dtype))
        return value, torch.autograd.grad(value.sum(), x)[0]

    truth = value_and_gradient(plain, torch.double)
    for mine, naive, true in zip(
        value_and_gradient(ours, torch.float32), value_and_gradient(plain, torch.float32), truth
    ):
        assert (mine - true).abs().max() <= (naive - true).abs().max() + 2e-6


def test_score_dtype_leaves_own_similarities_exact():
    emb, protos, labels = case(50, 32, 6, 3, torch.float32)
    half = prototype_scores(emb, protos, labels, score_dtype=torch.bfloat16)
    full = prototype_scores(emb, protos, labels)
    assert half.classes_NC.dtype == torch.float32
    assert_close_report(half.own_NK, full.own_NK, "own", "NK")
    assert_close_report(half.classes_NC, full.classes_NC, "classes", "NC", 2e-2)
    assert (half.classes_NC - full.classes_NC).abs().max() > 1e-5


def test_prototypes_that_tie_share_one_gradient():
    emb, protos, labels = case(6, 4, 2, 1)
    twice = protos.repeat(1, 3, 1)
    grads = []
    for p in (protos, twice):
        x = emb.clone().requires_grad_()
        prototype_scores(x, p, labels).classes_NC.sum().backward()
        grads.append(x.grad)
    assert_close_report(grads[1], grads[0], "gradient", "ND", 1e-12)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kappa", [0.05, 0.03, 0.005])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_is_the_class_by_class_one(sizes, kappa, iterations):
    n, d, c, k = sizes
    emb, protos, labels = case(n, d, c, k)
    own = own_similarities(emb, protos, labels)
    expected = brute_sinkhorn(own, labels, c, kappa, iterations)
    for dtype, atol in ((torch.double, 1e-9), (torch.float32, 3e-4)):
        for log_domain in (None, True) + ((False,) if kappa >= 0.03 else ()):
            got = sinkhorn(own.to(dtype), labels, c, kappa, iterations, log_domain=log_domain)
            assert got.dtype == dtype
            assert_close_report(got, expected, f"plan, log_domain={log_domain}", "NK", atol)


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


def test_two_dimensional_classes_by_hand():
    """Prototypes at 0° and 90° (class 0), 180° and 270° (class 1); a pixel at 60° is nearest 90°."""
    angles = torch.tensor([[0.0, 90.0], [180.0, 270.0]]).deg2rad()
    protos = torch.stack([angles.cos(), angles.sin()], -1)
    emb = torch.tensor([[0.5, 3**0.5 / 2]])
    scores = prototype_scores(emb, protos, torch.tensor([0]))
    assert_close_report(scores.classes_NC, torch.tensor([[3**0.5 / 2, -0.5]]), "scores", "NC")
    assert_close_report(scores.own_NK, torch.tensor([[0.5, 3**0.5 / 2]]), "own", "NK")


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
        torch.tensor([[0, 0], [0, 100]]),
        torch.tensor([[0.1, 0.3], [0.0, 0.0]]),
        torch.tensor([True, True]),
        100,
    )
    plain = got.to_plain()
    assert plain["effective_k"] == pytest.approx([2.0, 1.0])
    assert plain["in_use"] == pytest.approx([1.0, 2.0])
    assert plain["mean_intra_cosine"] == pytest.approx([0.0, 1.0])
    assert plain["dead"] == [0.0, 1.0]
    assert plain["churn"] == pytest.approx([0.2, 0.0])


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
    results |= prototype_scores(emb, protos, labels)._asdict()
    results |= {"class_scores": class_scores(emb, protos)}
    results |= {"update": momentum_update(protos, means, counts, 0.9)}
    usage = torch.ones(classes, count, dtype=started.dtype)
    alive = torch.ones(classes, dtype=torch.bool)
    results |= health(protos.to(usage.dtype), usage, usage, usage.long(), usage, alive, 5)._asdict()
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


def test_exp_domain_below_its_range_gives_no_nan():
    own = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kappa in (0.02, 0.01, 0.001):
        assert sinkhorn(own, torch.arange(50) % 4, 4, kappa, log_domain=False).isfinite().all()
