"""Class scores, own similarities, right pixels and log-sum-exp against loops, with their gradients."""

import pytest
import torch
from helpers import SIZES, assert_close_report, brute_scores, case

from protoseg.core import pixel_scores, similarity
from protoseg.core.pixel_scores import log_sum_exp, prototype_scores
from protoseg.core.similarity import class_scores, own_similarities, unit, unit_rows


def of_map(features, protos, labels, live=None, scale=1.0, offset=0.0, **options):
    """With the same scale and offset for all classes."""
    classes = len(protos)
    live = torch.ones(classes, dtype=torch.bool) if live is None else live
    full = [torch.full((classes,), value, dtype=torch.double) for value in (scale, offset)]
    return prototype_scores(features, protos, labels, live, *full, **options)


def as_map(emb):
    """Rows (N, D) as a map (1, D, 1, N)."""
    return emb.t()[None, :, None]


def chunks_of(monkeypatch, size):
    if size is not None:
        monkeypatch.setattr(similarity, "pixels_at_once", lambda *_: size)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("all_live", [True, False])
@pytest.mark.usefixtures("as_on_gpu")
def test_scores_and_their_gradient(sizes, chunk, all_live, monkeypatch):
    chunks_of(monkeypatch, chunk)
    if chunk:
        monkeypatch.setattr(pixel_scores, "GATHERED_BYTES", 8 * 2 * sizes[1] * sizes[3])  # two classes a time
    emb, protos, labels = case(*sizes)
    live = torch.ones(sizes[2], dtype=torch.bool)
    if not all_live and sizes[2] > 1:
        live[0] = False
    scale, offset = torch.rand(2, sizes[2], dtype=torch.double) + 1
    emb.requires_grad_()
    logits, own, right, rows, _ = prototype_scores(as_map(emb), protos, labels, live, scale, offset)
    lse = log_sum_exp(emb, protos, 0.1, live)
    best, brute_own, brute_lse = brute_scores(emb, protos, labels, 0.1, live)
    brute_logits = torch.where(live, scale * best + offset, offset)
    assert torch.equal(rows, emb / emb.norm(dim=1, keepdim=True))
    nearest = torch.where(live, best, -2).argmax(1)
    assert torch.equal(right, (nearest == labels) & live[labels])
    for name, a, b, axes in (
        ("logits", logits[0, :, 0].t(), brute_logits, "NC"),
        ("own", own, brute_own, "NK"),
        ("log-sum-exp", lse, brute_lse, "N"),
    ):
        assert_close_report(a, b, name, axes, 1e-12)
        weight = torch.randn(a.shape, generator=torch.Generator().manual_seed(3), dtype=a.dtype)
        grads = [
            torch.autograd.grad((x * weight).sum(), emb, retain_graph=True, allow_unused=True)[0]
            for x in (a, b)
        ]
        expected = torch.zeros_like(emb) if grads[1] is None else grads[1]
        if name != "log-sum-exp":  # a map's pixels are brought to unit length: along them nothing changes
            expected = expected - emb * (expected * emb).sum(1, keepdim=True)
        assert_close_report(grads[0], expected, name, "ND", 1e-11)
    for grad in (True, False):  # two ways of putting the chunks together
        with torch.set_grad_enabled(grad):
            got = class_scores(emb, protos, live)
        assert_close_report(got, best, "class_scores", "NC", 1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("drawn", [None, [0, 12, 13, 35, 20, 20]])  # some pixels are very short
@pytest.mark.parametrize("chunk", [None, 1, 5, 12, 30, 100])  # parts of an image, images, all
@pytest.mark.usefixtures("as_on_gpu")
def test_scores_of_a_map_are_those_of_its_unit_rows(chunk, drawn, layout, monkeypatch):
    chunks_of(monkeypatch, chunk)
    drawn_P = None if drawn is None else torch.tensor(drawn)
    _, protos, _ = case(1, 5, 4, 3)
    features = torch.randn(3, 5, 4, 3, dtype=torch.double)
    features[0, :, 0, 0] = 0
    features[1, :, 0, 0] = 1e-9
    labels = torch.randint(-1, 4, (36,))
    live = torch.tensor([True, True, False, True])
    grads = []
    for plain in (False, True):
        x = features.clone(memory_format=layout).requires_grad_()
        if plain:
            emb = unit(x.permute(0, 2, 3, 1).reshape(-1, 5))
            drawn_rows = emb if drawn is None else emb[drawn_P]
            logits = torch.where(live, 7 * torch.einsum("nd,ckd->nck", emb, protos).max(2).values, -30)
            logits = logits.view(3, 4, 3, 4).permute(0, 3, 1, 2)
            own = own_similarities(emb, protos, labels).masked_fill(~live[labels.clamp(min=0), None], -1)
        else:
            offset = torch.where(live, 0.0, -30.0)
            scale = torch.full((4,), 7.0)
            logits, own, _, rows, drawn_rows = prototype_scores(
                x, protos, labels, live, scale, offset, drawn_P=drawn_P
            )
            assert torch.equal(rows, unit_rows(features))
            assert not rows.requires_grad
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (result * torch.randn(result.shape, generator=generator, dtype=result.dtype)).sum()
            for result in (logits, own, drawn_rows)
        )
        grads.append((logits, own, drawn_rows, *torch.autograd.grad(loss, x)))
    assert grads[0][-1].is_contiguous(memory_format=layout)
    for name, mine, plain in zip(("logits", "own", "drawn", "gradient"), *grads):
        relative = (mine - plain).abs() / plain.abs().clamp(min=1)
        assert relative.max() < 1e-10, name


