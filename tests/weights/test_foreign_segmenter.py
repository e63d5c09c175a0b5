"""Whole segmenters of other programs, in place and through tools/import_weights.py."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
import yaml
from foreign import (
    assert_all_loaded,
    head_names,
    hf_config,
    mit_checkpoint,
    randomise,
    tiny_mit,
)
from torch import Tensor, nn

from protoseg.commands.cli import execute
from protoseg.config import load_config
from protoseg.models.backbones import Backbone, build_backbone
from protoseg.models.build import build_model
from protoseg.models.checkpoint import load_segmenter
from protoseg.models.decode_heads import build_decode_head
from protoseg.weights.foreign_backbone import print_licence
from protoseg.weights.foreign_segmenter import load_segmenter_weights, take_bgr_


class Whole(nn.Module):
    """The parts of a Segmenter that hold weights."""

    def __init__(self, backbone: Backbone, head: str, dim: int | None, classes: int = 5) -> None:
        super().__init__()
        self.backbone = backbone
        channels, strides = backbone.channels, backbone.strides
        self.decode_head = build_decode_head(head, channels, strides, classes, dim=dim)
        self.classifier = nn.Conv2d(self.decode_head.dim, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.decode_head(self.backbone(image))[0])


def test_whole_segformer_equals_hugging_face(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.SegformerForSemanticSegmentation(hf_config())
    theirs.train()(torch.randn(2, 3, 64, 64))  # BatchNorm's running statistics leave 0 and 1
    theirs.eval().save_pretrained(tmp_path)
    ours = Whole(tiny_mit(), "mlp", 24)
    report = load_segmenter_weights(ours, "mit_b0", str(tmp_path))
    assert (report.missing, report.unexpected) == ([], {})
    image = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        assert (ours.eval()(image) - theirs(image).logits).abs().max() <= 1e-5


def test_names_in_memory_of_transformers_5(tmp_path: Path) -> None:
    theirs = transformers.SegformerForSemanticSegmentation(hf_config())
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")
    ours = Whole(tiny_mit(), "mlp", 24)
    report = load_segmenter_weights(ours, "mit_b0", str(tmp_path / "memory.pth"))
    assert (report.missing, report.unexpected) == ([], {})


@pytest.mark.parametrize("head", ["mlp", "mlp_branch", "fcn", "hrnet", "aspp", "ocr"])
def test_whole_segmenters_of_mmsegmentation_and_the_original(head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    style = "original" if head == "mlp" else "mmseg"
    source, target = (Whole(tiny_mit(), head, 12) for _ in range(2))
    expected = randomise(source)
    inner = {k.removeprefix("backbone."): v for k, v in expected.items() if k.startswith("backbone.")}
    file = {f"backbone.{k}": v for k, v in mit_checkpoint(style, inner).items()}
    file |= {theirs: expected[ours] for theirs, ours in head_names(head).items()}
    file |= {"some.buffer": torch.zeros(1)}
    torch.save({"meta": {"CLASSES": ["a"]}, "state_dict": file}, tmp_path / "whole.pth")
    report = load_segmenter_weights(target, "mit_b0", str(tmp_path / "whole.pth"))
    assert_all_loaded(target, expected, report, {"some.buffer"})
    assert report.unexpected == {"some.buffer": "no tensor of this name here"}


def test_mmsegmentation_segformer_on_our_head_says_which_head_it_needs(tmp_path: Path) -> None:
    source = Whole(tiny_mit(), "mlp_branch", 12)
    file = {f"backbone.{k}": v for k, v in mit_checkpoint("mmseg", source.backbone.state_dict()).items()}
    file |= {theirs: source.state_dict()[ours] for theirs, ours in head_names("mlp_branch").items()}
    torch.save(file, tmp_path / "whole.pth")
    report = load_segmenter_weights(Whole(tiny_mit(), "mlp", 12), "mit_b0", str(tmp_path / "whole.pth"))
    assert "it needs decode_head.name mlp_branch" in str(report)
    assert len(report.unexpected) == len(head_names("mlp_branch"))
    # Our own head, which no other program has.
    report = load_segmenter_weights(Whole(tiny_mit(), "whiten", None), "mit_b0", str(tmp_path / "whole.pth"))
    assert "nothing of the file fits the decode head WhitenHead: it needs" in str(report)


CLASSES = ["road", "car", "tree"]


def write_config(path: Path, backbone: str, head: str, **changes: Any) -> Path:
    values = {
        "data": {"name": "folder", "classes": CLASSES, "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]},
        "backbone": {"name": backbone},
        "decode_head": {"name": head, "dropout": 0},
        **changes,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def official_names() -> dict[str, str]:
    """The released HRNet-W48's head (its BatchNorm as published) → ours."""
    names = {"prototypes": "classifier.prototypes"}
    for kind in ("weight", "bias"):
        names[f"cls_head.0.{kind}"] = f"decode_head.conv.{kind}"
        names[f"proj_head.proj.0.{kind}"] = f"classifier.projection.0.{kind}"
        names[f"proj_head.proj.2.{kind}"] = f"classifier.projection.2.{kind}"
        names[f"feat_norm.{kind}"] = f"classifier.feature_norm.{kind}"
        names[f"mask_norm.{kind}"] = f"classifier.norm_{kind}"
    for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        names[f"cls_head.1.{kind}"] = f"decode_head.norm.{kind}"
    return names


