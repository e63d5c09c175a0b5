"""PrototypeHead: one step against the equations, hostile batches, ranks, compile, state."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_close_report,
    brute_scores,
    brute_sinkhorn,
    brute_update,
    peak_bytes,
    run_ranks,
)

from protoseg.core import reference, similarity
from protoseg.core.losses import downsample_labels, upsampled_cross_entropy
from protoseg.core.prototypes import PrototypeHead


def head_of(dim=6, classes=4, count=3, seed=0, **options):
    torch.manual_seed(seed)
    return PrototypeHead(dim, classes, count, **{"start": "random", "prior": "none", **options})


def batch(b=2, dim=6, h=5, w=7, classes=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(b, dim, h, w, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (b, h, w), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return features, labels


@pytest.mark.parametrize("update_pixels", ["all", "correct"])
@pytest.mark.parametrize("classes_in_batch", [4, 2])
def test_one_step_is_the_equations(update_pixels, classes_in_batch):
    head = head_of(momentum=0.9, update_pixels=update_pixels).double()
    features, labels = batch(classes=classes_in_batch, dtype=torch.double)
    before = head.prototypes.clone()
    out = head.training_step(features, labels)
    assert torch.equal(head.prototypes, before)

    emb = F.normalize(features, dim=1).permute(0, 2, 3, 1).reshape(-1, 6)
    label = torch.where(labels == 255, -1, labels).flatten()
    scores, own, lse = brute_scores(emb, before, label, 0.1, torch.ones(4))
    expected = brute_sinkhorn(own.detach(), label, 4, 0.05, 3).argmax(1)
    expected[label < 0] = -1
    assert torch.equal(out.assignment.flatten(), expected)
    mine = label >= 0
    positive = own.gather(1, expected.clamp(min=0)[:, None])[:, 0]
    ppc, ppd = (lse - positive / 0.1)[mine].mean(), (1 - positive)[mine].square().mean()
    assert_close_report(out.ppc, ppc, "PPC", atol=1e-12)
    assert_close_report(out.ppd, ppd, "PPD", atol=1e-12)
    logits = head.settings.logit_scale * scores.view(2, 5, 7, 4).permute(0, 3, 1, 2)
    assert_close_report(out.logits, logits, "logits", "NC", 1e-12)
    assert_close_report(head(features), logits, "forward", "NC", 1e-12)
    got, want = (
        torch.autograd.grad(F.cross_entropy(x, labels, ignore_index=255) + p + d, features)[0]
        for x, p, d in ((out.logits, out.ppc, out.ppd), (logits, ppc, ppd))
    )
    assert_close_report(got, want, "gradient", atol=1e-12)

    head.update_(out)
    moves = reference.moving(emb, label, before) if update_pixels == "correct" else mine
    moving = torch.where(moves, expected, -1)
    assert_close_report(
        head.prototypes, brute_update(before, emb, label, moving, 0.9), "update", "CKD", 1e-12
    )
    absent = torch.arange(4) >= classes_in_batch
    assert torch.equal(head.prototypes[absent], before[absent])
    assert not head.usage[absent].any()
    nearest = torch.stack([torch.bincount(own[label == c].argmax(1), minlength=3) for c in range(4)])
    assert torch.equal(head.nearest_usage.long(), nearest)


@pytest.mark.parametrize(
    ("dim", "classes", "count", "label"),
    [(6, 4, 3, 255), (6, 1, 3, 0), (6, 4, 1, 2), (6, 1, 1, 0), (6, 3, 50, 1), (1, 2, 2, 1)],
)
@pytest.mark.parametrize("start", ["random", "data"])
@pytest.mark.parametrize("same", [False, True])
def test_hostile_batches_stay_finite(dim, classes, count, label, start, same):
    head = head_of(
        dim, classes, count, start=start, score_norm="layer_norm" if same else "scale", revive_after=1
    )
    for dtype in (torch.float32, torch.bfloat16):
        features = torch.ones(1, dim, 2, 3) if same else torch.randn(1, dim, 2, 3)
        features = features.to(dtype).requires_grad_()
        labels = torch.full((1, 2, 3), label)
        for _ in range(3):
            state = {name: value.clone() for name, value in head.state_dict().items()}
            with torch.autocast("cpu", torch.bfloat16):
                head.prepare_(features, labels)
                out = head.training_step(features, labels)
            assert out.logits.dtype == out.ppc.dtype == torch.float32
            (out.logits.logsumexp(1).mean() + out.ppc + out.ppd).backward()
            head.update_(out)
            finite = [out.logits, out.ppc, out.ppd, features.grad, *head.state_dict().values()]
            assert all(x.isfinite().all() for x in finite)
            for name, value in head.state_dict().items():
                others = [c for c in range(classes) if c != label]
                assert torch.equal(value[others], state[name][others]), f"{name} of an absent class changed"


@pytest.mark.parametrize("shape", [(0, 6, 5, 7), (2, 6, 0, 7)])
@pytest.mark.parametrize("score_norm", ["scale", "layer_norm"])
def test_an_empty_batch_changes_nothing(shape, score_norm):
    for start in ("data", "random"):
        head = head_of(start=start, score_norm=score_norm, update_pixels="correct")
        before = {name: value.clone() for name, value in head.state_dict().items()}
        features = torch.randn(shape, requires_grad=True)
        labels = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
        head.prepare_(features, labels)
        out = head.training_step(features, labels)
        (out.logits.sum() + out.ppc + out.ppd).backward()
        head.update_(out)
        assert out.ppc == out.ppd == 0
        assert out.logits.shape == (shape[0], 4, *shape[2:])
        assert head(features, return_distance=True)[1].shape == labels.shape
        assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("ignore_index", [-1, -100, 0, 255])
def test_any_ignore_index(ignore_index):
    features, labels = batch()
    labels[labels == 0] = 255
    heads = [head_of(start="data", ignore_index=index) for index in (255, ignore_index)]
    outs = []
    for head, given in zip(heads, (labels, labels.masked_fill(labels == 255, ignore_index))):
        head.prepare_(features, given)
        outs.append(head.training_step(features, given))
        head.update_(outs[-1])
    assert torch.equal(outs[0].assignment, outs[1].assignment)
    assert (outs[0].ppc, outs[0].ppd) == (outs[1].ppc, outs[1].ppd)
    assert torch.equal(heads[0].prototypes, heads[1].prototypes)


def test_pixels_without_direction_start_no_prototype_of_length_zero():
    head = head_of(start="data")
    features, labels = batch()
    dead = torch.zeros_like(features, requires_grad=True)
    head.prepare_(dead, labels)
    out = head.training_step(dead, labels)
    (out.logits.sum() + out.ppc + out.ppd).backward()
    head.update_(out)
    assert dead.grad.isfinite().all()
    assert_close_report(head.prototypes.norm(dim=-1), torch.ones(4, 3), "length", "CK", 1e-5)


def test_no_labelled_pixel_gives_zero_with_a_graph():
    head = head_of(start="data")
    features, labels = batch()
    out = head.training_step(features, torch.full_like(labels, 255))
    assert out.ppc == out.ppd == 0
    assert (out.assignment == -1).all()
    (out.ppc + out.ppd).backward()
    assert not features.grad.any()


def test_unseen_classes_are_left_out():
    head = head_of(start="data")
    features, labels = batch(classes=2)
    head.prepare_(features, labels)
    assert head.initialized.tolist() == [True, True, False, False]
    out = head.training_step(features, torch.where(labels == 0, 3, labels))
    assert (out.assignment[labels == 0] == -1).all()
    assert (out.logits[:, 2:] < -1e3).all()
    assert out.logits.isfinite().all()
    emb = out.embedding
    lse = ((emb @ head.prototypes[:2].flatten(0, 1).t()) / 0.1).logsumexp(1)
    own = (emb[:, None] * head.prototypes[1]).sum(-1)
    chosen = out.assignment.flatten()
    mine = chosen >= 0
    expected = (lse - own.gather(1, chosen.clamp(min=0)[:, None])[:, 0] / 0.1)[mine].mean()
    assert_close_report(out.ppc, expected, "PPC", atol=1e-5)
    before = head.state_dict()
    again = {name: value.clone() for name, value in before.items()}
    head.prepare_(features, labels)
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_with_unequal_pixels_are_one_process(world):
    features, labels = batch(b=6, dtype=torch.double)
    labels[0] = 255
    bounds = {1: [0, 6], 2: [0, 1, 6], 3: [0, 1, 3, 6]}[world]
    one = head_of(start="data").double()
    one.prepare_(features, labels)
    whole = one.training_step(features, labels)
    one.update_(whole)
    (grad,) = torch.autograd.grad(whole.ppc + whole.ppd, features)
    heads = [head_of(start="data").double() for _ in range(world)]

    def work(rank, all_reduce):
        head, part = heads[rank], slice(bounds[rank], bounds[rank + 1])
        head.all_reduce = all_reduce
        mine = features[part].detach().requires_grad_()
        head.prepare_(mine, labels[part])
        out = head.training_step(mine, labels[part])
        head.update_(out)
        return out, torch.autograd.grad(out.ppc + out.ppd, mine)[0]

    results = run_ranks(world, work)
    assert torch.equal(torch.cat([out.assignment for out, _ in results]), whole.assignment)
    assert_close_report(torch.stack([out.ppc for out, _ in results]).mean(), whole.ppc, "PPC", atol=1e-12)
    assert_close_report(torch.cat([g for _, g in results]) / world, grad, "gradient", atol=1e-12)
    for head in heads:
        for name, value in head.state_dict().items():
            assert_close_report(value, one.state_dict()[name], name, "CKD", 1e-12)


def test_micro_batches_make_one_update():
    features, labels = batch(b=4, dtype=torch.double)
    whole, parts = (head_of(sinkhorn_iterations=1).double() for _ in range(2))
    outs = [parts.training_step(features[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    parts.update_(*outs)
    joined = whole.training_step(features, labels)
    whole.update_(replace(joined, assignment=torch.cat([out.assignment for out in outs])))
    assert_close_report(parts.prototypes, whole.prototypes, "prototypes", "CKD", 1e-12)


@pytest.mark.parametrize(
    ("options", "chunk"),
    [({}, None), ({"prior": "frequency"}, 5), ({"update_pixels": "all", "score_norm": "layer_norm"}, None)],
)
def test_step_and_update_compile_in_one_graph(options, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(similarity, "pixels_at_once", lambda *_: chunk)
    head, compiled = (head_of(**options) for _ in range(2))
    features, labels = batch()
    step = torch.compile(compiled.training_step, fullgraph=True, backend="aot_eager")
    update = torch.compile(compiled.update_, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        grads = []
        for each, do_step, do_update in ((head, head.training_step, head.update_), (compiled, step, update)):
            out = do_step(features, labels, drawn=torch.tensor([[0, 3, 34], [1, 2, 30]]))
            grads.append(torch.autograd.grad(out.logits.logsumexp(1).mean() + out.ppc + out.ppd, features)[0])
            do_update(out)
            assert each.prototypes.grad_fn is None
        assert_close_report(grads[1], grads[0], "gradient")
        assert_close_report(compiled.prototypes, head.prototypes, "prototypes", "CKD")


def test_forward_compiles_in_one_graph_and_can_be_exported():
    head = head_of().eval()
    features, _ = batch()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(features, return_distance=True), head(features, return_distance=True)):
        assert_close_report(got, expected, "output")
    grads = [torch.autograd.grad(f(features).square().sum(), features)[0] for f in (compiled, head)]
    assert_close_report(*grads, "gradient", atol=1e-4)
    plain = features.detach()
    exported = torch.export.export(head, (plain,)).module()
    assert_close_report(exported(plain), head(plain), "exported")


@torch.no_grad()
@pytest.mark.parametrize("example", [6, 70])
def test_a_graph_is_for_all_sizes(example):
    """One product, however many pixels: at 1536 and more the pixels go through in chunks otherwise."""
    head = head_of().eval()
    features = torch.randn(1, head.prototypes.shape[-1], example, example + 2)
    sizes = {2: torch.export.Dim("height", min=2, max=99), 3: torch.export.Dim("width", min=2, max=99)}
    exported = torch.export.export(head, (features,), dynamic_shapes=(sizes,)).module()
    traced = torch.jit.trace(head, (features,))
    for height, width in ((6, 8), (41, 39), (90, 70)):
        other = torch.randn(1, features.shape[1], height, width)
        for graph in (exported, traced):
            assert_close_report(graph(other), head(other), "graph")


def test_memory_format_changes_nothing():
    features, labels = batch()
    head = head_of(start="data")
    head.prepare_(features, labels)
    turned = features.detach().to(memory_format=torch.channels_last).requires_grad_()
    strided = labels.transpose(1, 2).contiguous().transpose(1, 2)
    outs = [head.training_step(*given) for given in ((features, labels), (turned, strided))]
    grads = [
        torch.autograd.grad(o.ppc + o.logits.square().mean(), x)[0] for o, x in zip(outs, (features, turned))
    ]
    assert torch.equal(outs[0].assignment, outs[1].assignment)
    assert_close_report(outs[1].ppc, outs[0].ppc, "PPC")
    assert_close_report(grads[1], grads[0], "gradient")


def test_revival_moves_only_what_no_pixel_is_nearest_to():
    head = head_of(2, 2, 2)
    head.prototypes.copy_(torch.tensor([[[1.0, 0], [0, 1]], [[-1.0, 0], [0, -1]]]))
    features = torch.tensor([[1.0, 0.8], [0.0, 0.6]]).view(
        1, 2, 1, 2
    )  # both nearest to prototype 0 of class 0
    labels = torch.zeros(1, 1, 2, dtype=torch.int64)
    out = head.training_step(features, labels)
    assert sorted(out.assignment.flatten().tolist()) == [0, 1], "the clustering gives each its share"
    assert out.nearest.flatten().tolist() == [0, 0]
    head.update_(replace(out, embedding=torch.zeros_like(out.embedding)))  # counts, and moves nothing
    assert head.health().dead.tolist()[0] == 1.0
    before = head.prototypes.clone()
    head.prepare_(features, torch.ones_like(labels))
    assert torch.equal(head.prototypes, before)
    head.prepare_(features, labels)
    assert head.health().dead.tolist()[0] == 0.0
    assert head.nearest_usage[0].tolist() == pytest.approx([2 / 1.5, 1 / 1.5]), "used like the average, of 2"
    assert head.health().agreement[0] <= 1
    assert torch.equal(head.prototypes[0, 0], before[0, 0])
    assert head.prototypes[0, 1] @ torch.tensor([0.8, 0.6]) > 0.999 or head.prototypes[0, 1, 0] > 0.999
    assert torch.equal(head.prototypes[1], before[1])
    still = head_of(2, 2, 2, revive_after=0)
    still.load_state_dict(head.state_dict())
    still.nearest_usage[0, 1] = 0
    still.prepare_(features, labels)
    assert torch.equal(still.prototypes, head.prototypes)


def test_no_parameters_and_no_gradient_to_prototypes():
    for classes in (19, 150, 847):
        assert not list(PrototypeHead(8, classes).parameters())
    head = head_of(score_norm="layer_norm")
    assert sum(p.numel() for p in head.parameters()) == 8
    assert not head.prototypes.requires_grad


def test_layer_norm_over_classes_is_the_plain_one():
    head = head_of(score_norm="layer_norm")
    features, _ = batch()
    scores = head_of(logit_scale=1.0)(features)
    expected = F.layer_norm(scores.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)
    assert_close_report(head(features), expected, "logits", atol=1e-5)


def test_distance_is_one_minus_the_nearest_cosine():
    head = head_of()
    features, _ = batch()
    logits, distance = head(features, return_distance=True)
    assert_close_report(distance, 1 - logits.amax(1) / head.settings.logit_scale, "distance")


def test_half_modules_keep_exact_prototypes_and_deterministic_mode_works():
    assert head_of().to(torch.bfloat16).prototypes.dtype == torch.float32
    features, labels = batch()
    torch.use_deterministic_algorithms(True)
    try:
        head = head_of(start="data")
        head.prepare_(features, labels)
        out = head.training_step(features, labels)
        (out.logits.logsumexp(1).mean() + out.ppc).backward()
        head.update_(out)
    finally:
        torch.use_deterministic_algorithms(False)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="start='dat' must be data or random"):
        head_of(start="dat")
    with pytest.raises(ValueError, match="momentum='fast' must be a number or auto"):
        head_of(momentum="fast")
    with pytest.raises(ValueError, match="kappa='big' must be a number"):
        head_of(kappa="big")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        head_of(classes=0)
    features, labels = batch()
    with pytest.raises(ValueError, match=r"labels must be \(2, 5, 7\).*\(2, 5, 6\).*downsample_labels"):
        head_of().training_step(features, labels[..., :6])
    with pytest.raises(ValueError, match=r"features must be \(B, 8, h, w\), got \(2, 6, 5, 7\)"):
        head_of(8)(features)
    with pytest.raises(RuntimeError, match=r"\[4, 3, 6\].*\[4, 5, 6\]"):
        head_of(count=5).load_state_dict(head_of(count=3).state_dict())


def test_a_large_vocabulary_trains_without_the_tensors_of_all_similarities_and_full_logits():
    classes, count, dim, side, stride = 847, 10, 64, 64, 4
    project = torch.nn.Conv2d(16, dim, 1)
    optimizer = torch.optim.AdamW(project.parameters())
    head = head_of(dim, classes, count, ignore_index=-1)
    maps = torch.randn(1, 16, side, side)
    labels = torch.randint(0, classes, (1, side * stride, side * stride))

    def step():
        features = project(maps)
        drawn = torch.arange(0, side * side, 8)[None]
        out = head.training_step(features, downsample_labels(labels, features.shape[-2:]), drawn=drawn)
        loss = upsampled_cross_entropy(out.logits, labels, ignore_index=-1) + out.ppc + out.ppd
        loss.backward()
        optimizer.step()
        head.update_(out)

    similarities = 4 * side**2 * classes * count
    full_logits = 4 * classes * (side * stride) ** 2
    peak = peak_bytes(step)
    assert 4 * side**2 * classes < peak < 0.6 * similarities, f"{peak / similarities:.2f} of N × C × K"
    assert peak < 0.4 * full_logits, f"{peak / full_logits:.2f} of B × C × H × W"


def test_chunks_bound_the_similarities_in_passing(monkeypatch):
    monkeypatch.setattr(similarity, "pixels_at_once", lambda *_: 64)
    head = head_of(64, 847, 10)
    features, _ = batch(1, 64, 64, 64, 847)
    with torch.no_grad():
        peak = peak_bytes(lambda: head(features))
    logits = 4 * 64 * 64 * 847
    assert logits < peak < 4 * logits, f"{peak / logits:.2f} maps of logits"


def test_labels_of_classes_without_prototypes_are_ignored():
    head = head_of(start="data")
    head.initialized[:2] = True
    labels = torch.tensor([[-1, 0, 1], [2, 3, 200], [255, 4, 1]])
    assert head.known(labels).tolist() == [[-1, 0, 1], [255, 255, 200], [255, 4, 1]]
    assert head.known(labels.to(torch.uint8)).dtype == torch.uint8


@pytest.mark.parametrize("term", ["ppc", "ppd"])
def test_compiled_step_has_the_same_gradient(term: str) -> None:
    torch.manual_seed(0)
    head = PrototypeHead(8, 4, 3, start="random")
    features, labels = torch.randn(2, 8, 5, 5), torch.randint(0, 4, (2, 5, 5))

    def loss(features: torch.Tensor) -> torch.Tensor:
        return getattr(head.training_step(2 * features, labels), term)

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        inputs = features.clone().requires_grad_()
        function(inputs).backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
