"""Commands and predictions of a model that was trained with a label tree."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import CLASSES, PALETTE, tiny_config, write_checkpoint, write_folder

import protoseg
from protoseg.commands.cli import execute as command
from protoseg.runtime.errors import UserError

TREE = {"stuff": ["road", "tree"], "thing": ["car"]}  # nodes 3 and 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its data, in which a strip of each label is `stuff`."""
    root = tmp_path_factory.mktemp("tree")
    write_folder(root / "data")
    for path in (root / "data/labels").rglob("*.png"):
        label = np.array(Image.open(path))
        label[10:20] = 40
        Image.fromarray(label).save(path)
    values = tiny_config(root / "data")
    values["data"] |= {"tree": TREE, "label_map": {0: 0, 1: 1, 2: 2, 40: "stuff", 255: "ignore"}}
    write_checkpoint(root / "last.pt", values)
    return root


def test_predict_at_a_level(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = run / "data/images/val/0.png"
    arguments = [str(run), str(image), "--out", str(tmp_path), "--level"]
    assert command("predict", [*arguments, "1"]) == 0
    assert "in labels/: 3 stuff, 4 thing\n" in capsys.readouterr().out
    seg = protoseg.load(run, device="cpu")
    out = seg.predict(image)
    expected = np.array([3, 4, 3])[out.labels]
    with Image.open(tmp_path / "labels/0.png") as label:
        assert np.array_equal(np.asarray(label), expected)
        colours = np.asarray(label.convert("RGB"))
    assert np.array_equal(colours, np.array([*PALETTE, PALETTE[0], PALETTE[1]], np.uint8)[expected])
    assert np.array_equal(out.at_level(1), expected)
    assert np.array_equal(out.at_level(2), out.labels)
    assert out.path(5, 7) == [["stuff", "thing", "stuff"][out.labels[5, 7]], CLASSES[out.labels[5, 7]]]
    with pytest.raises(UserError, match="levels 1-2, got 3"):
        out.at_level(3)
    assert command("predict", [*arguments, "3"]) == 2
    assert f"--level: the tree of {run} has levels 1-2, got 3" in capsys.readouterr().err
    assert command("predict", [*arguments, "1", "--raw-ids"]) == 2
    assert "nodes of a label tree have none" in capsys.readouterr().err


def test_scores_and_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", [str(run), "--out", str(tmp_path / "scores")]) == 0
    assert "mIoU by level of the tree  1: " in capsys.readouterr().out
    assert command("vis_prototypes", [str(run), "--out", str(tmp_path / "figures"), "--samples", "2"]) == 0
    assert (tmp_path / "figures/tree.png").stat().st_size > 5000
    assert '"names":["road","car","tree","stuff","thing"]' in (tmp_path / "figures/index.html").read_text()


def test_a_model_of_other_classes_has_no_tree(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seg = protoseg.load(run, device="cpu")
    seg.model.prototypes.remove_class(1)
    del seg.classes[1], seg.palette[1]
    seg.save_pretrained(tmp_path / "edited")
    image = str(run / "data/images/val/0.png")
    with pytest.raises(UserError, match="no label tree"):
        protoseg.load(tmp_path / "edited", device="cpu").predict(image).path(0, 0)
    arguments = [str(tmp_path / "edited"), image, "--out", str(tmp_path / "out")]
    assert command("predict", [*arguments, "--level", "1"]) == 2
    assert "edited has no label tree; train with data.tree" in capsys.readouterr().err
    assert command("evaluate", [str(tmp_path / "edited")]) == 0
    printed = capsys.readouterr().out
    assert "has no class car: these labels are ignored" in printed
    assert "by level" not in printed
