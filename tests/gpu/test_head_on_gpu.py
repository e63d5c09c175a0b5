"""Head, clustering, losses and contrast on a GPU against plain versions in double on the CPU."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_report, brute_scores, brute_sinkhorn, brute_update, unit_vectors
from torch import Tensor

from protoseg.core import clustering, losses, similarity
from protoseg.core.clustering import assign, sinkhorn
from protoseg.core.contrast import PixelContrast
from protoseg.core.losses import upsampled_cross_entropy
from protoseg.core.prototypes import PrototypeHead

pytestmark = pytest.mark.gpu
CLASSES, K, D = 7, 4, 16


class Precision(NamedTuple):
    """How the head computes, and how far it may be from the same in double, relative to the largest value."""

    features: torch.dtype
    score_dtype: str
    products: str
    allowed: float
    margin: float  # similarities that differ by less may be the same after rounding


PRECISIONS = {
    "double": Precision(torch.float64, "float32", "highest", 1e-10, 1e-12),
    "fp32": Precision(torch.float32, "float32", "highest", 1e-5, 1e-5),
    "TF32": Precision(torch.float32, "float32", "high", 5e-3, 2e-3),
    "bf16 features": Precision(torch.bfloat16, "float32", "high", 1e-2, 2e-3),
    "bf16": Precision(torch.bfloat16, "bfloat16", "high", 4e-2, 1e-2),
}


def batch(
    dim: int = D, classes: int = CLASSES, side: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Features (2, D, h, w) and labels with ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, dim, side, side, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (2, side, side), generator=generator)
    labels[:, 0] = 255
    return features, labels


def make_head(
    device: torch.device, dim: int = D, classes: int = CLASSES, count: int = K, **options: object
) -> PrototypeHead:
    """Random prototypes, the last class without any."""
    torch.manual_seed(1)
    given = {"start": "random", "prior": "none", "update_pixels": "all", "momentum": 0.9, **options}
    head = PrototypeHead(dim, classes, count, **given)
    head.initialized[-1] = False
    return head.to(device)


def leaf(x: Tensor, where: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that takes a gradient."""
    return x.detach().to(where, dtype, copy=True).requires_grad_()


def close(got: Tensor, expected: Tensor, what: str, allowed: float) -> None:
    """Relative to the largest value."""
    largest = expected.detach().abs().max().item()
    assert_close_report(got.detach().cpu(), expected.detach().cpu(), what, atol=allowed * max(largest, 1e-12))


@pytest.mark.parametrize("chunk_size", [None, 10])
@pytest.mark.parametrize("name", PRECISIONS)
def test_step_against_loops(
    device: torch.device, name: str, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk_size is not None:
        monkeypatch.setattr(similarity, "pixels_at_once", lambda *_: chunk_size)
    p = PRECISIONS[name]
    torch.set_float32_matmul_precision(p.products)
    features, labels = batch(dtype=p.features)
    head = make_head(device, score_dtype=p.score_dtype)
    inputs = leaf(features, device)
    out = head.training_step(inputs, labels.to(device))
    weights = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(2))
    live = head.initialized.cpu()
    shown = live[:, None, None] * weights
    ((out.logits * shown.to(device)).sum() + out.ppc + out.ppd).backward()

    exact = leaf(features, torch.device("cpu"), torch.float64)
    emb = F.normalize(exact.permute(0, 2, 3, 1).reshape(-1, D), dim=1)
    label_N = labels.flatten().clone()
    label_N[label_N == 255] = -1
    label_N[label_N == CLASSES - 1] = -1
    scores, own, lse = brute_scores(
        emb, head.prototypes.cpu().double(), label_N, head.settings.temperature, live
    )
    plan = brute_sinkhorn(
        own.detach(), label_N, CLASSES, head.settings.kappa, head.settings.sinkhorn_iterations
    )
    known = label_N >= 0
    positive = own.gather(1, plan.argmax(1)[:, None])[known, 0]
    ppc = (lse[known] - positive / head.settings.temperature).mean()
    ppd = (1 - positive).square().mean()
    logits = head.settings.logit_scale * scores.view(2, 6, 6, CLASSES).permute(0, 3, 1, 2)
    ((logits * shown).sum() + ppc + ppd).backward()

    close(out.logits[:, :-1], logits[:, :-1], "logits", p.allowed)
    assert (out.logits[:, -1] == -1e4).all()
    close(out.ppc, ppc, "PPC", p.allowed)
    close(out.ppd, ppd, "PPD", p.allowed)
    assert exact.grad is not None
    assert inputs.grad is not None
    # Where two prototypes of a class are as near within rounding, either may be the nearest.
    sims_NCK = torch.einsum("nd,ckd->nck", emb.detach(), head.prototypes.cpu().double())[:, live]
    best_NC2 = sims_NCK.topk(2, dim=2).values
    clear_N = (best_NC2[..., 0] - best_NC2[..., 1]).amin(1) > p.margin
    assert clear_N.sum() >= 15
    rows = [grad.permute(0, 2, 3, 1).reshape(-1, D)[clear_N] for grad in (inputs.grad.cpu(), exact.grad)]
    close(rows[0].double(), rows[1], "gradient", p.allowed)
    # Own-class similarities are exact in every mode, so the assignment is that of the loops.
    assert torch.equal(out.assignment.flatten().cpu(), torch.where(known, plan.argmax(1), -1))
    assert out.labels.flatten().cpu().equal(label_N)


