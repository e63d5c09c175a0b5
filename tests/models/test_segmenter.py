"""Segmenter: what it builds, what learns, what does not."""

from pathlib import Path

import pytest
import torch
from tiny import small
from torch import nn

from protoseg.config import config_from
from protoseg.models.build import build_model
from protoseg.models.checkpoint import load_segmenter, load_weights, save_segmenter
from protoseg.models.segmenter import Segmenter, frozen_running_stats
from protoseg.runtime.errors import UserError


def test_learnable_parameters_do_not_depend_on_classes_or_prototypes() -> None:
    counts = set()
    for classes in (19, 150, 847):
        for k in (1, 10):
            config = config_from(small(prototypes={"num_per_class": k}), "t")
            model = build_model(config, classes)
            counts.add(sum(p.numel() for p in model.parameters()))
            assert model.classifier.prototypes.shape[:2] == (classes, k)
    assert len(counts) == 1


def test_cosine_classifier_is_scale_times_cosine_plus_bias() -> None:
    config = config_from(small(classifier="cosine", prototypes={"logit_scale": 7}), "t")
    classifier = build_model(config, 3).classifier
    torch.testing.assert_close(classifier.weight.norm(dim=1), torch.ones(3))  # longer ones turn too slowly
    nn.init.normal_(classifier.weight)
    nn.init.normal_(classifier.bias)
    x = torch.randn(2, 16, 2, 3)
    logits = classifier(x)
    for b, c, row, column in ((0, 0, 0, 0), (1, 2, 1, 2), (1, 1, 0, 1)):
        weight, pixel = classifier.weight[c], x[b, :, row, column]
        cosine = (weight @ pixel) / (weight.norm() * pixel.norm())
        torch.testing.assert_close(logits[b, c, row, column], 7 * cosine + classifier.bias[c])


def test_frozen_running_stats() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(2, 3, 4, 4) + 3
    with frozen_running_stats(net):
        inside = net(x)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    torch.testing.assert_close(inside, net(x))
    assert not torch.equal(before["0.running_mean"], net[0].running_mean)


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
    # To the bit: rounded once, as in the version that wrote such checkpoints.
    mean, std = (
        torch.tensor(each).view(3, 1, 1) for each in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    seen = model.backbone((image - mean) / std)
    assert torch.equal(old(image), model.classifier(model.decode_head(seen)[0]))


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    model: Segmenter = build_model(config_from(small(), "t"), 5)
    state = model.state_dict()
    state["classifier.prototypes"] = torch.zeros(4, 3, 16)
    with pytest.raises(UserError, match=r"classifier.prototypes is \(4, 3, 16\) in the file, \(5, 3, 16\)"):
        load_weights(model, state, tmp_path / "x.pt")
