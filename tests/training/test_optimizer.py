"""What the optimiser is told: which numbers decay, how far a step may go, which pixels PPC sees."""

from typing import Any

import pytest
import torch

from protoseg.config import config_from
from protoseg.data.loader import Batch
from protoseg.training.optimizer import parameter_groups
from protoseg.training.step import Run, build_run, draw_share, to_device, train_step


def small_run(**sections: dict[str, Any]) -> Run:
    values: dict[str, Any] = {
        "data": {"name": "digits", "batch_size": 2},
        "backbone": {"name": "timm:test_efficientnet"},
        "decode_head": {"dim": 8, "dropout": 0},
        "optim": {"name": "sgd", "lr": 1, "momentum": 0, "weight_decay": 0, "head_lr_multiplier": 1},
        **sections,
    }
    config = config_from(values, "test")
    return build_run(config, tuple("abc"), ((0, 0, 0),) * 3, 2, torch.device("cpu"))


@pytest.fixture
def batch() -> Batch:
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    label = torch.arange(4).clamp(max=2).repeat_interleave(16).repeat(2, 64, 1)
    return Batch(image, label, torch.arange(2))


def test_norms_and_biases_do_not_decay_and_the_head_has_its_own_rate() -> None:
    optim = {"lr": 0.1, "weight_decay": 0.02, "head_lr_multiplier": 10}
    run = small_run(optim=optim)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in parameter_groups(run.objective, run.config.optim)
        for p in group["params"]
    }
    names = dict(run.objective.named_parameters())
    assert len(found) == len(names)
    for name, p in names.items():
        rate = 0.1 if name.startswith("model.backbone.") else 1.0
        assert found[id(p)] == (pytest.approx(rate), 0.02 if p.ndim > 1 else 0), name


@pytest.mark.parametrize("most", [None, 1e-3])
def test_no_step_is_longer_than_the_clipped_gradient(most: float | None, batch: Batch) -> None:
    run = small_run(train={"grad_clip": most})
    before = torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
    norm = train_step(run, batch)["grad_norm"]  # of the gradient as it was
    moved = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) - before).norm().item()
    assert norm > 0.01
    assert moved == pytest.approx(most or norm, rel=1e-2)


def test_ppc_gets_its_share_of_the_pixels(batch: Batch) -> None:
    for share, drawn in ((0.25, 16 * 16 // 4), (1e-6, 1), (1.0, None)):
        run = small_run(loss={"ppc_pixels": share})
        pixels = draw_share(run, to_device(batch, run), share)
        assert (None if pixels is None else pixels.shape[1]) == drawn
