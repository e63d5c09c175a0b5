"""A model edited after training: saved with its own class list, and read by every command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, PALETTE, tiny_config, write_checkpoint, write_folder

from protoseg.commands.cli import execute as command
from protoseg.config import config_from
from protoseg.data.datasets import build_dataset
from protoseg.data.file_dataset import with_classes
from protoseg.evaluation.scores import Scores
from protoseg.models.build import build_model
from protoseg.models.checkpoint import load_segmenter, load_weights, save_segmenter
from protoseg.runtime.errors import UserError

NEW_CLASSES, NEW_PALETTE = ["car", "tree", "sky"], [*PALETTE[1:], (9, 9, 200)]
HEADS = {
    "mlp": {"decode_head": {"dim": 8}},
    # Heads with numbers of their own for each class they were trained on, which editing leaves alone.
    "ocr": {
        "decode_head": {"name": "ocr", "dim": 8},
        "prototypes": {"start": "random", "score_norm": "layer_norm"},
    },
    "official": {"preset": "official"},
}


def edit(path: Path) -> None:
    """Forget road, add sky from random pixels twice, merge those two, and change K from 3 to 2."""
    model, config, content = load_segmenter(path)
    head = model.prototypes
    assert head is not None
    torch.manual_seed(3)
    pixels = torch.randn(1, head.dim, 4, 4)
    head.remove_class(0)
    for new in (2, 3):
        assert head.add_class(pixels, torch.full((1, 4, 4), new)) == new
    head.merge_classes(2, 3)
    head.set_num_prototypes(2)
    save_segmenter(path.parent / "edited.pt", model, config, NEW_CLASSES, NEW_PALETTE, content["step"])


@pytest.mark.parametrize("name", HEADS)
def test_saved_and_loaded_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    values = tiny_config(tmp_path / "data", **HEADS[name])
    write_checkpoint(tmp_path / "last.pt", values)
    edit(tmp_path / "last.pt")
    model, config, content = load_segmenter(tmp_path / "edited.pt")
    assert (content["classes"], content["palette"]) == (NEW_CLASSES, [list(c) for c in NEW_PALETTE])
    assert config.prototypes.num_per_class == 2
    assert model.prototypes.prototypes.shape[:2] == (3, 2)
    assert model.prototypes.initialized.all()
    original, _, _ = load_segmenter(tmp_path / "last.pt")
    for key, value in original.decode_head.state_dict().items():
        assert torch.equal(value, model.decode_head.state_dict()[key]), key
    # The commands can be told of other data than the model was trained on; nothing is lost by saving again.
    save_segmenter(tmp_path / "again.pt", model, config, content["classes"], content["palette"])
    again, _, _ = load_segmenter(tmp_path / "again.pt")
    image = torch.rand(1, 3, 32, 32) * 255
    assert torch.equal(again(image), model(image))


def test_another_number_of_classes_loads_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.pt", tiny_config(tmp_path, **HEADS["ocr"]))
    model, config, _ = load_segmenter(tmp_path / "last.pt")
    model.prototypes.add_class(torch.randn(1, 8, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool))
    save_segmenter(tmp_path / "four.pt", model, config, [*CLASSES, "sky"], [*PALETTE, (9, 9, 200)])
    loaded, _, _ = load_segmenter(tmp_path / "four.pt")
    image = torch.rand(1, 3, 32, 32) * 255
    assert loaded(image).shape[1] == 4
    assert torch.equal(loaded(image), model(image))


def test_the_first_tensor_that_differs_is_named(tmp_path: Path) -> None:
    state = build_model(config_from(tiny_config(tmp_path), "test"), 3).state_dict()
    model = build_model(config_from(tiny_config(tmp_path), "test"), 4)
    name = next(name for name, own in model.state_dict().items() if own.shape != state[name].shape)
    with pytest.raises(UserError, match=f"x.pt: .* another architecture: {name} is .* in the file"):
        load_weights(model, dict(reversed(state.items())), Path("x.pt"))


def test_names_and_colours_must_fit_the_model(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "last.pt", tiny_config(tmp_path))
    config = config_from(tiny_config(tmp_path), "test")
    with pytest.raises(ValueError, match="a model of 3 classes needs as many names and colours, got 2 and 3"):
        save_segmenter(tmp_path / "x.pt", model, config, CLASSES[:2], PALETTE)
    with pytest.raises(ValueError, match="class names must differ, got a, b, a"):
        save_segmenter(tmp_path / "x.pt", model, config, ["a", "b", "a"], PALETTE)
    assert not (tmp_path / "x.pt").exists()


def test_every_command_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "data")
    write_checkpoint(tmp_path / "last.pt", tiny_config(tmp_path / "data"))
    edit(tmp_path / "last.pt")
    edited, file = str(tmp_path / "edited.pt"), tmp_path / "scores.json"

    assert command("evaluate", [edited, "--json", str(file), "--csv", str(tmp_path / "classes.csv")]) == 0
    text = capsys.readouterr().out
    assert f"note: {edited} has no class road: these labels are ignored" in text
    scores = json.loads(file.read_text())
    assert list(scores["IoU"]) == NEW_CLASSES
    assert scores["ignored_classes"] == ["road"]
    # By hand: labels by name; sky is not in the data, has no IoU, and predicting it is a mistake.
    model, _, _ = load_segmenter(tmp_path / "edited.pt")
    data = build_dataset("folder", root=tmp_path / "data", split="val", classes=CLASSES)
    hit, union, sky = np.zeros(2), np.zeros(2), 0
    for i in range(len(data)):
        image, label = data.read(i)
        with torch.no_grad():
            small = model(image[None])
        full = torch.nn.functional.interpolate(small, size=label.shape, mode="bilinear")
        prediction = full[0].argmax(0)
        known = (label == 1) | (label == 2)  # not road, not ignored
        sky += int((known & (prediction == 2)).sum())
        for new in range(2):
            mine, seen = label == new + 1, known & (prediction == new)
            hit[new] += int((mine & seen).sum())
            union[new] += int((mine | seen).sum())
    assert sky > 0, "the case is not tested"
    assert [scores["IoU"][name] for name in NEW_CLASSES[:2]] == pytest.approx(list(hit / union))
    assert scores["IoU"]["sky"] is None
    assert scores["mIoU"] == pytest.approx((hit / union).mean())

    assert command("evaluate", [str(tmp_path / "last.pt"), edited]) == 0
    text = capsys.readouterr().out
    assert "the models have different classes, and so have the means below" in text
    assert all(name in text for name in (*CLASSES, "sky"))

    assert (
        command("predict", [edited, str(tmp_path / "data/images/val"), "--out", str(tmp_path / "out")]) == 0
    )
    labels = [np.array(Image.open(path)) for path in sorted((tmp_path / "out").rglob("*.png"))]
    assert labels
    options = [edited, str(tmp_path / "data/images/val"), "--out", str(tmp_path / "raw"), "--raw-ids"]
    capsys.readouterr()
    assert command("predict", options) == 2
    assert "has other classes than its dataset; leave the option out" in capsys.readouterr().err

    assert command("vis_prototypes", [edited, "--out", str(tmp_path / "figures"), "--images", "3"]) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"index.html", "patches_000_car.png", "patches_001_tree.png"} <= names


def test_labels_are_renumbered_by_name() -> None:
    class Data:
        classes, palette, ignore_index = ("a", "b", "c"), ((0, 0, 0),) * 3, 255

        def __len__(self) -> int:
            return 1

        def name(self, index: int) -> str:
            return "one"

        def label(self, index: int) -> torch.Tensor:
            return torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8)

        def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(3, 1, 4, dtype=torch.uint8), self.label(index)

    data = Data()
    assert with_classes(data, ["a", "b", "c"], data.palette) is data
    for classes, expected in (
        (["c", "a", "b"], [1, 2, 0, 255]),
        (["x", "c"], [255, 255, 1, 255]),
        ([*(f"class {i}" for i in range(255)), "b"], [256, 255, 256, 256]),
    ):
        seen = with_classes(data, classes, [(0, 0, 0)] * len(classes))
        assert seen.read(0)[1].tolist() == seen.label(0).tolist() == [expected]
        assert seen.ignore_index == max(255, len(classes))
    with pytest.raises(UserError, match=r"none of its classes \(a, b, c\) is one of the model's \(x, y\)"):
        with_classes(data, ["x", "y"], data.palette)


def test_classes_that_the_data_cannot_show_have_no_iou() -> None:
    confusion = torch.tensor([[8, 2, 0], [0, 5, 5], [0, 0, 0]])
    assert Scores(("a", "b", "c"), confusion).iou.tolist() == [0.8, 5 / 12, 0]
    scores = Scores(("a", "b", "c"), confusion, unlabelled=(2,))
    assert scores.to_plain()["IoU"] == {"a": 0.8, "b": 5 / 12, "c": None}
    assert scores.miou == pytest.approx((0.8 + 5 / 12) / 2)


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/editing.md").read_text(), re.DOTALL)
    write_checkpoint(tmp_path / "runs/mine/last.pt", tiny_config(tmp_path))
    monkeypatch.chdir(tmp_path)
    exec(code, {"images": torch.rand(2, 3, 32, 32) * 255, "masks": torch.ones(2, 32, 32, dtype=torch.bool)})
    model, _, content = load_segmenter(Path("runs/mine/edited.pt"))
    assert model.prototypes.num_classes == len(content["classes"]) == 4
