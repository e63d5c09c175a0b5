"""The published code's faults are in the `official` head on purpose, and nowhere else."""

import math

import torch

from protoseg.config import config_from
from protoseg.core.prototypes import PrototypeHead
from protoseg.models.build import build_model
from protoseg.models.official import OfficialPrototypeHead


def test_preset_builds_the_wrapped_head() -> None:
    values = {"data": {"name": "digits"}, "decode_head": {"dim": 8}}
    assert isinstance(
        build_model(config_from(values | {"preset": "official"}, "t")).classifier, OfficialPrototypeHead
    )
    assert not isinstance(build_model(config_from(values, "t")).classifier, OfficialPrototypeHead)


def test_embedding_depends_on_the_row_only_in_the_official_head() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 6, 4, 5)
    other = features.clone()
    other[..., 4] += 1  # another pixel of the same rows
    for head, depends in (
        (OfficialPrototypeHead(6, 3, 2, start="random"), True),
        (PrototypeHead(6, 3, 2, start="random"), False),
    ):
        same = torch.allclose(head(features)[..., 0], head(other)[..., 0], atol=1e-6)
        assert same is not depends


def test_gumbel_draw_keeps_the_share_of_pixels_that_probabilities_as_logits_give() -> None:
    """With a certain plan, argmax(one-hot + Gumbel noise) is the certain one with e / (e + K − 1)."""
    torch.manual_seed(0)
    k, n = 10, 20000
    head = OfficialPrototypeHead(10, 1, k, start="random", score_norm="layer_norm", temperature=1.0)
    head.prototypes.copy_(torch.eye(10)[None])
    corners = torch.eye(10).repeat(1, n // 10).view(1, 10, 100, n // 100)
    head._compared = lambda features: features  # type: ignore[method-assign]
    out = head.training_step(corners, torch.zeros(1, 100, n // 100, dtype=torch.long))
    kept = (out.assignment.flatten() == torch.arange(10).repeat(n // 10)).float().mean().item()
    expected = math.e / (math.e + k - 1)  # 0.232
    assert abs(kept - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_ignored_pixels_get_no_prototype() -> None:
    head = OfficialPrototypeHead(4, 2, 3, start="random")
    labels = torch.tensor([[[0, 255], [1, 255]]])
    out = head.training_step(torch.randn(1, 4, 2, 2), labels)
    assert (out.assignment[labels == 255] == -1).all()
    assert (out.assignment[labels != 255] >= 0).all()