@pytest.mark.parametrize(("kappa", "below"), [(0.05, 0.0), (0.05, 1.0), (0.01, 0.03)])  # logarithms below
def test_sinkhorn_against_loops(
    device: torch.device, kappa: float, below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "LOG_DOMAIN_BELOW", below)
    own = 2 * torch.rand(300, K, generator=torch.Generator().manual_seed(3)) - 1
    labels = torch.randint(-1, CLASSES, (300,), generator=torch.Generator().manual_seed(4))
    plan = sinkhorn(own.to(device), labels.to(device), CLASSES, kappa, 3)
    expected = brute_sinkhorn(own, labels, CLASSES, kappa, 3)
    assert_close_report(plan.cpu(), expected, "plan", "NK", atol=1e-4)
    assert assign(plan, labels.to(device)).cpu().equal(torch.where(labels >= 0, expected.argmax(1), -1))


def test_update_against_loops(device: torch.device) -> None:
    features, labels = batch()
    head = make_head(device)
    before = head.prototypes.cpu().double()
    out = head.training_step(features.to(device), labels.to(device))
    head.update_(out)
    expected = brute_update(
        before, out.embedding.cpu().double(), out.labels.flatten().cpu(), out.assignment.flatten().cpu(), 0.9
    )
    assert_close_report(head.prototypes.cpu(), expected, "prototypes", "CKD", atol=2e-6)
    assert head.usage.sum().item() == (out.assignment >= 0).sum().item()