def official_file(width: int, name: str, classes: int, num_prototypes: int) -> dict[str, Tensor]:
    """A checkpoint in the released layout, of an HRNet of `width` channels in all, with random numbers."""
    torch.manual_seed(0)
    net = timm.create_model(name, features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    file = {f"backbone.{key}": value for key, value in net.state_dict().items()}
    shapes = {
        "cls_head.0.weight": (width, width, 3, 3),
        "proj_head.proj.0.weight": (width, width, 1, 1),
        "proj_head.proj.2.weight": (width, width, 1, 1),
        "mask_norm.weight": (classes,),
        "mask_norm.bias": (classes,),
        "prototypes": (classes, num_prototypes, width),
    }
    for key in official_names():
        file[key] = torch.randn(shapes.get(key, (width,))) * 0.1
        if key.startswith("cls_head.1.running_var") or (len(file[key].shape) == 1 and "weight" in key):
            file[key] = file[key].abs() + 0.5
    file["cls_head.1.num_batches_tracked"] = torch.tensor(7)
    for key in [key for key in file if key.startswith("proj_head.proj.")]:
        file[key.replace(".proj.", ".mlp2.")] = file[key]  # one module under two names
    return {f"module.{key}": value for key, value in file.items()}


def official_forward(file: dict[str, Tensor], name: str, images: Tensor) -> Tensor:
    """What the published code computes, layer by layer; images of values 0…255."""
    f = {key.removeprefix("module."): value for key, value in file.items()}
    net: Any = timm.create_model(name, features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    for module in net.modules():
        if isinstance(module, nn.Upsample):
            module.mode, module.align_corners = "bilinear", True
    net.load_state_dict({k.removeprefix("backbone."): v for k, v in f.items() if k.startswith("backbone.")})
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    maps = net.eval()((images / 255 - mean) / std)
    size = maps[0].shape[2:]
    x = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=True) for m in maps], dim=1)
    x = F.conv2d(x, f["cls_head.0.weight"], f["cls_head.0.bias"], padding=1)
    mean, var, scale, shift = (
        f[f"cls_head.1.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
    )
    x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu()
    x = F.conv2d(x, f["proj_head.proj.0.weight"], f["proj_head.proj.0.bias"]).relu()
    x = F.conv2d(x, f["proj_head.proj.2.weight"], f["proj_head.proj.2.bias"])
    x = x / x.norm(dim=3, keepdim=True)  # the last axis of (B, D, h, w): the width
    x = x.permute(0, 2, 3, 1)
    x = F.layer_norm(x, x.shape[-1:], f["feat_norm.weight"], f["feat_norm.bias"])
    x = x / x.norm(dim=-1, keepdim=True)
    prototypes = f["prototypes"] / f["prototypes"].norm(dim=-1, keepdim=True)
    best = torch.einsum("bhwd,ckd->bhwck", x, prototypes).amax(-1)
    best = F.layer_norm(best, best.shape[-1:], f["mask_norm.weight"], f["mask_norm.bias"])
    return best.permute(0, 3, 1, 2)


def test_released_protoseg_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        "hrnet_w18",
        "official",
        preset="official",
        prototypes={"num_per_class": 4},
    )
    file = official_file(270, "hrnet_w18", 3, 4)
    settings = {"performance": np.float64(0.8), "gpu": [0, 1]}  # not only plain data, as in that code
    torch.save({"config_dict": settings, "state_dict": file}, tmp_path / "w.pth")
    out = tmp_path / "new" / "official.pt"
    assert execute("import_weights", [str(config), str(tmp_path / "w.pth"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "not used, stored twice, equal to proj_head.proj.0.bias (1): proj_head.mlp2.0.bias" in said
    assert "add --bgr if this file is from it" in said
    assert "prototypes brought to unit length (from 1.4" in said
    model, loaded, content = load_segmenter(out)
    assert (content["classes"], content["palette"][2]) == (CLASSES, [7, 8, 9])
    assert (loaded.preset, model.prototypes is not None) == ("official", True)
    state = model.state_dict()
    ours = official_names() | {
        key[7:]: f"backbone.net.net.{key[16:]}" for key in file if key.startswith("module.backbone.")
    }
    counters = {f"classifier.{k}" for k in ("usage", "nearest_usage", "agreeing", "pixel_counts", "movement")}
    rest = set(state) - set(ours.values()) - counters
    assert rest == {"classifier.initialized", "mean", "std"}
    for theirs, name in ours.items():
        expected = file[f"module.{theirs}"]
        if theirs == "prototypes":
            expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(state[name], expected, rtol=1e-6, atol=1e-7, msg=name)
    images = torch.rand(2, 3, 64, 96) * 255
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), official_forward(file, "hrnet_w18", images), rtol=1e-3, atol=1e-4
        )


def test_the_shipped_config_has_the_shapes_of_the_released_checkpoint() -> None:
    config = load_config("configs/cityscapes_hrnet_w48_official.yaml")
    with torch.device("meta"):
        model = build_model(config)
        file = official_file(720, "hrnet_w48", 19, 10)
    ours = official_names()
    shapes = {ours.get(k[7:], f"backbone.net.net.{k[16:]}"): v.shape for k, v in file.items()}
    counters = {
        f"classifier.{k}"
        for k in ("usage", "nearest_usage", "agreeing", "pixel_counts", "movement", "initialized")
    }
    counters |= {"mean", "std"}
    for name, tensor in model.state_dict().items():
        assert name in counters or shapes[name] == tensor.shape, name


def test_network_trained_on_bgr_takes_rgb() -> None:
    torch.manual_seed(0)
    theirs: Any = build_backbone("hrnet_w18").eval().net
    randomise(theirs.net.bn1)
    ours = copy.deepcopy(theirs)
    take_bgr_(ours)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    rgb = torch.rand(2, 3, 33, 49)
    with torch.no_grad():
        expected = theirs.net.bn1(theirs.net.conv1((rgb.flip(1) - mean) / std))
        got = ours.net.bn1(ours.net.conv1((rgb - mean) / std))
    torch.testing.assert_close(got[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "head"), [("mit_b0", "mlp_branch"), ("resnet18", "fcn"), ("hrnet_w18", "hrnet")]
)
def test_mmsegmentation_through_the_command(
    backbone: str, head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = write_config(tmp_path / "c.yaml", backbone, head, classifier="linear")
    source = build_model(load_config(config))
    expected = randomise(source)
    inner = {k.removeprefix("backbone."): v for k, v in expected.items() if k.startswith("backbone.")}
    if backbone == "mit_b0":
        inner = mit_checkpoint("mmseg", inner, depths=(2, 2, 2, 2))
    file = {f"backbone.{k.removeprefix('net.net.')}": v for k, v in inner.items()}
    file |= {theirs: expected[ours] for theirs, ours in head_names(head).items()}
    torch.save({"meta": {"dataset_meta": {"classes": CLASSES}}, "state_dict": file}, tmp_path / "w.pth")
    print_licence.cache_clear()
    arguments = [str(config), str(tmp_path / "w.pth"), "--out", str(tmp_path / "out.pt")]
    assert execute("import_weights", arguments) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("research and evaluation only") == (backbone == "mit_b0")
    model, _, content = load_segmenter(tmp_path / "out.pt")
    assert content["classes"] == CLASSES
    for key, value in model.state_dict().items():
        if not key.endswith(("_extra_state", "num_batches_tracked")) and key not in ("mean", "std"):
            assert torch.equal(value, expected[key]), key


def test_auxiliary_head_may_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is there for training only."""
    config = write_config(tmp_path / "c.yaml", "resnet18", "fcn", classifier="linear")
    state = build_model(load_config(config)).state_dict()
    file = {k.removeprefix("backbone.net.net."): v for k, v in state.items() if k.startswith("backbone")}
    file |= {theirs: state[ours] for theirs, ours in head_names("fcn").items() if "auxiliary" not in ours}
    torch.save(file, tmp_path / "w.pth")
    arguments = [str(config), str(tmp_path / "w.pth"), "--out", str(tmp_path / "out.pt")]
    assert execute("import_weights", arguments) == 0
    assert "not in the file, left as they were (7): decode_head.auxiliary.conv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["data.classes=[a, b]", "data.palette=null"],
            "conv_seg.weight has shape (3, ",
        ),
        (["classifier=prototypes"], "is not the configured model: classifier."),
        (["decode_head.name=mlp"], "is not the configured model: decode_head.linears.0.weight is not in"),
        (["backbone.name=resnet50"], "layer1.0.conv1.weight has shape (64, 64, 3, 3)"),
        (["backbone.name=mit_b0"], "belongs to mit_b0"),
        (["--bgr"], "--bgr: is for HRNet, not for resnet18; leave the option out"),
    ],
)
def test_mismatch_is_an_error_that_names_the_tensor(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", "resnet18", "fcn", classifier="linear")
    model = build_model(load_config(config, ["decode_head.dim=24"]))
    state = model.state_dict()
    file = {k.removeprefix("backbone.net.net."): v for k, v in state.items() if k.startswith("backbone")}
    file |= {theirs: state[ours] for theirs, ours in head_names("fcn").items()}
    torch.save(file, tmp_path / "w.pth")
    out = tmp_path / "out.pt"
    arguments = [str(config), str(tmp_path / "w.pth"), "--out", str(out), "decode_head.dim=24", *options]
    assert execute("import_weights", arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_deeper_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "c.yaml", "resnet18", "hrnet", classifier="linear")
    state = build_model(load_config(config)).state_dict()
    file = {k.removeprefix("backbone.net.net."): v for k, v in state.items() if k.startswith("backbone")}
    file |= {theirs: state[ours] for theirs, ours in head_names("hrnet").items()}
    file |= {k.replace("layer2.1", "layer2.2"): v for k, v in file.items() if "layer2.1" in k}
    torch.save(file, tmp_path / "w.pth")
    arguments = [str(config), str(tmp_path / "w.pth"), "--out", str(tmp_path / "out.pt")]
    assert execute("import_weights", arguments) == 2
    assert "layer2.2.conv1.weight: backbone.net.net.layer2.2.conv1.weight does not" in capsys.readouterr().err
