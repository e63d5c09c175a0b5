"""Distance to the nearest prototype as a score for pixels of an unknown class."""

import pytest
import torch
from helpers import unit_vectors
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from protoseg.core.prototypes import PrototypeHead


def as_map(emb_ND):
    """Pixels (N, D) as a map (1, D, 1, N)."""
    return emb_ND.t()[None, :, None]


@pytest.mark.parametrize("options", [{}, {"logit_scale": 3.0}, {"score_norm": "layer_norm"}])
def test_distance_is_of_the_nearest_live_prototype_before_any_rescaling(options):
    head = PrototypeHead(5, 4, 3, **options)
    emb = unit_vectors(20, 5, seed=1)
    head.initialized[:] = torch.tensor([True, False, True, True])
    _, distance = head(as_map(7 * emb), return_distance=True)
    for n in range(20):
        cosines = [emb[n] @ head.prototypes[c, k] for c in (0, 2, 3) for k in range(3)]
        assert distance[0, 0, n] == pytest.approx(1 - max(cosines).item(), abs=1e-6), f"pixel {n}"


def test_planted_unknown_is_found_by_distance_and_not_by_softmax():
    """An unknown that is nearer to one class than to the others: the softmax is sure of that class."""
    centres = torch.eye(4)
    noise = 0.05 * torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(300) % 3
    known = centres[labels] + noise
    unknown = 0.6 * centres[0] + 0.8 * centres[3] + noise
    head = PrototypeHead(4, 3, 2)
    head.prepare_(as_map(known), labels.view(1, 1, -1))
    logits, distance = head(as_map(torch.cat([known, unknown])), return_distance=True)
    is_unknown = torch.arange(600) >= 300
    assert roc_auc_score(is_unknown, distance.flatten()) > 0.999
    assert logits.softmax(1).amax(1).flatten()[is_unknown].min() > 0.99


def test_a_digit_that_was_never_shown_is_far():
    """Handwritten digits as pixels of 64 channels, 9 being the unknown; the held-out fifth is scored."""
    data = load_digits()
    emb = torch.tensor(data.data - data.data.mean(0), dtype=torch.float32)
    labels, held_out = torch.tensor(data.target), torch.arange(len(data.target)) % 5 == 0
    shown = ~held_out & (labels < 9)
    torch.manual_seed(0)
    head = PrototypeHead(64, 9, 10)
    head.prepare_(as_map(emb[shown]), labels[shown].view(1, 1, -1))
    head.refit([(as_map(emb[shown]), labels[shown].view(1, 1, -1))])
    logits, distance = head(as_map(emb[held_out]), return_distance=True)
    known = labels[held_out] < 9
    accuracy = (logits.argmax(1).flatten() == labels[held_out])[known].double().mean().item()
    assert accuracy > 0.95
    assert roc_auc_score(~known, distance.flatten()) > 0.95
