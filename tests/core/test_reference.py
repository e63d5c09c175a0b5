"""The fast head against the plain one that stands beside the paper's equations."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_report

from protoseg.core import reference
from protoseg.core.prototypes import PrototypeHead
from protoseg.core.update import auto_momentum


@pytest.mark.parametrize("sizes", [(6, 4, 3), (5, 1, 2), (8, 7, 1), (3, 12, 10)])  # D C K
@pytest.mark.parametrize("prior", ["frequency", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_steps_give_the_same_loss_gradient_and_prototypes(sizes, prior, seed):
    torch.manual_seed(seed)
    dim, classes, count = sizes
    head = PrototypeHead(dim, classes, count, start="random", prior=prior, momentum=0.9).double()
    protos = head.prototypes.clone()
    counts = torch.zeros(classes, dtype=torch.double) if prior == "frequency" else None
    for _ in range(3):
        features = torch.randn(2, dim, 5, 7, dtype=torch.double, requires_grad=True)
        labels = torch.randint(0, classes, (2, 5, 7))
        labels[torch.rand(labels.shape) < 0.2] = 255
        out = head.training_step(features, labels)
        loss = F.cross_entropy(out.logits, labels, ignore_index=255) + 0.01 * out.ppc + 0.01 * out.ppd
        (gradient,) = torch.autograd.grad(loss, features)
        head.update_(out)

        emb = F.normalize(features, dim=1).permute(0, 2, 3, 1).reshape(-1, dim)
        label = torch.where(labels == 255, -1, labels).flatten()
        expected, protos = reference.step(emb, label, protos, counts, momentum=0.9)
        assert torch.equal(out.right.flatten() & (label >= 0), out.right.flatten())
        assert_close_report(loss, expected, "loss", atol=1e-12)
        assert_close_report(gradient, torch.autograd.grad(expected, features)[0], "gradient", atol=1e-12)
        assert_close_report(head.prototypes, protos, "prototypes", "CKD", 1e-12)
        if counts is not None:
            counts = reference.count(counts, label)
        logits = reference.logits(emb, protos, counts=counts)
        got = head(features).permute(0, 2, 3, 1).flatten(0, 2)
        assert_close_report(got, logits, "prediction", "NC", 1e-12)


def test_a_class_of_which_no_pixel_is_right_is_moved_by_all():
    protos = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    emb = F.normalize(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.8, 0.6], [0.9, 0.2]]), dim=1)
    labels = torch.tensor([0, 0, 1, 1])  # class 0: one right, one wrong; class 1: none right
    assert reference.moving(emb, labels, protos).tolist() == [True, False, True, True]
    head = PrototypeHead(2, 2, 1, start="random", momentum=0.5)
    head.prototypes.copy_(protos)
    out = head.training_step(emb.t()[None, :, None], labels[None, None])
    head.update_(out)
    moved = [[0.5 * p + 0.5 * F.normalize(m, dim=0) for p, m in zip(protos[:, 0], (emb[0], emb[2:].mean(0)))]]
    assert_close_report(head.prototypes[:, 0], F.normalize(torch.stack(moved[0]), dim=1), "moved", "CD")


def test_the_prior_by_hand():
    head = PrototypeHead(2, 3, 1)
    head.initialized[:2] = True
    head.pixel_counts.copy_(torch.tensor([29.0, 9.0, 100.0]))  # the third class has no prototypes
    expected = torch.tensor([30 / 40, 10 / 40, 1.0]).log()
    assert_close_report(head.log_prior(), expected, "log prior", "C")
    logits, distance = head(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), return_distance=True)
    cosine = (F.normalize(torch.tensor([1.0, 2.0]), dim=0) * head.prototypes[:, 0]).sum(1)
    assert_close_report(logits[0, :2, 0, 0], 20 * cosine[:2] + expected[:2], "logits", "C", 1e-5)
    assert logits[0, 2] < -1e3
    assert_close_report(distance[0, 0, 0], 1 - cosine[:2].max(), "distance, without the prior")


@pytest.mark.parametrize(
    ("iterations", "momentum"), [(1, 0.99), (500, 0.99), (2000, 0.995), (160_000, 0.999)]
)
def test_momentum_follows_the_length_of_the_run(iterations, momentum):
    assert auto_momentum(iterations) == pytest.approx(momentum)
    assert PrototypeHead(2, 2, iterations=iterations).momentum == pytest.approx(momentum)


def test_ppc_of_drawn_pixels_is_that_of_all_in_the_mean():
    torch.manual_seed(0)
    head = PrototypeHead(6, 4, 3, start="random").double()
    features = torch.randn(2, 6, 3, 4, dtype=torch.double, requires_grad=True)
    labels = torch.randint(0, 4, (2, 3, 4))
    labels[0, 0, :2] = 255
    whole = head.training_step(features, labels)
    (gradient,) = torch.autograd.grad(whole.ppc, features, retain_graph=True)
    parts = torch.stack([torch.arange(12).view(4, 3), torch.arange(12).flip(0).view(4, 3)], 1)  # of 4 draws
    outs = [head.training_step(features, labels, drawn=drawn) for drawn in parts]
    assert_close_report(torch.stack([out.ppc for out in outs]).mean(), whole.ppc, "PPC", atol=1e-12)
    grads = [torch.autograd.grad(out.ppc, features)[0] for out in outs]
    assert_close_report(torch.stack(grads).mean(0), gradient, "gradient", atol=1e-12)
    for out in outs:
        assert torch.equal(out.ppd, whole.ppd)
        assert torch.equal(out.logits, whole.logits)
