"""Checkpoints are written here with the names the other programs use, listed independently of the rules."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn

from protoseg import weights
from protoseg.backbones import Backbone, build_backbone
from protoseg.config import UserError
from protoseg.heads import build_decode_head
from protoseg.mit import MixTransformer
from protoseg.weights import load_backbone_weights, load_segmenter_weights, official_state, read_state

DIMS = (8, 16, 40, 64)


def tiny_mit(depths: tuple[int, ...] = (1, 2, 1, 1)) -> Backbone:
    return Backbone(MixTransformer(DIMS, depths))


def randomise(module: nn.Module) -> dict[str, Tensor]:
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1.0)
    return module.state_dict()


def both(prefix: str, theirs: str, ours: str) -> dict[str, str]:
    return {f"{prefix}{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def mit_names(style: str) -> dict[str, str]:
    """Every name in a checkpoint of tiny_mit → ours; brackets mark tensors that are split or joined."""
    names: dict[str, str] = {}
    for i, depth in enumerate((1, 2, 1, 1)):
        embed, norm, block = {
            "original": (f"patch_embed{i + 1}", f"norm{i + 1}", f"block{i + 1}"),
            "hf": (f"encoder.patch_embeddings.{i}", f"encoder.layer_norm.{i}", f"encoder.block.{i}"),
            "mmseg": (f"layers.{i}.0", f"layers.{i}.2", f"layers.{i}.1"),
        }[style]
        conv = {"original": "proj", "hf": "proj", "mmseg": "projection"}[style]
        names |= both("", f"{embed}.{conv}", f"net.stages.{i}.embed")
        embed_norm = "layer_norm" if style == "hf" else "norm"
        names |= both("", f"{embed}.{embed_norm}", f"net.stages.{i}.embed_norm")
        names |= both("", norm, f"net.stages.{i}.norm")
        for j in range(depth):
            ours = f"net.stages.{i}.blocks.{j}"
            pairs = {
                "original": {
                    "norm1": "norm1",
                    "norm2": "norm2",
                    "attn.q": "attn.q",
                    "attn.kv": "attn.kv",
                    "attn.proj": "attn.proj",
                    "mlp.fc1": "ffn.fc1",
                    "mlp.dwconv.dwconv": "ffn.depthwise",
                    "mlp.fc2": "ffn.fc2",
                    "attn.sr": "attn.reduce",
                    "attn.norm": "attn.reduce_norm",
                },
                "hf": {
                    "layer_norm_1": "norm1",
                    "layer_norm_2": "norm2",
                    "attention.self.query": "attn.q",
                    "attention.self.key": "attn.kv[k]",
                    "attention.self.value": "attn.kv[v]",
                    "attention.output.dense": "attn.proj",
                    "mlp.dense1": "ffn.fc1",
                    "mlp.dwconv.dwconv": "ffn.depthwise",
                    "mlp.dense2": "ffn.fc2",
                    "attention.self.sr": "attn.reduce",
                    "attention.self.layer_norm": "attn.reduce_norm",
                },
                "mmseg": {
                    "norm1": "norm1",
                    "norm2": "norm2",
                    "attn.attn.in_proj": "attn.[in]",
                    "attn.attn.out_proj": "attn.proj",
                    "ffn.layers.0": "ffn.fc1",
                    "ffn.layers.1": "ffn.depthwise",
                    "ffn.layers.4": "ffn.fc2",
                    "attn.sr": "attn.reduce",
                    "attn.norm": "attn.reduce_norm",
                },
            }[style]
            for theirs, mine in pairs.items():
                if i == 3 and "reduce" in mine:
                    continue  # the last stage reduces nothing
                names |= both(f"{block}.{j}.", theirs, f"{ours}.{mine}")
    return {k.replace("in_proj.", "in_proj_"): v for k, v in names.items()}


def mit_checkpoint(style: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = {}
    for theirs, ours in mit_names(style).items():
        if "[in]" in ours:
            file[theirs] = torch.cat([state[ours.replace("[in]", "q")], state[ours.replace("[in]", "kv")]])
        elif "[k]" in ours:
            file[theirs] = state[ours.replace("[k]", "")].chunk(2)[0].clone()
        elif "[v]" in ours:
            file[theirs] = state[ours.replace("[v]", "")].chunk(2)[1].clone()
        else:
            file[theirs] = state[ours]
        if style == "mmseg" and (".ffn.layers.0.w" in theirs or ".ffn.layers.4.w" in theirs):
            file[theirs] = file[theirs][:, :, None, None]
    return file


def assert_all_loaded(module: nn.Module, expected: dict[str, Tensor], report: Any, extra: set[str]) -> None:
    for key, value in module.state_dict().items():
        if not key.endswith(("_extra_state", "num_batches_tracked")):
            assert torch.equal(value, expected[key]), key
            assert key in report.matched, key
    assert report.missing == []
    assert set(report.unexpected) == extra, report.unexpected


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
    assert all("research and evaluation only" in str(report) for report in reports)


def hf_config(**options: Any) -> Any:
    options |= {"hidden_sizes": list(DIMS), "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 5, 8]}
    return transformers.SegformerConfig(decoder_hidden_size=24, num_labels=5, **options)


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


def conv_bn(theirs: str, ours: str) -> dict[str, str]:
    names = {f"{theirs}.conv.weight": f"{ours}.0.weight"}
    return names | {
        f"{theirs}.bn.{kind}": f"{ours}.1.{kind}"
        for kind in ("weight", "bias", "running_mean", "running_var")
    }


def head_names(head: str) -> dict[str, str]:
    """mmsegmentation's names of a decode head, or the original SegFormer's → ours."""
    auxiliary = conv_bn("auxiliary_head.convs.0", "decode_head.auxiliary.conv")
    auxiliary |= both("", "auxiliary_head.conv_seg", "decode_head.auxiliary.classifier")
    last = both("", "decode_head.conv_seg", "classifier")
    if head == "mlp":
        names = {"decode_head.linear_fuse.conv.weight": "decode_head.fuse.0.weight"}
        for kind in ("weight", "bias", "running_mean", "running_var"):
            names[f"decode_head.linear_fuse.bn.{kind}"] = f"decode_head.fuse.1.{kind}"
        for i in range(4):
            names |= both("", f"decode_head.linear_c{i + 1}.proj", f"decode_head.linears.{i}")
        return names | both("", "decode_head.linear_pred", "classifier")
    if head == "mlp_branch":
        branches = [conv_bn(f"decode_head.convs.{i}", f"decode_head.branches.{i}") for i in range(4)]
        names = conv_bn("decode_head.fusion_conv", "decode_head.fuse")
        return names | {k: v for branch in branches for k, v in branch.items()} | last
    if head == "fcn":
        convs = conv_bn("decode_head.convs.0", "decode_head.convs.0")
        convs |= conv_bn("decode_head.convs.1", "decode_head.convs.1")
        return convs | conv_bn("decode_head.conv_cat", "decode_head.fuse") | auxiliary | last
    if head == "hrnet":
        return conv_bn("decode_head.convs.0", "decode_head.fuse") | last
    if head == "aspp":
        names = conv_bn("decode_head.image_pool.1", "decode_head.image_mean")
        for i in range(4):
            names |= conv_bn(f"decode_head.aspp_modules.{i}", f"decode_head.branches.{i}")
        return names | conv_bn("decode_head.bottleneck", "decode_head.fuse") | auxiliary | last
    block = "decode_head.1.object_context_block"
    names = conv_bn("decode_head.0.convs.0", "decode_head.coarse.conv")
    names |= both("", "decode_head.0.conv_seg", "decode_head.coarse.classifier")
    names |= conv_bn("decode_head.1.bottleneck", "decode_head.pixels")
    for i in range(2):
        names |= conv_bn(f"{block}.query_project.{i}", f"decode_head.query.{i}")
        names |= conv_bn(f"{block}.key_project.{i}", f"decode_head.key.{i}")
    names |= conv_bn(f"{block}.value_project", "decode_head.value")
    names |= conv_bn(f"{block}.out_project", "decode_head.context")
    names |= conv_bn(f"{block}.bottleneck", "decode_head.fuse")
    return names | both("", "decode_head.1.conv_seg", "classifier")


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
    assert "needs decode_head.name mlp_branch" in str(report)
    assert len(report.unexpected) == len(head_names("mlp_branch"))


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
    torch.save(theirs.state_dict() | {"strange": torch.zeros(1)}, tmp_path / "convnext.pth")
    ours = build_backbone("timm:convnext_atto")
    report = load_backbone_weights(ours, "timm:convnext_atto", str(tmp_path / "convnext.pth"))
    state = theirs.state_dict()
    for key, value in ours.net.net.state_dict().items():
        assert torch.equal(value, state[key.replace("stem_", "stem.").replace("stages_", "stages.")]), key
    assert "strange" in str(report)


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


def test_official_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        backbone = build_backbone("hrnet_w48")
    keys = [key.removeprefix("net.net.") for key in backbone.state_dict()]
    head = {
        "cls_head.0.weight": "decode_head.conv.weight",
        "cls_head.0.bias": "decode_head.conv.bias",
        **{
            f"cls_head.1.{k}": f"decode_head.norm.{k}"
            for k in ("weight", "bias", "running_mean", "running_var")
        },
        **{
            f"proj_head.proj.{i}.{k}": f"classifier.projection.{i}.{k}"
            for i in (0, 2)
            for k in ("weight", "bias")
        },
        **{f"feat_norm.{k}": f"classifier.feature_norm.{k}" for k in ("weight", "bias")},
        **{f"mask_norm.{k}": f"classifier.norm_{k}" for k in ("weight", "bias")},
        "prototypes": "classifier.prototypes",
    }
    file = {f"module.backbone.{key}": torch.randn(2) for key in keys} | {
        f"module.{k}": torch.randn(2) for k in head
    }
    for i in (0, 2):
        for kind in ("weight", "bias"):
            file[f"module.proj_head.mlp2.{i}.{kind}"] = file[f"module.proj_head.proj.{i}.{kind}"]
    file["module.extra"] = torch.zeros(1)
    torch.save({"state_dict": file}, tmp_path / "official.pth")
    state, left = official_state(read_state(tmp_path / "official.pth"))
    expected = {f"backbone.net.net.{key}": file[f"module.backbone.{key}"] for key in keys}
    expected |= {ours: file[f"module.{theirs}"] for theirs, ours in head.items()}
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    assert left == {"extra": "no tensor of this name here"} | {
        f"proj_head.mlp2.{i}.{k}": f"stored twice, equal to proj_head.proj.{i}.{k}"
        for i in (0, 2)
        for k in ("weight", "bias")
    }
