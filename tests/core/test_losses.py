"""Losses against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_report, peak_bytes, run_ranks

from protoseg.core import losses
from protoseg.core.losses import (
    Lerp,
    Widening,
    downsample_labels,
    loss_scale,
    ppc_loss,
    ppd_loss,
    upsampled_cross_entropy,
    upsampled_rows,
)

SIZES = [
    (2, 5, 7, 9, 28, 36),
    (2, 5, 7, 9, 29, 33),
    (1, 3, 8, 8, 5, 6),
    (2, 4, 1, 1, 7, 5),
    (1, 1, 3, 3, 6, 6),
    (1, 4, 6, 5, 6, 5),
    (5, 2, 3, 3, 5, 5),
]


def inputs(b, c, h, w, full_h, full_w, dtype=torch.double):
    generator = torch.Generator().manual_seed(h * full_w)
    logits = (3 * torch.randn(b, c, h, w, generator=generator, dtype=dtype)).requires_grad_()
    labels = torch.randint(0, c, (b, full_h, full_w), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits, labels


def pixels_at_once(monkeypatch, pixels, classes):
    """As many at full resolution, instead of what a cache holds."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", dict.fromkeys(("cpu", "cuda"), pixels * classes))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pixels", [None, 1, 50])  # at full resolution at a time
@pytest.mark.usefixtures("as_on_gpu")
def test_upsampled_cross_entropy_is_interpolate_and_cross_entropy(sizes, weighted, pixels, monkeypatch):
    if pixels is not None:
        pixels_at_once(monkeypatch, pixels, classes=sizes[1])
    logits, labels = inputs(*sizes)
    weights = torch.linspace(0.5, 2, sizes[1], dtype=torch.double) if weighted else None
    got = upsampled_cross_entropy(logits, labels, ignore_index=255, class_weights=weights)
    full = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    expected = F.cross_entropy(full, labels, weights, ignore_index=255)
    assert_close_report(got, expected, "loss", atol=1e-12)
    (got_grad,) = torch.autograd.grad(2 * got, logits)
    (expected_grad,) = torch.autograd.grad(2 * expected, logits)
    assert_close_report(got_grad, expected_grad, "gradient", atol=1e-12)


def test_upsampled_cross_entropy_gradcheck(monkeypatch):
    pixels_at_once(monkeypatch, 20, classes=3)
    logits, labels = inputs(1, 3, 3, 4, 7, 9)
    assert torch.autograd.gradcheck(lambda x: upsampled_cross_entropy(x, labels, ignore_index=255), logits)


def test_upsampled_cross_entropy_holds_no_full_resolution_tensor(monkeypatch):
    pixels_at_once(monkeypatch, 1024, classes=20)
    logits, labels = inputs(2, 20, 16, 16, 128, 128, torch.float32)
    peak = peak_bytes(lambda: upsampled_cross_entropy(logits, labels, ignore_index=255).backward())
    assert 0 < peak < 2 * 20 * 128 * 128 * 4 / 2


@pytest.mark.parametrize("labels_value", [255, 1])
def test_nothing_labelled_gives_zero_with_a_graph_and_autocast_is_promoted(labels_value):
    logits = torch.randn(1, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((1, 8, 8), labels_value)
    with torch.autocast("cpu", torch.bfloat16):
        loss = upsampled_cross_entropy(logits, labels, ignore_index=255)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.isfinite().all()
    assert (loss == 0) == (labels_value == 255)
    assert logits.grad.any() == (labels_value != 255)


def test_upsampled_cross_entropy_compiles_in_one_graph(monkeypatch):
    pixels_at_once(monkeypatch, 30, classes=3)
    logits, labels = inputs(1, 3, 4, 4, 9, 7, torch.float32)

    def function(x, y):
        return upsampled_cross_entropy(x, y, ignore_index=255)

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(logits, labels)
    assert_close_report(got, function(logits, labels), "loss")
    assert_close_report(
        *(torch.autograd.grad(x, logits)[0] for x in (got, function(logits, labels))), "gradient"
    )


def test_scales_make_the_mean_over_ranks_the_global_mean():
    logits, labels = inputs(5, 3, 4, 4, 8, 8)
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=torch.double)
    for class_weights in (None, weights):
        whole = upsampled_cross_entropy(logits, labels, ignore_index=255, class_weights=class_weights)

        def work(rank, all_reduce, class_weights=class_weights):
            part = slice(0, 1) if rank == 0 else slice(2 * rank - 1, 2 * rank + 1)
            scale = loss_scale([labels[part]], 255, class_weights, all_reduce)
            return upsampled_cross_entropy(
                logits[part], labels[part], ignore_index=255, class_weights=class_weights, scale=scale
            )

        assert_close_report(torch.stack(run_ranks(3, work)).mean(), whole, "loss", atol=1e-12)


def test_loss_scale_counts_all_micro_batches_and_never_divides_by_zero():
    a, b = torch.tensor([[0, 255, 1]]), torch.tensor([2])
    assert loss_scale([a, b], 255) == 1 / 3
    assert loss_scale([a, b], 255, torch.tensor([0.5, 0.5, 3.0])) == 1 / 4
    assert loss_scale([torch.full((2,), 255)], 255) == 1
    assert loss_scale([torch.full((2,), 255)], 255, torch.ones(3)) == 1


def test_downsampled_labels_are_under_the_centres_of_cells():
    labels = torch.arange(12 * 8).view(1, 12, 8)
    assert torch.equal(downsample_labels(labels, (3, 4)), labels[:, 2::4, 1::2])
    odd = torch.arange(7 * 5).view(1, 7, 5)
    expected = F.interpolate(odd[None].double(), size=(3, 2), mode="nearest-exact")[0].long()
    assert torch.equal(downsample_labels(odd, (3, 2)), expected)
    assert torch.equal(downsample_labels(odd, (7, 5)), odd)


def test_ppc_and_ppd_by_hand():
    lse, positive = torch.tensor([2.0, 5.0, 9.0]), torch.tensor([0.5, 1.0, 0.0])
    labelled = torch.tensor([True, True, False])
    scale = torch.tensor(0.5)
    assert_close_report(ppc_loss(lse, positive, labelled, 0.5, scale), torch.tensor((1.0 + 3.0) / 2), "PPC")
    assert_close_report(ppd_loss(positive, labelled, scale), torch.tensor(0.25 / 2), "PPD")


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize(
    ("cells", "size"),
    [((5, 7), (20, 28)), ((5, 7), (19, 26)), ((1, 1), (4, 3)), ((9, 8), (5, 6)), ((2, 40), (3, 301))],
)
def test_rows_are_those_of_the_upsampled_map(cells: tuple[int, int], size: tuple[int, int]) -> None:
    logits = torch.randn(3, *cells, generator=torch.Generator().manual_seed(1))
    whole = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    rows, columns = Lerp.between(cells[0], size[0], logits), Widening(cells[1], size[1], logits)
    for at in (slice(top, min(top + 3, size[0])) for top in range(0, size[0], 3)):
        got = upsampled_rows(logits, columns, rows.part(at))
        torch.testing.assert_close(got, whole[:, at], rtol=0, atol=1e-5)
    error = torch.randn(3, cells[0], size[1], generator=torch.Generator().manual_seed(2))
    forth, back = (columns.widen(logits) * error).sum(), (logits * columns.adjoint(error)).sum()
    torch.testing.assert_close(forth, back, rtol=1e-4, atol=1e-4)
