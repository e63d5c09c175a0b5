"""Mistakes in a command's arguments: one line that says what is wrong, exit code 2."""

import sys
from pathlib import Path

import pytest

from protoseg.commands.cli import execute, main


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "train",
            "the following arguments are required: CONFIG; `protoseg train --help` lists",
        ),
        (
            "train digits_resnet18_k4 --iterations 5",
            "unrecognized arguments: --iterations 5; `protoseg",
        ),
        (
            "train digits_resnet18_k4 optim.lr=fast",
            "digits_resnet18_k4.yaml with optim.lr=fast: optim.lr: ",
        ),
        ("evaluate", "the following arguments are required: RUN_OR_CHECKPOINT; `protoseg evaluate --help`"),
        ("predict run image.png", "the following arguments are required: --out; `protoseg predict --help`"),
        ("predict run image.png --out o --scales big", "argument --scales: invalid float value: 'big'; "),
        ("export run --format tflite", "argument --format: invalid choice: 'tflite'"),
        ("import_weights digits_resnet18_k4 pyproject.toml --out x.pt", "pyproject.toml cannot be read ("),
        ("convert_labels colours . --images . --out o --colours no.yaml", "no.yaml: cannot read this YAML"),
    ],
)
def test_one_line(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text("hello")
    (tmp_path / "mask.png").touch()
    monkeypatch.chdir(tmp_path)
    verb, *arguments = line.split()
    assert execute(verb, arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["protoseg", "trian"])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: argument VERB: invalid choice: 'trian' (choose from")
    assert said.endswith("`protoseg --help` lists what there is\n")
