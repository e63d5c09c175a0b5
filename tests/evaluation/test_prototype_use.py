"""Prototypes and the pixels of a split, by hand and by loops."""

import pytest
import torch
import torch.nn.functional as F

from protoseg.core.prototypes import PrototypeHead
from protoseg.evaluation.prototype_use import prototype_use
from protoseg.models.official import OfficialPrototypeHead


def test_by_hand() -> None:
    head = PrototypeHead(2, 3, 2, start="random")
    head.prototypes.copy_(torch.tensor([[[1.0, 0], [0, 1]], [[-1.0, 0], [0, -1]], [[1.0, 0], [0, 1]]]))
    pixels = torch.tensor([[3.0, 0], [0, 2], [-0.6, -0.8], [5.0, 1]]).t().view(1, 2, 1, 4)
    got = prototype_use(head, [(pixels, torch.tensor([[[0, 0, 1, 255]]]))])
    assert got["in_use"] == [pytest.approx(2.0), pytest.approx(1.0), None]
    assert got["own_cosine"] == [pytest.approx(1.0), pytest.approx(0.8), None]


def test_by_loops_over_several_images() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(5, 4, 3, start="random")
    samples = [(torch.randn(1, 5, 3, 4), torch.randint(0, 4, (1, 3, 4))) for _ in range(3)]
    got = prototype_use(head, samples)
    for c in range(4):
        pixels = [x[0, :, y, z] for x, label in samples for y in range(3) for z in range(4)
                  if label[0, y, z] == c]  # fmt: skip
        sims = F.normalize(torch.stack(pixels), dim=1) @ head.prototypes[c].T
        share = torch.bincount(sims.argmax(1), minlength=3) / len(pixels)
        assert got["in_use"][c] == pytest.approx(float((-torch.xlogy(share, share).sum()).exp()))
        assert got["own_cosine"][c] == pytest.approx(float(sims.max(1).values.mean()), abs=1e-6)


def test_a_head_with_a_projection_takes_what_an_evaluation_embedded() -> None:
    """Such a head's weights want a gradient, which what inference mode made cannot give."""
    head = OfficialPrototypeHead(8, 2, 3, start="random")
    with torch.inference_mode():
        embedding = torch.randn(1, 8, 2, 4)
    assert None not in prototype_use(head, [(embedding, torch.tensor([[[0, 0, 1, 1]] * 2]))])["in_use"]
