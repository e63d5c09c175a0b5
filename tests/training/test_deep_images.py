"""One range of values for all images of a run: measured when it begins, and kept."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import tiny_config, write_folder

from protoseg.commands.cli import execute as command
from protoseg.commands.sweep import Task
from protoseg.commands.sweep_rows import Row
from protoseg.data.reading.decode import read_image
from protoseg.evaluation.inference import segment
from protoseg.models.checkpoint import load_segmenter


def deepen(path: Path) -> None:
    """A photograph of 12 bits in place of one of 8."""
    grey = np.array(Image.open(path).convert("L")).astype(np.uint16)
    Image.fromarray(grey * 16).save(path)


def test_the_range_is_measured_once_and_used_by_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    write_folder(data)
    for path in data.glob("images/*/*.png"):
        deepen(path)
    values = tiny_config(data)
    values["data"] |= {"crop": [32, 32], "batch_size": 2, "cat_max_ratio": 1.0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    train = ["train", str(tmp_path / "c.yaml"), "--out", str(run), "eval.samples=0", "checkpoint.interval=1"]
    assert command(train[0], [*train[1:], "train.iterations=2"]) == 0
    model, config, _ = load_segmenter(run)
    assert config.data.value_range == (0, 4095)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["value_range"] == [0, 4095]
    assert command("evaluate", [str(run)]) == 0
    fit = ["decode_head={name: whiten, dim: 168}", "backbone.frozen=true", "--out", str(tmp_path / "fit")]
    assert command("fit", [str(tmp_path / "c.yaml"), *fit]) == 0
    assert load_segmenter(tmp_path / "fit")[1].data.value_range == (0, 4095)

    bright = data / "images/train/bright.png"  # more images later do not move the range
    Image.fromarray(np.full((40, 40), 60000, np.uint16)).save(bright)
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(data / "labels/train/bright.png")
    assert command(train[0], [*train[1:], "train.iterations=2", "--resume", "auto"]) == 0
    assert load_segmenter(run)[1].data.value_range == (0, 4095)

    row = Row("two", ("eval.samples=0", "checkpoint.interval=1", "train.iterations=2"))
    assert Task(row, 0, run, tmp_path / "c.yaml", 2).is_finished(), "a sweep does not train it again"

    image = data / "images/val/0.png"
    assert command("predict", [str(run), str(image), "--out", str(tmp_path / "out")]) == 0
    expected = segment(model, read_image(image, value_range=(0, 4095))).classes
    assert np.array_equal(np.array(Image.open(tmp_path / "out/labels/0.png")), expected)
    options = ["--out", str(tmp_path / "dark"), "--value-range", "0", "65535"]
    assert command("predict", [str(run), str(image), *options]) == 0
    expected = segment(model, read_image(image, value_range=(0, 65535))).classes
    assert np.array_equal(np.array(Image.open(tmp_path / "dark/labels/0.png")), expected)
    capsys.readouterr()
    for option, message in (
        (["--page", "0"], "data.page"),
        (["--page", "2"], "there is no page 2, it holds 1"),
        (["--bands", "1", "2", "0"], "data.bands"),
        (["--value-range", "5", "5"], "low < high"),
    ):
        assert command("predict", [str(run), str(image), "--out", str(tmp_path / "no"), *option]) in (1, 2)
        assert message in capsys.readouterr().err