def test_prototypes_start_and_revive_as_on_the_cpu(device: torch.device) -> None:
    features, labels = batch(side=24)
    heads = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(1)
        head = PrototypeHead(D, CLASSES, K, revive_after=3, prior="none").to(where)
        head.prepare_(features.to(where), labels.to(where))
        head.nearest_usage[2] = 5.0
        head.nearest_usage[2, 1] = 0
        head.prepare_(features.to(where) + 0.1, labels.to(where))
        heads.append(head)
    assert heads[1].initialized.all()
    assert heads[1].nearest_usage[2, 1] > 0
    assert_close_report(heads[1].prototypes.cpu(), heads[0].prototypes, "prototypes", "CKD", atol=1e-5)
    values = [head.health().to_plain() for head in heads]
    for name, expected in values[0].items():
        assert values[1][name] == pytest.approx(expected, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize("name", ["fp32", "TF32", "bf16"])
def test_large_step_against_the_cpu(device: torch.device, name: str) -> None:
    p = PRECISIONS[name]
    torch.set_float32_matmul_precision(p.products)
    features, labels = batch(64, 150, 48, p.features)
    found = []
    exact = (torch.device("cpu"), torch.float64, "float32")
    for where, dtype, score_dtype in (exact, (device, p.features, p.score_dtype)):
        head = make_head(where, 64, 150, 10, score_dtype=score_dtype)
        inputs = leaf(features, where, dtype)
        out = head.training_step(inputs, labels.to(where))
        loss = F.cross_entropy(out.logits, labels.to(where), ignore_index=255) + out.ppc + out.ppd
        loss.backward()
        head.update_(out)
        found.append((out.logits, loss, inputs.grad, head.prototypes, out.assignment))
    logits, loss, gradient, prototypes, assignment = zip(*found)
    close(logits[1][:, :-1], logits[0][:, :-1], "logits", p.allowed)
    close(loss[1], loss[0], "loss", p.allowed)
    error = (gradient[1].cpu().double() - gradient[0]).norm() / gradient[0].norm()
    # A rounded score can make another prototype the nearest one of its class.
    assert error < {"fp32": 2e-3, "TF32": 0.04, "bf16": 0.1}[name], f"gradient off by {error:.3g}"
    same = (assignment[1].cpu() == assignment[0]).double().mean()
    assert same > 0.999, f"only {same:.4%} of the pixels have the same prototype"
    moved = (prototypes[1].cpu() - prototypes[0]).abs().max()
    assert moved < 0.05, f"a prototype differs by {moved:.3g}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_upsampled_cross_entropy(
    device: torch.device, dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", dict.fromkeys(("cpu", "cuda"), 100 * CLASSES))
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, CLASSES, 6, 9, generator=generator).to(dtype)
    labels = torch.randint(0, CLASSES, (2, 23, 37), generator=generator)
    labels[:, :3] = 255
    weights = torch.rand(CLASSES, generator=generator) if weighted else None
    on_device = leaf(logits, device)
    loss = upsampled_cross_entropy(
        on_device,
        labels.to(device),
        ignore_index=255,
        class_weights=None if weights is None else weights.to(device),
    )
    loss.backward()
    exact = leaf(logits, torch.device("cpu"), torch.float64)
    full = F.interpolate(exact, (23, 37), mode="bilinear", align_corners=False)
    weight = None if weights is None else weights.double()
    expected = F.cross_entropy(full, labels, weight=weight, ignore_index=255)
    expected.backward()
    allowed = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    close(loss, expected, "loss", 1e-10 if dtype == torch.float64 else 1e-5)
    assert on_device.grad is not None
    assert exact.grad is not None
    close(on_device.grad, exact.grad, "gradient", allowed)


@pytest.mark.parametrize("pool_size", [64, "full"])
def test_contrast_and_memory_as_on_the_cpu(device: torch.device, pool_size: int | str) -> None:
    found = []
    for where in (torch.device("cpu"), device):
        contrast = PixelContrast(
            D,
            CLASSES,
            12,
            project=False,
            anchors_per_class=6,
            positives=8,
            negatives=16,
            pool_size=pool_size,
            cap_mb=1,
        ).to(where)
        losses, gradients = [], []
        for step in range(5):
            features = unit_vectors(4, 8, 8, D, seed=step, dtype=torch.float64).permute(0, 3, 1, 2)
            features = leaf(features, where)
            generator = torch.Generator().manual_seed(step)
            labels, wrong = (
                torch.randint(0, CLASSES + 1, (4, 8, 8), generator=generator).to(where) for _ in range(2)
            )
            indices = (torch.arange(4) + 4 * step).to(where) % 12
            out = contrast(features, labels, wrong, indices, step)
            out.loss.backward()
            contrast.enqueue_(out.projected, labels, indices, step)
            losses.append(out.loss.detach().cpu())
            assert features.grad is not None
            gradients.append(features.grad.cpu())
        found.append((torch.stack(losses), torch.stack(gradients), contrast.state_dict()))
    assert found[0][0].min() > 0
    close(found[1][0], found[0][0], "losses", 1e-6)
    close(found[1][1], found[0][1], "gradients", 1e-5)
    for name, value in found[0][2].items():
        if value.dtype.is_floating_point:
            close(found[1][2][name], value, name, 1e-6)
        else:
            assert found[1][2][name].cpu().equal(value), name
