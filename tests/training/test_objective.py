"""What is minimised: terms, their weights, sizes, and that prototypes get no gradient."""

import copy
from typing import Any

import pytest
import torch
from tiny import small
from torch import Tensor

from protoseg.config import config_from
from protoseg.core.losses import downsample_labels, loss_scale
from protoseg.models.build import build_model
from protoseg.training.objective import Labels, Objective, StepOutput


def objective_of(values: dict[str, Any]) -> Objective:
    """Of five classes, in training."""
    config = config_from(values, "t")
    return Objective(build_model(config, 5), None, config.loss).train()


def step_of(objective: Any, images: Tensor, labels: Tensor) -> StepOutput:
    both = Labels(labels, downsample_labels(labels, objective.model.feature_size(labels)))
    return objective(images, both, objective.loss_scales([both]), torch.arange(len(images)), torch.tensor(0))


def test_prototypes_get_no_gradient_and_forward_changes_nothing() -> None:
    objective = objective_of(small())
    model = objective.model
    before = model.classifier.prototypes.clone()
    images = torch.randint(0, 255, (2, 3, 64, 48), dtype=torch.uint8)
    output = step_of(objective, images, torch.randint(0, 5, (2, 64, 48)))
    output.total.backward()
    assert model.classifier.prototypes.grad is None
    assert not model.classifier.prototypes.requires_grad
    assert torch.equal(before, model.classifier.prototypes)
    model.classifier.update_(output.prototypes)
    assert not torch.equal(before, model.classifier.prototypes)


@pytest.mark.parametrize("classifier", ["prototypes", "linear"])
@pytest.mark.parametrize("size", [(33, 47), (64, 64)])
def test_any_size_and_all_ignored(classifier: str, size: tuple[int, int]) -> None:
    objective = objective_of(small(classifier=classifier))
    model = objective.model
    images = torch.rand(2, 3, *size) * 255
    output = step_of(objective, images, torch.full((2, *size), 255))
    output.total.backward()
    assert output.total.item() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(images).shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    values = small(loss={"ppc": 0.3, "ppd": 0.7, "auxiliary": 0.4})
    values["backbone"], values["decode_head"] = {"name": "resnet18"}, {"name": "fcn", "dim": 16, "dropout": 0}
    output = step_of(objective_of(values), torch.rand(2, 3, 64, 64) * 255, torch.randint(0, 5, (2, 64, 64)))
    terms = output.terms
    expected = terms["ce"] + 0.3 * terms["ppc"] + 0.7 * terms["ppd"] + 0.4 * terms["auxiliary"]
    torch.testing.assert_close(output.total.detach(), expected)


def test_loss_scales_count_all_micro_batches() -> None:
    objective = objective_of(small())
    a, b = torch.zeros(1, 8, 8, dtype=torch.long), torch.full((1, 8, 8), 255)
    b[0, 0, 0] = 1
    scales = objective.loss_scales([Labels(x, downsample_labels(x, (2, 2))) for x in (a, b)])
    assert scales.full == 1 / 65
    assert scales.small == loss_scale([torch.zeros(4)], 255)  # 2 × 2 cells each, those of b are ignored


@pytest.mark.parametrize(
    "switch",
    [{"train": {"channels_last": True}}, {"backbone": {"name": "resnet18", "grad_checkpointing": True}}],
    ids=["channels_last", "grad_checkpointing"],
)
def test_switches_leave_the_loss_alone(switch: dict[str, Any]) -> None:
    images, labels = torch.rand(2, 3, 64, 64) * 255, torch.randint(0, 5, (2, 64, 64))
    losses = []
    for values in (small(), small(**switch)):
        torch.manual_seed(0)
        objective = objective_of(values)
        if values.get("train", {}).get("channels_last"):
            objective.model.to(memory_format=torch.channels_last)
        losses.append(step_of(objective, images, labels).total)
    torch.testing.assert_close(losses[0], losses[1])


def test_compiled_step_has_the_same_loss_and_statistics() -> None:
    torch.manual_seed(0)
    eager = objective_of(small())
    compiled = copy.deepcopy(eager)
    images, labels = torch.rand(2, 3, 32, 32) * 255, torch.randint(0, 5, (2, 32, 32))
    both = Labels(labels, downsample_labels(labels, (8, 8)))
    inputs = images, both, eager.loss_scales([both]), torch.arange(2), torch.tensor(0)
    expected = eager(*inputs).total
    torch.testing.assert_close(torch.compile(compiled, backend="aot_eager")(*inputs).total, expected)
    for (name, a), b in zip(eager.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(b, a, msg=name)
