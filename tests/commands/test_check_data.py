"""The check_data command: exit codes, files it writes, and the sampling key it goes with."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import tiny_config, write_folder

from protoseg.commands.cli import execute as command
from protoseg.config import DataConfig
from protoseg.data.datasets import build_dataset
from protoseg.runtime.errors import UserError
from protoseg.training import loop as trainer


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A YAML file beside its sound dataset."""
    write_folder(tmp_path / "data")
    # The two splits hold the same pictures by construction; make them differ.
    for path in (tmp_path / "data/images/val").iterdir():
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path / "data")))
    return tmp_path / "c.yaml"


def test_sound_data(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check_data", [str(config), "--json", str(tmp_path / "report.json")]) == 0
    assert "no errors" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is True
    assert report["images"] == {"train": 3, "val": 3}


def test_broken_data_and_what_to_leave_out(config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "data/images/train/1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    listed = tmp_path / "bad.txt"
    assert command("check_data", [str(config), "--bad-files", str(listed)]) == 1
    assert "images/train/1.png" in listed.read_text().splitlines()
    assert command("check_data", [str(config), f"data.exclude={listed}"]) == 0
    values = tiny_config(tmp_path / "data")["data"]
    data = build_dataset(
        "folder", root=values["root"], split="train", classes=values["classes"], exclude=listed
    )
    assert len(data) == 2


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--prepare"], "leave the option out"),
        (["--threads", "0"], "--threads"),
        (["data.root=/nowhere"], "/nowhere"),
        (["data.val_split=test"], "test"),
        (["data.name=nosuch"], "no dataset 'nosuch'"),
        (["--json", "{config}/report.json"], "cannot write"),
    ],
)
def test_mistakes_are_one_line(
    config: Path, options: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check_data", [str(config), *(option.format(config=config) for option in options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert part in error[-1]
    assert "Traceback" not in "".join(error)


def test_rare_class_sampling_is_a_key(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[object] = []

    def loader(_: object, __: object, data: DataConfig, **___: object) -> None:
        given.append(data.rare_class_temperature)
        raise UserError("far enough")

    monkeypatch.setattr(trainer, "train_loader", loader)
    for i, override in enumerate(([], ["data.rare_class_temperature=0.01"])):
        assert command("train", [str(config), "--out", str(tmp_path / f"run{i}"), *override]) == 2
    assert given == [None, 0.01]
    assert command("train", [str(config), "data.rare_class_temperature=0"]) == 2
    assert "rare_class_temperature" in capsys.readouterr().err
