"""Scores against torchmetrics and against loops, and the evaluate command."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CLASSES, tiny_config, write_checkpoint, write_folder
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError, MulticlassJaccardIndex

from protoseg.commands.cli import execute as command
from protoseg.evaluation.inference import Prediction, segment
from protoseg.evaluation.scores import (
    BOUNDARY_RATIO,
    Scores,
    boundary_counts,
    boundary_distance,
    boundary_region,
    confidence_bins,
    evaluate,
)
from protoseg.evaluation.tables import RunScores, print_comparison, print_run

NAMES = tuple(f"class{i}" for i in range(7))
CPU = torch.device("cpu")


def maps(seed: int, count: int = 4, side: int = 24) -> Iterator[tuple[Tensor, Tensor]]:
    """Label and prediction in blocks; class 5 is only ever predicted, class 6 never occurs; some ignored."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        label = torch.randint(0, 5, (side // 4, side // 4), generator=g)
        label = label.repeat_interleave(4, 0).repeat_interleave(4, 1)
        noise = torch.rand(label.shape, generator=g)
        guess = torch.randint(0, 6, label.shape, generator=g)
        prediction = torch.where(noise < 0.3, guess, label)
        label[torch.rand(label.shape, generator=g) < 0.1] = 255
        yield label, prediction


@pytest.mark.parametrize("seed", range(3))
def test_miou_is_that_of_torchmetrics(seed: int) -> None:
    pairs = list(maps(seed))
    predictions = iter([Prediction(prediction, None, None) for _, prediction in pairs])
    samples = [(torch.zeros(3, 4, 4), label, i, "") for i, (label, _) in enumerate(pairs)]
    scores = evaluate(lambda image, size: next(predictions), samples, NAMES, 255, CPU)
    for average, got in (("macro", torch.tensor(scores.miou)), ("none", scores.iou.nan_to_num(0))):
        theirs = MulticlassJaccardIndex(len(NAMES), average=average, ignore_index=255)
        for label, prediction in pairs:
            theirs.update(prediction[None], label[None])
        torch.testing.assert_close(got.double(), theirs.compute().double().nan_to_num(0), rtol=0, atol=1e-6)
    assert scores.to_plain()["IoU"]["class5"] == 0, "predicted but not there: counts as 0"
    assert scores.to_plain()["IoU"]["class6"] is None, "in neither: left out"


def brute_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """The published way: erode one class's mask, padded by zeros, `distance` times by a 3 × 3 square."""
    inside = np.pad(mask, 1)
    for _ in range(distance):
        eroded = np.zeros_like(inside)
        for y in range(1, inside.shape[0] - 1):
            for x in range(1, inside.shape[1] - 1):
                eroded[y, x] = inside[y - 1 : y + 2, x - 1 : x + 2].all()
        inside = eroded
    return mask & ~inside[1:-1, 1:-1]


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_boundary_iou_by_erosion(distance: int) -> None:
    for label, prediction in ((a.numpy(), b.numpy()) for a, b in maps(1, count=2)):
        known = label != 255
        seen = np.where(known, prediction, 255)
        got = boundary_counts(label, prediction, len(NAMES), 255, distance)
        for c in range(len(NAMES)):
            a, b = (brute_boundary(ids == c, distance) for ids in (label, seen))
            expected = [a.sum(), b.sum(), (a & b).sum()]
            assert got[:, c].tolist() == expected, f"class {c} at distance {distance}"