def test_gradcheck():
    emb, protos, _ = case(11, 5, 4, 3)
    assert torch.autograd.gradcheck(lambda x: log_sum_exp(x, protos, 0.1), emb.requires_grad_())
    maps = torch.randn(2, 5, 3, 4, dtype=torch.double, requires_grad=True)
    labels = torch.randint(-1, 4, (24,))
    assert torch.autograd.gradcheck(lambda x: of_map(x, protos, labels)[:2], maps)
    for given in (maps, maps.detach()):  # two ways
        expected = unit(given.permute(0, 2, 3, 1).reshape(-1, 5))
        assert_close_report(unit_rows(given), expected, "unit_rows", "ND", 1e-15)


def test_half_maps_come_in_single_and_their_gradient_in_half():
    _, protos, _ = case(1, 8, 4, 3, torch.float32)
    features = torch.randn(2, 8, 4, 3).bfloat16().requires_grad_()
    labels = torch.randint(-1, 4, (24,))
    half, single = of_map(features, protos, labels), of_map(features.float(), protos, labels)
    for mine, plain in zip(half, single):
        assert mine.dtype == plain.dtype
        assert torch.equal(mine, plain)
    half.logits.square().sum().backward()
    assert features.grad.dtype == torch.bfloat16


def test_the_gradient_is_that_of_the_embedding_and_only_once():
    emb, protos, labels = case(20, 8, 4, 3, torch.float32)
    features = emb.t().reshape(1, 8, 4, 5)
    learnable = protos.clone().requires_grad_()
    assert not of_map(features, learnable, labels).logits.requires_grad
    assert not log_sum_exp(emb, learnable, 0.1).requires_grad
    for function in (
        lambda x: of_map(x, protos, labels).logits,
        lambda x: log_sum_exp(unit_rows(x), protos, 1),
    ):
        x = features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


def test_autocast_around_backward_changes_nothing():
    emb, protos, labels = case(20, 8, 4, 3, torch.float32)
    grads = []
    for enabled in (False, True):
        x = emb.t().reshape(1, 8, 4, 5).clone().requires_grad_()
        value = of_map(x, protos, labels).logits.square().sum() + log_sum_exp(unit_rows(x), protos, 0.1).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(value, x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("length", [1e-3, 1e3])
@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_rows_of_any_length_stay_finite(length, temperature):
    emb, protos, _ = case(20, 8, 4, 3, torch.float32)
    emb = (emb * length).requires_grad_()
    value = log_sum_exp(emb, protos, temperature)
    value.sum().backward()
    assert value.isfinite().all()
    assert emb.grad.isfinite().all()


def test_single_precision_is_as_exact_as_the_plain_version():
    emb, protos, _ = case(500, 64, 20, 10)

    def plain(x, protos):
        return (torch.einsum("nd,ckd->nck", x, protos) / 0.1).flatten(1).logsumexp(1)

    def value_and_gradient(function, dtype):
        x = emb.to(dtype, copy=True).requires_grad_()
        value = function(x, protos.to(dtype))
        return value, torch.autograd.grad(value.sum(), x)[0]

    truth = value_and_gradient(plain, torch.double)
    ours = value_and_gradient(lambda x, p: log_sum_exp(x, p, 0.1), torch.float32)
    for mine, naive, true in zip(ours, value_and_gradient(plain, torch.float32), truth):
        assert (mine - true).abs().max() <= (naive - true).abs().max() + 2e-6


def test_score_dtype_leaves_own_similarities_exact():
    emb, protos, labels = case(50, 32, 6, 3, torch.float32)
    half, full = (of_map(as_map(emb), protos, labels, score_dtype=dtype) for dtype in (torch.bfloat16, None))
    assert half.logits.dtype == torch.float32
    assert_close_report(half.own_NK, full.own_NK, "own", "NK")
    assert_close_report(half.logits, full.logits, "classes", atol=2e-2)
    assert (half.logits - full.logits).abs().max() > 1e-5


def test_prototypes_that_tie_share_one_gradient():
    emb, protos, labels = case(6, 4, 2, 1)
    grads = []
    for p in (protos, protos.repeat(1, 3, 1)):
        x = as_map(emb).clone().requires_grad_()
        of_map(x, p, labels).logits.sum().backward()
        grads.append(x.grad)
    assert_close_report(grads[1], grads[0], "gradient", atol=1e-12)


def test_two_dimensional_classes_by_hand():
    """Prototypes at 0° and 90° (class 0), 180° and 270° (class 1); a pixel at 60° is nearest 90°."""
    angles = torch.tensor([[0.0, 90.0], [180.0, 270.0]]).deg2rad()
    protos = torch.stack([angles.cos(), angles.sin()], -1)
    emb = torch.tensor([[0.5, 3**0.5 / 2]])
    scores = of_map(as_map(emb), protos, torch.tensor([0]))
    assert_close_report(scores.logits[0, :, 0].t(), torch.tensor([[3**0.5 / 2, -0.5]]), "scores", "NC")
    assert_close_report(scores.own_NK, torch.tensor([[0.5, 3**0.5 / 2]]), "own", "NK")
    assert scores.right_N.all()
