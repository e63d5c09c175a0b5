"""Segmenter: what it builds, what learns, what does not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from protoseg.config import config_from
from protoseg.core.losses import loss_scale
from protoseg.models.build import build_model
from protoseg.models.checkpoint import load_segmenter, load_weights, save_segmenter
from protoseg.models.segmenter import Segmenter, StepOutput, frozen_running_stats
from protoseg.runtime.errors import UserError


def small(**changes: Any) -> dict[str, Any]:
    return {
        "data": {"name": "digits"},
        "backbone": {"name": "resnet18"},
        "decode_head": {"dim": 16, "dropout": 0},
        "prototypes": {"num_per_class": 3, "start": "random"},
        **changes,
    }


def test_learnable_parameters_do_not_depend_on_classes_or_prototypes() -> None:
    counts = set()
    for classes in (19, 150, 847):
        for k in (1, 10):
            config = config_from(small(prototypes={"num_per_class": k}), "t")
            model = build_model(config, classes)
            counts.add(sum(p.numel() for p in model.parameters()))
            assert model.classifier.prototypes.shape[:2] == (classes, k)
    assert len(counts) == 1


def test_prototypes_get_no_gradient_and_forward_changes_nothing() -> None:
    model = build_model(config_from(small(), "t"), 5).train()
    before = model.classifier.prototypes.clone()
    output = model(torch.randint(0, 255, (2, 3, 64, 48), dtype=torch.uint8), torch.randint(0, 5, (2, 64, 48)))
    output.total.backward()
    assert model.classifier.prototypes.grad is None
    assert not model.classifier.prototypes.requires_grad
    assert torch.equal(before, model.classifier.prototypes)
    model.classifier.update_(output.prototypes)
    assert not torch.equal(before, model.classifier.prototypes)


@pytest.mark.parametrize("classifier", ["prototypes", "linear"])
@pytest.mark.parametrize("size", [(33, 47), (64, 64)])
def test_any_size_and_all_ignored(classifier: str, size: tuple[int, int]) -> None:
    model = build_model(config_from(small(classifier=classifier), "t"), 5).train()
    images = torch.rand(2, 3, *size) * 255
    output = model(images, torch.full((2, *size), 255))
    assert isinstance(output, StepOutput)
    output.total.backward()
    assert output.total.item() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(images).shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    values = small(loss={"ppc": 0.3, "ppd": 0.7, "auxiliary": 0.4})
    values["backbone"], values["decode_head"] = {"name": "resnet18"}, {"name": "fcn", "dim": 16, "dropout": 0}
    model = build_model(config_from(values, "t"), 5).train()
    output = model(torch.rand(2, 3, 64, 64) * 255, torch.randint(0, 5, (2, 64, 64)))
    terms = output.terms
    expected = terms["ce"] + 0.3 * terms["ppc"] + 0.7 * terms["ppd"] + 0.4 * terms["auxiliary"]
    torch.testing.assert_close(output.total.detach(), expected)


def test_loss_scales_count_all_micro_batches() -> None:
    model = build_model(config_from(small(), "t"), 5)
    a, b = torch.zeros(1, 8, 8, dtype=torch.long), torch.full((1, 8, 8), 255)
    b[0, 0, 0] = 1
    scales = model.loss_scales([a, b])
    assert scales.full == 1 / 65
    assert scales.small == loss_scale([torch.zeros(4)], 255)  # 2 × 2 cells each, those of b are ignored


def test_frozen_running_stats() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(2, 3, 4, 4) + 3
    with frozen_running_stats(net):
        inside = net(x)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    torch.testing.assert_close(inside, net(x))
    assert not torch.equal(before["0.running_mean"], net[0].running_mean)


@pytest.mark.parametrize(
    "switch",
    [{"train": {"channels_last": True}}, {"backbone": {"name": "resnet18", "grad_checkpointing": True}}],
    ids=["channels_last", "grad_checkpointing"],
)
def test_switches_leave_the_loss_alone(switch: dict[str, Any]) -> None:
    images, labels = torch.rand(2, 3, 64, 64) * 255, torch.randint(0, 5, (2, 64, 64))
    losses = []
    for values in (small(), small(**switch)):
        config = config_from(values, "t")
        torch.manual_seed(0)
        model = build_model(config, 5).train()
        if config.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        losses.append(model(images, labels).total)
    torch.testing.assert_close(losses[0], losses[1])


def test_compiled_step_has_the_same_loss_and_statistics() -> None:
    torch.manual_seed(0)
    eager = build_model(config_from(small(), "t"), 5).train()
    compiled = copy.deepcopy(eager)
    images, labels = torch.rand(2, 3, 32, 32) * 255, torch.randint(0, 5, (2, 32, 32))
    expected = eager(images, labels).total
    torch.testing.assert_close(torch.compile(compiled, backend="aot_eager")(images, labels).total, expected)
    for (name, a), b in zip(eager.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(b, a, msg=name)


HALF = (127.5, 127.5, 127.5)


def test_a_backbone_brings_its_own_mean_and_scale(tmp_path: Path) -> None:
    values = small(backbone={"name": "timm:vit_tiny_patch16_224"})  # timm: mean and deviation 0.5
    config = config_from(values, "t")
    model = build_model(config, 5).eval()
    assert model.mean.flatten().tolist() == model.std.flatten().tolist() == list(HALF)
    assert model.mean_colour == (128, 128, 128)
    assert "mean of R, G, B: 127.5, 127.5, 127.5" in repr(model)
    assert "mean of R, G, B: 123.675, 116.28, 103.53" in repr(build_model(config_from(small(), "t"), 5))
    image = torch.rand(1, 3, 32, 32) * 255
    with torch.no_grad():
        for got, want in zip(model.maps(image), model.backbone(image / 127.5 - 1)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    save_segmenter(tmp_path / "new.pt", model, config, list("abcde"), [(0, 0, 0)] * 5)
    assert torch.equal(load_segmenter(tmp_path / "new.pt")[0](image), model(image))
    # A checkpoint from when every network got ImageNet's numbers goes on with them.
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    del content["model"]["mean"], content["model"]["std"]
    torch.save(content, tmp_path / "old.pt")
    old = load_segmenter(tmp_path / "old.pt")[0]
    assert old.mean_colour == (124, 116, 104)
    seen = (image / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(old(image), model.classifier(model.decode_head(model.backbone(seen))[0]))


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    model: Segmenter = build_model(config_from(small(), "t"), 5)
    state = model.state_dict()
    state["classifier.prototypes"] = torch.zeros(4, 3, 16)
    with pytest.raises(UserError, match=r"classifier.prototypes is \(4, 3, 16\) in the file, \(5, 3, 16\)"):
        load_weights(model, state, tmp_path / "x.pt")