def test_boundary_of_a_square_by_hand() -> None:
    label = np.zeros((7, 7), np.int64)
    label[2:5, 2:5] = 1
    region = boundary_region(label, 1)
    # The rim of the image, the ring around the square, and the square but its middle.
    assert region[label == 1].sum() == 8
    assert not region[3, 3]
    assert region[label == 0].all()
    assert boundary_distance(1024, 2048) == 46
    assert boundary_distance(10, 10) == 1


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_is_that_of_torchmetrics(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    probability = (2 * torch.randn(500, 7, generator=g)).softmax(1)
    label = torch.randint(0, 7, (500,), generator=g)
    theirs = MulticlassCalibrationError(7, n_bins=15, norm="l1")(probability, label)
    confidence, prediction = probability.max(1)
    pixels, total, right = confidence_bins(confidence, prediction == label)
    assert pixels.sum() == 500
    assert ((right - total).abs().sum() / 500).item() == pytest.approx(theirs.item(), abs=1e-6)


def test_confidence_of_one_falls_into_the_last_bin() -> None:
    bins = confidence_bins(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([True, False, True]))
    assert bins[0].nonzero().flatten().tolist() == [0, 7, 14]


def test_all_scores_in_one_loop() -> None:
    pairs = list(maps(3))
    samples = [(torch.zeros(3, 4, 4), label, i, str(i)) for i, (label, _) in enumerate(pairs)]
    sure = iter([Prediction(each, torch.full(each.shape, 0.5), None) for _, each in pairs])
    seen: list[str] = []
    scores = evaluate(
        lambda image, size: next(sure), samples, NAMES, 255, CPU,
        boundary_ratio=0.02, on_sample=lambda name, *tensors: seen.append(name),
    )  # fmt: skip
    assert seen == ["0", "1", "2", "3"]
    # Every pixel is in one bin: the error is the distance of the accuracy from 0.5.
    assert scores.calibration_error == pytest.approx(abs(scores.pixel_accuracy - 0.5), abs=1e-6)
    assert scores.bins is not None
    assert scores.bins[0].sum() == sum((label != 255).sum() for label, _ in pairs)
    counts = sum(boundary_counts(a.numpy(), b.numpy(), len(NAMES), 255, 1) for a, b in pairs)
    assert scores.boundary is not None
    assert scores.boundary.tolist() == counts.tolist()
    assert scores.boundary_iou[0] == pytest.approx(
        counts[2, 0] / (counts[0, 0] + counts[1, 0] - counts[2, 0])
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and two untrained runs, a and b, on it."""
    root = tmp_path_factory.mktemp("evaluate")
    write_folder(root / "data", ("val",))
    for seed, name in enumerate("ab"):
        write_checkpoint(root / name / "last.pt", tiny_config(root / "data"), seed)
    return root


def test_one_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from protoseg.data.datasets import build_dataset
    from protoseg.models.checkpoint import load_segmenter

    files = [tmp_path / name for name in ("scores.json", "classes.csv")]
    options = ["--json", str(files[0]), "--csv", str(files[1]), "--out", str(tmp_path / "figures")]
    assert command("evaluate", [str(folder / "a"), *options]) == 0
    assert "boundary mIoU" in capsys.readouterr().out
    model, _, _ = load_segmenter(folder / "a")
    data = build_dataset("folder", root=folder / "data", split="val", classes=CLASSES)
    samples = [(*data.read(i), i, "") for i in range(len(data))]
    expected = evaluate(
        lambda image, size: segment(model, image, size, confidence=True), samples, data.classes, 255, CPU,
        boundary_ratio=BOUNDARY_RATIO,
    )  # fmt: skip
    scores = json.loads(files[0].read_text())
    assert scores["mIoU"] == pytest.approx(expected.miou)
    assert scores["boundary_mIoU"] == pytest.approx(expected.boundary_iou.nanmean().item())
    assert scores["ECE"] == pytest.approx(expected.calibration_error)
    assert scores["images"] == 3
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [row["class"] for row in rows] == CLASSES
    for row in rows:
        given = float(row["IoU"]) if row["IoU"] else None
        assert given == pytest.approx(scores["IoU"][row["class"]])
    assert sum(int(row["labelled pixels"]) for row in rows) == expected.confusion.sum()
    for name in ("confusion.png", "reliability.png"):
        assert (tmp_path / "figures" / name).stat().st_size > 1000


def test_protocol_options_reach_the_model(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    options = ["--scales", "0.5", "1", "--flip", "--window", "32", "32", "--step", "16", "16"]
    assert command("evaluate", [str(folder / "a"), *options, "--json", str(file)]) == 0
    protocol = json.loads(file.read_text())["protocol"]
    assert protocol == {"window": [32, 32], "step": [16, 16], "scales": [0.5, 1.0], "flip": True}


def test_the_window_of_the_config_is_used_unless_another_is_given(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "last.pt", tiny_config(folder / "data", eval={"window": [32, 48]}))
    for options, window in (([], [32, 48]), (["--window", "16", "16"], [16, 16])):
        file = tmp_path / "scores.json"
        assert command("evaluate", [str(tmp_path / "last.pt"), *options, "--json", str(file)]) == 0
        assert json.loads(file.read_text())["protocol"]["window"] == window


def test_class_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("car [parked]", "[void]", "[/]", "[bold]x", ":smile:", "$a$")
    scores = Scores(names, torch.eye(6, dtype=torch.long), torch.ones(3, 6), torch.ones(3, 15).double())
    run = RunScores("[/title]", scores, {"run": "[/run]"})
    print_run(run)
    print_comparison(run, run)
    shown = capsys.readouterr().out
    assert all(shown.count(name) >= 2 for name in names), shown


def test_two_runs_class_by_class(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "both.json", "both.csv")]
    for name, file in zip("ab", files):
        assert command("evaluate", [str(folder / name), "--json", str(file)]) == 0
    pair = [str(folder / "a"), str(folder / "b")]
    capsys.readouterr()
    assert command("evaluate", [*pair, "--json", str(files[2]), "--csv", str(files[3])]) == 0
    text = capsys.readouterr().out
    a, b, both = (json.loads(file.read_text()) for file in files[:3])
    assert both == {"A": a, "B": b}
    assert f"mIoU: A {100 * a['mIoU']:.2f}  B {100 * b['mIoU']:.2f}" in text
    for row in csv.DictReader(files[3].read_text().splitlines()):
        x, y = a["IoU"][row["class"]], b["IoU"][row["class"]]
        if x is not None and y is not None:
            assert math.isclose(float(row["B - A"]), y - x, abs_tol=1e-12)
            assert f"{100 * (y - x):+.2f}" in text


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["{a}", "{b}", "{a}"], "got 3"),
        (["{a}", "--scales", "0"], "scales"),
        (["{a}", "--window", "0", "8"], "window"),
        (["{a}", "--step", "4", "4"], "give the window"),
        (["{a}", "--boundary", "2"], "--boundary"),
        (["{a}", "--split", "nowhere"], "nowhere"),
        (["{a}", "data.classes=[x,y,z]"], "none of its classes (x, y, z) is one of the model's"),
        (["{a}", "--json", "{a}/last.pt/scores.json"], "cannot write"),
        (["{a}/nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, options: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [option.format(a=folder / "a", b=folder / "b") for option in options]
    assert command("evaluate", filled) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert part in error


def test_unknown_dataset_of_a_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "data", ("val",))
    write_checkpoint(tmp_path / "last.pt", tiny_config(tmp_path / "data"))
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    content["config"]["data"]["name"] = "nosuch"
    torch.save(content, tmp_path / "last.pt")
    assert command("evaluate", [str(tmp_path / "last.pt")]) == 2
    error = capsys.readouterr().err
    assert "no dataset 'nosuch'" in error
    assert error.count("\n") == 1, error
