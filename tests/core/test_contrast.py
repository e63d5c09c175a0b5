"""Pixel contrast against Eq. 3 written as loops, and its samplers on similarities of known order."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor

from protoseg.core.contrast import PixelContrast, ProjectionHead, pixel_contrast_loss, uniformity
from protoseg.core.contrast_sampling import balanced_pool, select_anchors, select_pairs
from protoseg.core.draws import class_map, pixel_keys, sort_groups

IGNORE, TAU, DIM, CLASSES, IMAGES = 255, 0.1, 8, 4, 6
ALL = 10_000  # more than there are


def eq3(anchor: Tensor, positives: Tensor, negatives: Tensor, tau: float = TAU) -> Tensor:
    """Eq. 3 of one anchor, one positive after the other."""
    terms = []
    for positive in positives:
        own = torch.exp(anchor @ positive / tau)
        terms.append(-torch.log(own / (own + torch.exp(negatives @ anchor / tau).sum())))
    return torch.stack(terms).mean()


def make_batch(images: int = 3, size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    emb = F.normalize(torch.randn(images, DIM, size, size, generator=generator, dtype=dtype), dim=1)
    labels = torch.randint(0, CLASSES, (images, size, size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.15] = IGNORE
    predictions = torch.randint(0, CLASSES, labels.shape, generator=generator)
    return emb, labels, predictions, torch.randperm(IMAGES, generator=generator)[:images]


def build(**change) -> PixelContrast:
    """Of unit vectors, unless `channels` are given, which are projected."""
    given = {"channels": DIM, "project": "channels" in change, "dim": DIM, "memory_size": 7}
    return PixelContrast(**{**given, "num_classes": CLASSES, "num_images": IMAGES, **change})


def filled(steps: int = 3, **change) -> PixelContrast:
    contrast = build(**change)
    for step in range(steps):
        emb, labels, _, indices = make_batch(seed=100 + step)
        contrast.enqueue_(emb, labels, indices, step)
    return contrast


def brute_force(contrast: PixelContrast, emb: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Every labelled pixel is an anchor, every other pixel and every filled slot a candidate."""
    rows = [(emb[b, :, y, x], int(labels[b, y, x]), b) for b in range(len(emb)) for y in range(emb.shape[2])
            for x in range(emb.shape[3]) if labels[b, y, x] != IGNORE]  # fmt: skip
    stored: list[tuple[Tensor, int, int]] = []
    if contrast.memory is not None:
        all_rows, valid = contrast.memory.everything()
        stored = [(all_rows[c, s].double(), c, -1) for c, s in valid.nonzero().tolist()]
    losses = []
    for n, (anchor, own, image) in enumerate(rows):
        others = [row for m, row in enumerate(rows) if m != n] + stored
        if contrast.settings.mode == "intra_image":
            others = [row for row in others if row[2] == image]
        positives = [vector.detach() for vector, c, _ in others if c == own]
        negatives = [vector.detach() for vector, c, _ in others if c != own]
        if not positives or not negatives:
            continue
        positives.sort(key=lambda vector: float(vector @ anchor))
        negatives.sort(key=lambda vector: -float(vector @ anchor))
        if contrast.settings.pair_sampler == "hardest":
            positives, negatives = (
                positives[: contrast.settings.positives],
                negatives[: contrast.settings.negatives],
            )
        if contrast.settings.pair_sampler == "semi_hard":
            positives = positives[: max(len(positives) // 10, 1)]
            negatives = negatives[: max(len(negatives) // 10, 1)]
        losses.append(eq3(anchor, torch.stack(positives), torch.stack(negatives)))
    return torch.stack(losses).mean(), len(losses)


# --- the loss


@pytest.mark.parametrize(("positives", "negatives"), [(1, 1), (1, 5), (4, 6)])
def test_eq3_and_its_gradient(positives: int, negatives: int) -> None:
    torch.manual_seed(positives + negatives)
    rows = F.normalize(torch.randn(1 + positives + negatives, DIM, dtype=torch.float64), dim=1)
    anchor, plus, minus = (
        rows[0].requires_grad_(),
        rows[1 : 1 + positives].detach(),
        rows[1 + positives :].detach(),
    )
    spare = torch.full((1, 2), 0.9, dtype=torch.float64)  # masked entries must not count
    loss, qualifies = pixel_contrast_loss(
        torch.cat([(plus @ anchor)[None], spare], 1), torch.tensor([[True] * positives + [False] * 2]),
        torch.cat([spare, (minus @ anchor)[None]], 1), torch.tensor([[False] * 2 + [True] * negatives]), TAU,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), anchor)
    expected = eq3(anchor, plus, minus)
    assert qualifies.all()
    assert torch.allclose(loss[0], expected)
    assert torch.allclose(gradient, torch.autograd.grad(expected, anchor)[0])
    closed, printed = torch.zeros(DIM).double(), torch.zeros(DIM).double()
    own, other = torch.exp(plus @ anchor / TAU).detach(), torch.exp(minus @ anchor / TAU).detach()
    for j in range(positives):
        p = own[j] / (own[j] + other.sum())
        closed += (1 - p) * plus[j] - (other / (own[j] + other.sum())) @ minus
        p = own[j] / (own.sum() + other.sum())
        printed += (1 - p) * plus[j] - (other / (own.sum() + other.sum())) @ minus
    assert torch.allclose(gradient, -closed / (TAU * positives))
    # Eq. 5 as printed normalises over P and N: not the gradient, unless there is one positive
    assert torch.allclose(gradient, -printed / (TAU * positives)) == (positives == 1)


def test_extreme_similarities_stay_finite() -> None:
    far = torch.tensor([[-1.0, -1.0]]).requires_grad_()
    near = torch.tensor([[1.0, 1.0, 1.0]]).requires_grad_()
    loss, _ = pixel_contrast_loss(far, far < 0, near, near > 0, 0.001)
    loss.sum().backward()
    assert loss.item() == pytest.approx(2000 + math.log(3))
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()


@pytest.mark.parametrize("mode", ["intra_image", "batch", "memory"])
@pytest.mark.parametrize("sampler", ["random", "hardest", "semi_hard"])
def test_loss_and_gradient_against_loops(mode: str, sampler: str) -> None:
    counts = {"positives": 3, "negatives": 5} if sampler == "hardest" else {}
    contrast = filled(mode=mode, pair_sampler=sampler, anchors_per_class=ALL, pool_size="full", **counts)
    emb, labels, predictions, indices = make_batch(seed=1)
    emb.requires_grad_()
    before = {name: buffer.clone() for name, buffer in contrast.named_buffers()}
    out = contrast(emb, labels, predictions, indices, 5)
    expected, count = brute_force(contrast, emb, labels)
    assert int(out.anchors) == count
    assert torch.allclose(out.loss, expected, rtol=1e-6), (out.loss, expected)
    assert torch.allclose(out.value, expected, rtol=1e-6)
    got, want = (torch.autograd.grad(value, emb)[0] for value in (out.loss, expected))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-8)
    for name, buffer in contrast.named_buffers():  # state changes in enqueue_ alone
        assert torch.equal(buffer, before[name]), name


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    emb, labels, predictions, indices = make_batch(seed=2)
    contrast = filled()
    whole = contrast(emb, labels, predictions, indices, 5)
    monkeypatch.setattr("protoseg.core.contrast.SIMILARITIES_AT_ONCE", 100)
    chunked = contrast(emb, labels, predictions, indices, 5)
    assert torch.allclose(whole.loss, chunked.loss)
    assert torch.allclose(whole.diagnostics["alignment"], chunked.diagnostics["alignment"])


# --- pair samplers


def known_order(total: int, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hardness (total,) in a shuffled, known order, which entries are candidates, and the rank of each.

    Those that are no candidates are harder than any candidate.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    hardness = torch.full((total,), 1.5)
    hardness[order[:candidates]] = torch.linspace(1, -1, candidates)
    rank = torch.empty(total, dtype=torch.int64)
    rank[order] = torch.arange(total)
    return hardness, rank < candidates, rank


@pytest.mark.parametrize("candidates", [0, 3, 40, 90, 100])
def test_hardest_is_exact(candidates: int) -> None:
    hardness, candidate, rank = known_order(100, candidates)
    index, valid = select_pairs(hardness.repeat(2, 1), candidate, 12, "hardest", torch.tensor([1, 2]))
    for row in range(2):
        assert sorted(rank[index[row][valid[row]]].tolist()) == list(range(min(12, candidates)))


@pytest.mark.parametrize(
    ("candidates", "tenth"), [(0, 0), (3, 1), (19, 1), (57, 5), (400, 40), (499, 49), (500, 50)]
)
def test_semi_hard_takes_all_of_a_small_tenth(candidates: int, tenth: int) -> None:
    hardness, candidate, rank = known_order(500, candidates)
    index, valid = select_pairs(hardness[None], candidate, 60, "semi_hard", torch.tensor([1]))
    assert sorted(rank[index[0][valid[0]]].tolist()) == list(range(tenth))


def test_semi_hard_has_a_tenth_of_its_own_in_every_row() -> None:
    ask = torch.Generator().manual_seed(0)
    hardness = torch.randn(60, 7, generator=ask).repeat(1, 13)  # every value 13 times: ties
    candidate = torch.rand(60, 91, generator=ask) < torch.rand(60, 1, generator=ask)
    index, valid = select_pairs(hardness, candidate, 60, "semi_hard", torch.arange(60))
    for row in range(60):
        chosen = index[row][valid[row]]
        assert candidate[row, chosen].all()
        assert chosen.unique().numel() == len(chosen)
        among = hardness[row][candidate[row]].sort(descending=True).values
        expected = among[: max(len(among) // 10, 1)]
        assert hardness[row][chosen].sort(descending=True).values.tolist() == expected.tolist()


def chi_square_of_draws(sampler: str, eligible: int, count: int) -> float:
    hardness, candidate, rank = known_order(500, 400)
    trials = 4000
    keys = torch.arange(trials) * 977
    index, valid = select_pairs(hardness.repeat(trials, 1), candidate, count, sampler, keys)
    assert valid.sum(1).tolist() == [count] * trials
    ranks = rank[index]
    assert ranks.max() < eligible
    assert all(row.unique().numel() == count for row in ranks[:200])
    hits = torch.bincount(ranks.flatten(), minlength=eligible).float()
    expected = trials * count / eligible
    return float(((hits - expected) ** 2 / expected).sum() / (1 - count / eligible))


def test_semi_hard_is_uniform_within_the_top_tenth() -> None:
    assert chi_square_of_draws("semi_hard", 40, 10) < 72.1  # 39 degrees of freedom, p = 0.001


def test_random_is_uniform_over_all_candidates() -> None:
    assert chi_square_of_draws("random", 400, 100) < 492  # 399 degrees of freedom, p = 0.001


@pytest.mark.parametrize("candidates", [0, 5, 60])
def test_random_takes_all_if_fewer(candidates: int) -> None:
    hardness, candidate, rank = known_order(100, candidates)
    for count in (60, 200):
        index, valid = select_pairs(hardness[None], candidate, count, "random", torch.tensor([3]))
        assert sorted(rank[index[0][valid[0]]].tolist()) == list(range(candidates))


# --- anchors


def anchors_of(class_N: Tensor, wrong_N: Tensor, per_class: int, sampler: str, step: int = 0) -> Tensor:
    """Anchors of one image, checked to be of their class and different; class -1 has no label."""
    class_N = torch.where(class_N < 0, CLASSES, class_N)
    key_N = pixel_keys(class_N[None], torch.tensor([4]), 3, step, 0)[0]
    groups = sort_groups(key_N, class_N, CLASSES)
    pixel_CJ, valid_CJ = select_anchors(groups, class_N, wrong_N, per_class, sampler)
    assert (class_N[pixel_CJ] == torch.arange(CLASSES)[:, None])[valid_CJ].all()
    chosen = pixel_CJ[valid_CJ]
    assert chosen.unique().numel() == len(chosen)
    return chosen


def test_seg_hard_against_lists() -> None:
    ask = torch.Generator().manual_seed(0)
    for step in range(60):
        class_N = torch.randint(-1, CLASSES, (90,), generator=ask)
        wrong_N = torch.rand(90, generator=ask) < torch.rand(1, generator=ask)
        per_class = 1 + step % 30
        key_N = pixel_keys(class_N[None], torch.tensor([4]), 3, step, 0)[0]
        expected: list[int] = []
        for c in range(CLASSES):
            own = sorted((class_N == c).nonzero().flatten().tolist(), key=lambda n: int(key_N[n]))
            random_half = own[: per_class - per_class // 2]
            left = [n for n in own if n not in random_half]
            hard_half = [n for n in left if wrong_N[n]][: per_class // 2]
            fill = [n for n in left if n not in hard_half]
            expected += (random_half + hard_half + fill)[:per_class]
        assert anchors_of(class_N, wrong_N, per_class, "seg_hard", step).tolist() == expected


def test_seg_hard_takes_half_wrong_ones_and_fills_up() -> None:
    # class 0: plenty of both kinds; 1: two wrong ones; 2: wrong ones only; 3: five pixels in all
    class_N = torch.cat([torch.full((n,), c) for c, n in enumerate((100, 60, 40, 5))])
    wrong_N = torch.zeros(205, dtype=torch.bool)
    wrong_N[:50], wrong_N[100:102], wrong_N[160:200], wrong_N[200] = True, True, True, True
    hits = torch.zeros(205)
    for step in range(1000):
        chosen = anchors_of(class_N, wrong_N, 20, "seg_hard", step)
        assert torch.bincount(class_N[chosen]).tolist() == [20, 20, 20, 5]
        assert {100, 101} <= set(chosen.tolist())
        assert wrong_N[chosen[chosen < 100]].sum() >= 10
        hits[chosen] += 1
    # ten random ones, of which five are wrong, and ten wrong ones: each kind drawn evenly
    for kind, expected in ((hits[:50], 15 / 50), (hits[50:100], 5 / 50), (hits[102:160], 18 / 58)):
        chi_square = ((kind - 1000 * expected) ** 2 / (1000 * expected)).sum() / (1 - expected)
        assert chi_square < 95, float(chi_square)  # at most 57 degrees of freedom, p = 0.001


def test_random_anchors_ignore_the_prediction() -> None:
    class_N, wrong_N = torch.zeros(200, dtype=torch.int64), torch.arange(200) < 100
    hard = [float(wrong_N[anchors_of(class_N, wrong_N, 20, "random", step)].sum()) for step in range(300)]
    assert sum(hard) / 300 == pytest.approx(10, abs=0.4)


# --- pool


def test_pool_is_balanced_half_batch_half_memory_and_fills_up() -> None:
    contrast = filled(steps=8, memory_size=30)
    memory = contrast.memory
    assert memory is not None
    for rows in (memory.pixel_CTD, memory.region_CRD):  # no row twice, as a region of one pixel would be
        rows.copy_(F.normalize(torch.randn(rows.shape), dim=2))
    emb, labels, _, indices = make_batch(seed=3)
    labels[labels == 3] = 2  # class 3 is only in the memory
    class_N = class_map(labels, CLASSES, IGNORE).flatten()
    key_N = pixel_keys(class_map(labels, CLASSES, IGNORE), indices, 0, 9, 0).flatten()
    flat = emb.flatten(2).transpose(1, 2).flatten(0, 1)
    for per_class, expected in ((8, [(4, 4)] * 3 + [(0, 8)]), (1000, None)):
        pool = balanced_pool(flat, sort_groups(key_N, class_N, CLASSES), per_class, memory, 0, 9)
        for c in range(CLASSES):
            slots = torch.arange(c * per_class, (c + 1) * per_class)
            own = slots[pool.class_L[slots] < CLASSES]
            assert (pool.class_L[own] == c).all()
            from_batch = pool.pixel_L[own][pool.pixel_L[own] >= 0]
            in_batch, in_memory = int((class_N == c).sum()), int(memory.everything()[1][c].sum())
            counts = (len(from_batch), len(own) - len(from_batch))
            assert counts == (expected[c] if expected else (in_batch, in_memory))
            assert from_batch.unique().numel() == len(from_batch)
            assert (class_N[from_batch] == c).all()
            rows = pool.emb_LD[own]
            assert torch.equal(rows[: len(from_batch)], flat[from_batch])
            all_rows, valid = memory.everything()
            stored = all_rows[c][valid[c]].double()
            drawn = (rows[len(from_batch) :, None] == stored[None]).all(2).any(0).sum()
            assert drawn == counts[1], "stored rows are drawn once each"


def test_large_pool_equals_full_pool() -> None:
    emb, labels, predictions, indices = make_batch(seed=4)
    losses = []
    for pool_size in ("full", CLASSES * 1000):
        contrast = filled(pair_sampler="random", pool_size=pool_size)
        losses.append(contrast(emb, labels, predictions, indices, 5).loss)
    assert torch.allclose(losses[0], losses[1])


def test_empty_slots_are_never_candidates() -> None:
    emb, labels, predictions, indices = make_batch(seed=5)
    for pool_size in ("full", 64):
        contrast = filled(steps=1, memory_size=50, pool_size=pool_size)
        memory = contrast.memory
        assert memory is not None
        clean = contrast(emb, labels, predictions, indices, 5)
        empty = torch.arange(50) >= memory.pixel_fill_C[:, None]
        assert empty.any()
        memory.pixel_CTD[empty] = emb[0, :, 0, 0].float()  # would be a very hard negative
        memory.region_CRD[~memory.region_valid_CR] = emb[0, :, 0, 0].float()
        dirty = contrast(emb, labels, predictions, indices, 5)
        assert torch.equal(clean.loss, dirty.loss)


# --- ranks


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "change",
    [
        {}, {"pool_size": "full"}, {"mode": "intra_image"}, {"mode": "batch", "anchor_sampler": "random"},
        {"pair_sampler": "random", "positives": 3, "negatives": 5},
        {"pair_sampler": "hardest", "negatives": 6},
        {"memory": "pixel"}, {"memory": "region", "cap_mb": 2 * CLASSES * DIM * 4 / 1e6 + 1e-9},
    ],
    ids=str,
)  # fmt: skip
def test_ranks_equal_one_process(world: int, change: dict) -> None:
    change = {"anchors_per_class": 7, "pool_size": 48, **change}
    single = build(**change)
    ranks = Ranks(world)
    per_rank = 2
    many: list[PixelContrast] = [None] * world  # type: ignore[list-item]
    for step in range(4):
        emb, labels, predictions, indices = make_batch(images=world * per_rank, seed=step)
        if step == 2:
            indices[-1] = indices[0]  # an image twice: equal keys on two ranks, if the labels agree
            labels[-1] = labels[0]
        emb.requires_grad_()
        expected = single(emb, labels, predictions, indices, step)
        (gradient,) = torch.autograd.grad(expected.loss, emb)

        def work(rank: int, gather, reduce, batch=(emb, labels, predictions, indices), step: int = step):
            if step == 0:
                many[rank] = build(**change, all_gather=gather, all_reduce=reduce, rank=rank)
            many[rank].all_gather, many[rank].all_reduce = gather, reduce
            part = slice(rank * per_rank, (rank + 1) * per_rank)
            features, own, predicted, visited = (each[part].detach() for each in batch)
            out = many[rank](features.requires_grad_(), own, predicted, visited, step)
            many[rank].enqueue_(out.projected, own, visited, step)
            return out, torch.autograd.grad(out.loss, features)[0]

        results = ranks.run(work)
        single.enqueue_(expected.projected, labels, indices, step)
        # DDP averages over ranks
        assert torch.allclose(torch.stack([out.loss for out, _ in results]).mean(), expected.loss)
        assert torch.allclose(torch.cat([part for _, part in results]) / world, gradient, atol=1e-10)
        for rank, (out, _) in enumerate(results):
            assert torch.allclose(out.value, expected.value)
            assert torch.equal(out.anchors, expected.anchors)
            for name, value in expected.diagnostics.items():
                assert torch.allclose(out.diagnostics[name], value), name
            for name, buffer in single.named_buffers():
                assert torch.equal(many[rank].get_buffer(name), buffer), (rank, name)


# --- edge cases: 0 with a graph, no NaN, counted


@pytest.mark.parametrize("case", ["all ignored", "one class", "two pixels", "no known label"])
@pytest.mark.parametrize("mode", ["intra_image", "batch", "memory"])
@pytest.mark.parametrize("pool_size", ["full", 64])
def test_no_qualifying_anchor(case: str, mode: str, pool_size: int | str) -> None:
    contrast = build(channels=5, mode=mode, pool_size=pool_size)  # with an empty memory
    features = torch.randn(2, 5, 3, 3).requires_grad_()
    labels = torch.full((2, 3, 3), IGNORE)
    if case == "one class":
        labels[:] = 0
    elif case == "two pixels":
        labels[0, 0, 0], labels[1, 0, 0] = 0, 3
    elif case == "no known label":
        labels[:] = CLASSES  # beyond the classes: treated as ignored
    out = contrast(features, labels, torch.zeros_like(labels), torch.tensor([0, 1]), 0)
    out.loss.backward()
    assert (out.loss.item(), out.value.item(), out.anchors.item(), out.empty.item()) == (0, 0, 0, 1)
    for name, parameter in contrast.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name
    assert features.grad is not None
    assert all(torch.isfinite(value).all() for value in out.diagnostics.values()), out.diagnostics
    contrast.enqueue_(out.projected, labels, torch.tensor([0, 1]), 0)
    assert all(torch.isfinite(buffer.float()).all() for buffer in contrast.buffers())


@pytest.mark.parametrize("sampler", ["random", "hardest", "semi_hard"])
def test_one_class_in_the_batch_contrasts_with_the_memory(sampler: str) -> None:
    contrast = filled(steps=1, memory_size=50, pair_sampler=sampler)
    emb, labels, predictions, indices = make_batch(seed=6)
    labels[:] = 0
    out = contrast(emb.requires_grad_(), labels, predictions, indices, 1)
    out.loss.backward()
    assert out.anchors == 48  # 3 images of 16 pixels, fewer than 50
    assert out.empty == 0
    assert out.loss > 0
    assert torch.isfinite(emb.grad).all()  # type: ignore[arg-type]


def test_half_precision_memory_and_features() -> None:
    emb, labels, predictions, indices = make_batch(seed=7, dtype=torch.float32)
    losses = []
    for kind, features in (("float32", emb), ("float16", emb), ("float32", emb.bfloat16())):
        out = filled(storage=kind)(features.requires_grad_(), labels, predictions, indices, 5)
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        losses.append(out.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[2] == pytest.approx(losses[0], rel=5e-2)


# --- the module


def test_projecting_anchors_only_equals_projecting_everything() -> None:
    _, labels, predictions, indices = make_batch(seed=8)
    torch.manual_seed(0)
    features = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    contrast, results = filled(anchors_per_class=4).double(), []
    head = ProjectionHead(5, DIM).double()
    for lean in (True, False):
        head.zero_grad()
        x = features.clone().requires_grad_()
        contrast.projection = head if lean else torch.nn.Identity()
        out = contrast(x if lean else head(x), labels, predictions, indices, 5)
        out.loss.backward()
        weights = [parameter.grad.clone() for parameter in head.parameters() if parameter.grad is not None]
        assert len(weights) == 4
        results.append([out.loss, out.projected, x.grad, *weights])
    for lean_value, value in zip(*results):
        assert torch.allclose(lean_value, value, atol=1e-12)


def test_gradient_lies_in_memory_as_the_features_do() -> None:
    # added to the classifier's gradient, another layout would cost more than the whole contrast
    _, labels, predictions, indices = make_batch(seed=8)
    torch.manual_seed(0)
    features, gradients = torch.randn(3, 5, 4, 4), []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = features.to(memory_format=layout, copy=True).requires_grad_()
        torch.manual_seed(1)
        contrast = filled(anchors_per_class=4)
        contrast.projection = ProjectionHead(5, DIM)
        out = contrast(x * 1, labels, predictions, indices, 5)
        gradients.append(torch.autograd.grad(out.loss, x)[0])
        assert gradients[-1].is_contiguous(memory_format=layout)
        assert out.projected.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(*gradients, atol=1e-7)


def test_only_anchors_get_a_gradient() -> None:
    emb, labels, predictions, indices = make_batch(seed=9)
    out = filled(anchors_per_class=3, anchor_sampler="random")(
        emb.requires_grad_(), labels, predictions, indices, 5
    )
    out.loss.backward()
    assert emb.grad is not None
    assert int((emb.grad.abs().sum(1) > 0).sum()) == int(out.anchors) == 3 * CLASSES


def test_projection_is_normalised_along_channels_and_local() -> None:
    # the published code normalises over the image width: a pixel depends on its row, a crop disagrees
    torch.manual_seed(0)
    head = ProjectionHead(6, DIM)
    features = torch.randn(2, 6, 5, 7)
    full = head(features)
    assert torch.allclose(full.norm(dim=1), torch.ones(2, 5, 7))
    assert torch.allclose(head(features[:, :, 1:4, 2:5]), full[:, :, 1:4, 2:5], atol=1e-6)
    assert head.hidden.out_features == 6


def test_diagnostics_against_loops() -> None:
    contrast = filled(anchors_per_class=ALL, pool_size="full", mode="batch")
    emb, labels, predictions, indices = make_batch(seed=10)
    out = contrast(emb, labels, predictions, indices, 5)
    rows, own = emb.permute(0, 2, 3, 1).reshape(-1, DIM), labels.flatten()
    known = own != IGNORE
    positive, negative = [], []
    for n in known.nonzero().flatten().tolist():
        same = (own == own[n]) & (torch.arange(len(own)) != n)
        positive.append((rows[same] @ rows[n]).mean())
        negative.append((rows[known & (own != own[n])] @ rows[n]).max())
    got = out.diagnostics
    assert torch.allclose(got["positive_cosine"], torch.stack(positive).mean())
    assert torch.allclose(got["alignment"], 2 - 2 * torch.stack(positive).mean())
    assert torch.allclose(got["hardest_negative_cosine"], torch.stack(negative).mean())
    assert torch.allclose(got["hard_anchor_share"], (predictions != labels).flatten()[known].double().mean())
    used = rows[known]
    pairs = [
        torch.exp(-2 * (a - b).square().sum())
        for i, a in enumerate(used)
        for j, b in enumerate(used)
        if i != j
    ]
    assert torch.allclose(got["uniformity"], torch.stack(pairs).mean().log())
    assert uniformity(used, torch.zeros(len(used), dtype=torch.bool)) == 0


def test_fill_is_reported() -> None:
    contrast = filled(steps=1, memory_size=40)
    emb, labels, predictions, indices = make_batch(seed=100)
    got = contrast(emb, labels, predictions, indices, 1).diagnostics
    for c in range(CLASSES):
        counts = [(labels[b] == c).sum().clamp(max=10) for b in range(3)]
        assert got["pixel_fill"][c] == pytest.approx(float(sum(counts)) / 40)
        assert got["region_fill"][c] == pytest.approx(sum(count > 0 for count in counts) / IMAGES)


def test_no_parameter_and_no_memory_without_need() -> None:
    assert not list(build().parameters())
    assert len(list(build(channels=5).parameters())) == 4
    for mode in ("intra_image", "batch"):
        contrast = build(mode=mode)
        assert not contrast.state_dict()
        emb, labels, _, indices = make_batch()
        contrast.enqueue_(emb, labels, indices, 0)


def test_draws_change_with_the_step_and_with_nothing_else() -> None:
    emb, labels, predictions, indices = make_batch(seed=11)
    contrast = filled(anchors_per_class=4, anchor_sampler="random", pool_size=24)
    torch.manual_seed(0)
    first = contrast(emb, labels, predictions, indices, 5).loss
    torch.manual_seed(1)
    assert torch.equal(first, contrast(emb, labels, predictions, indices, 5).loss)
    assert not torch.equal(first, contrast(emb, labels, predictions, indices, 6).loss)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mode": "inter"}, "mode='inter'"),
        ({"memory": "none"}, "memory='none'"),
        ({"anchor_sampler": "hard"}, "anchor_sampler='hard'"),
        ({"pair_sampler": "semihard"}, "pair_sampler='semihard'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"anchors_per_class": 0}, "anchors_per_class=0"),
        ({"positives": 0}, "positives=0"),
        ({"pool_size": 7}, "pool_size=7 must be at least 2 per class, 8 here"),
        ({"all_gather": torch.clone}, "together"),
    ],
)
def test_bad_values_name_themselves(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(**change)


def test_labels_at_another_stride_are_an_error() -> None:
    emb, labels, predictions, indices = make_batch()
    with pytest.raises(ValueError, match=r"labels have shape \(3, 8, 8\), the features need \(3, 4, 4\)"):
        build()(emb, labels.repeat(1, 2, 2), predictions, indices, 0)


def test_compiles_as_one_graph() -> None:
    # a graph without a break also means that the host reads nothing from the device
    contrast = filled(negatives=2)  # fewer than the hardest tenth
    contrast.projection = head = ProjectionHead(5, DIM)
    _, labels, predictions, indices = make_batch(seed=12)
    features = torch.randn(3, 5, 4, 4)
    torch._dynamo.reset()

    def both(step: Tensor) -> Tensor:
        out = contrast(features, labels, predictions, indices, step)
        contrast.enqueue_(out.projected, labels, indices, step)
        return out.loss

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    state = {name: value.clone() for name, value in contrast.state_dict().items()}
    steps = [torch.tensor(step) for step in (5, 6)]  # as tensors: no new graph for each
    expected = [both(step) for step in steps]
    after = {name: value.clone() for name, value in contrast.state_dict().items()}
    contrast.load_state_dict(state)
    got = [compiled(step) for step in steps]
    assert torch.allclose(torch.stack(got), torch.stack(expected))
    for name, value in contrast.state_dict().items():
        assert torch.allclose(value, after[name]), name
    got[0].backward()
    assert head.out.weight.grad is not None
