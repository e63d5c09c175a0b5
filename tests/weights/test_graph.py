"""Exported models say what the model in memory says, at sizes that were not exported."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import CLASSES, PALETTE, tiny_config, write_checkpoint
from torch import nn

import protoseg
from protoseg.commands.cli import execute
from protoseg.commands.export import onnx_runner, program_runner
from protoseg.evaluation.inference import segment
from protoseg.models.backbones import BACKBONES, ResNet
from protoseg.models.checkpoint import load_checkpoint, load_segmenter, save_checkpoint, save_segmenter
from protoseg.models.hrnet import HRNet
from protoseg.models.mit import DIMS_SMALL, MixTransformer
from protoseg.models.segmenter import Segmenter
from protoseg.models.swin import Swin
from protoseg.runtime.errors import UserError
from protoseg.weights.graph import OUTPUTS, exported_program, graph_of, smallest_side

SIZES = [(1, 64, 64), (2, 79, 133), (1, 150, 66)]
# Of the large kinds one block of each sort, since every operation is traced and translated.
SMALL: dict[str, Any] = {
    "resnet18": partial(ResNet, "resnet18"),
    "mit_small": lambda drop_path: MixTransformer(DIMS_SMALL, (1, 1, 1, 1), drop_path),
    "hrnet_w18_small": partial(HRNet, "hrnet_w18_small"),
}


def checkpoint(path: Path, **changes: Any) -> Path:
    write_checkpoint(path, tiny_config(path.parent, **changes))
    return path


def assert_same(graph: nn.Module, run: Any, sizes: list[tuple[int, int, int]] = SIZES) -> None:
    for batch, height, width in sizes:
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        with torch.inference_mode():
            expected = dict(zip(graph.names, graph(images)))
        got = dict(zip(graph.names, run(images.numpy())))
        assert got["labels"].shape == (batch, height, width)
        assert (got["labels"] == expected["labels"].numpy()).mean() > 0.999
        for name in {"logits", "confidence", "distance"} & got.keys():
            assert np.abs(got[name] - expected[name].numpy()).max() < 1e-3, name
        if "prototypes" in got:
            assert (got["prototypes"] == expected["prototypes"].numpy()).mean() > 0.999


def test_the_graph_says_what_predict_says(tmp_path: Path) -> None:
    model, *_ = load_segmenter(checkpoint(tmp_path / "last.pt"))
    images = torch.randint(0, 256, (2, 3, 75, 93), dtype=torch.uint8)
    graph = graph_of(model, "all")
    assert graph.names == OUTPUTS["all"]
    with torch.inference_mode():
        made = dict(zip(graph.names, graph(images)))
    for i, image in enumerate(images):
        expected = segment(model, image, confidence=True, prototypes=True, distance=True)
        assert (made["labels"][i] == expected.classes).float().mean() > 0.999
        same = made["labels"][i] == expected.classes
        assert torch.equal(made["prototypes"][i][same], expected.prototypes[same])
        assert torch.allclose(made["confidence"][i], expected.confidence, atol=1e-4)
        assert torch.allclose(made["distance"][i], expected.distance, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_onnx_and_program_at_other_sizes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, name, SMALL[name])
    head = "hrnet" if "hrnet" in name else "mlp"
    changes = {"backbone": {"name": name}, "decode_head": {"name": head, "dim": 8}}
    path = checkpoint(tmp_path / "last.pt", **changes)
    graph = graph_of(load_segmenter(path)[0], "all")
    assert execute("export", [str(path), "--output", "all"]) == 0
    assert_same(graph, onnx_runner(tmp_path / "model.onnx"))
    if name == "resnet18":
        assert execute("export", [str(path), "--output", "all", "--format", "torch"]) == 0
        assert_same(graph, program_runner(tmp_path / "model.pt2"))


def test_what_stands_in_an_onnx_file(tmp_path: Path) -> None:
    timm = {"name": "timm:test_efficientnet"}  # padded to whole cells, of which 79 pixels leave one in part
    path = checkpoint(tmp_path / "last.pt", classifier="linear", backbone=timm)
    assert execute("export", [str(path), "--out", str(tmp_path / "a.onnx")]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == CLASSES
    assert [tuple(colour) for colour in json.loads(about["palette"])] == PALETTE
    assert {"torch", "protoseg"} <= about.keys()
    (images,), (labels,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, labels.name, labels.type) == (
        "images", "tensor(uint8)", "labels", "tensor(int64)",
    )  # fmt: skip
    assert [isinstance(side, str) for side in images.shape] == [True, False, True, True]
    onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"))
    assert_same(graph_of(load_segmenter(path)[0], "labels"), onnx_runner(tmp_path / "a.onnx"))


def test_an_edited_model_is_exported_as_it_is(tmp_path: Path) -> None:
    model, config, _ = load_segmenter(checkpoint(tmp_path / "first.pt"))
    assert model.prototypes is not None
    model.prototypes.remove_class(1)
    save_segmenter(tmp_path / "last.pt", model, config, ["road", "tree"], [PALETTE[0], PALETTE[2]])
    assert execute("export", [str(tmp_path)]) == 0
    graph = graph_of(load_segmenter(tmp_path)[0], "labels")
    assert_same(graph, onnx_runner(tmp_path / "model.onnx"))
    about = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["road", "tree"]


def test_check_prints_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "last.pt")
    save_checkpoint(path, load_checkpoint(path) | {"optimizer": {"state": torch.ones(2)}})  # as training does
    assert execute("export", [str(path), "--format", "safetensors", "--check"]) == 0
    assert protoseg.load(tmp_path / "shared", "cpu").classes == CLASSES
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["1 × 96 × 128", "2 × 97 × 131", "1 × 165 × 70"]
    assert all("labels equal at 100.0000% of pixels" in line for line in lines[1:])


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    class Peeks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model: Segmenter = load_segmenter(checkpoint(tmp_path / "last.pt"))[0]
    model.decode_head.peeks = Peeks()
    model.decode_head.forward = lambda maps: (model.decode_head.peeks(maps[0]), [])  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^export: layer decode_head\.peeks cannot be exported \(.*\); use"):
        exported_program(graph_of(model, "labels"))


def small_swin(drop_path: float) -> Swin:
    """Two stages, shifted and unshifted windows: every operation of a whole one."""
    net = Swin("swin_t", drop_path)
    net.net.layers, net.norms = net.net.layers[:2], net.norms[:2]
    net.channels, net.strides = net.channels[:2], net.strides[:2]
    del net.net.layers[0].blocks[2:], net.net.layers[1].blocks[1:]
    return net


def test_a_swin_at_other_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, "swin_small", small_swin)
    path = checkpoint(tmp_path / "last.pt", backbone={"name": "swin_small"})
    assert execute("export", [str(path), "--check"]) == 0
    assert "1 × 89 × 121: labels equal at 100.0000%" in capsys.readouterr().out
    graph = graph_of(load_segmenter(path)[0], "labels")
    assert smallest_side(graph.model) == 57
    assert_same(graph, onnx_runner(tmp_path / "model.onnx"), [(1, 57, 57), (2, 63, 92), (1, 132, 58)])
    assert execute("export", [str(path), "--format", "torch"]) == 2
    assert "a Swin cannot be made a torch program" in capsys.readouterr().err


def test_an_extra_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert execute("export", [str(checkpoint(tmp_path / "last.pt"))]) == 2
    message = "error: onnx is not installed; run: pip install 'protoseg[export]'\n"
    assert capsys.readouterr().err == message
    assert execute("export", [str(tmp_path), "--format", "safetensors", "--output", "all"]) == 2
    assert "--output: a folder of safetensors holds the model itself" in capsys.readouterr().err
