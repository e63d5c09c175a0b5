"""What a run leaves for TensorBoard, read back as TensorBoard reads it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from protoseg.core.prototypes import PrototypeHead
from protoseg.figures.prototype_figures import cosine_figure
from protoseg.training.log import RunLog, environment

CLASSES = ("road", "traffic light", "unseen")
PALETTE = ((128, 64, 128), (250, 170, 30), (0, 0, 0))


def head() -> PrototypeHead:
    """Class 0 has used its second prototype three times as often as its first; class 2 was never seen."""
    torch.manual_seed(0)
    made = PrototypeHead(4, 3, 2, start="random")
    made.nearest_usage.copy_(torch.tensor([[10.0, 30.0], [1.0, 1.0], [0.0, 0.0]]))
    made.initialized[2] = False
    return made


def test_tensorboard_gets_pictures_and_the_projector_class_names(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, CLASSES, PALETTE)
    made = head()
    log.prototypes(made, step=10)
    made.prototypes[0, 0] = torch.tensor([1.0, 0, 0, 0])
    log.prototypes(made, step=20)
    log.close()
    board = tmp_path / "tensorboard"
    events = EventAccumulator(str(board)).Reload()
    assert set(events.Tags()["images"]) == {"prototypes/cosines", "prototypes/shares"}
    for name in events.Tags()["images"]:
        shown = events.Images(name)
        assert [event.step for event in shown] == [10, 20]
        picture = np.asarray(Image.open(io.BytesIO(shown[0].encoded_image_string)))
        assert picture.std() > 10, f"{name} is blank"
    config = text_format.Parse((board / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (entry,) = config.embeddings
    about = [line.split("\t") for line in (board / entry.metadata_path).read_text().splitlines()]
    assert about == [
        ["class", "prototype", "share"],
        ["road", "1", "0.250"],
        ["road", "2", "0.750"],
        ["traffic light", "1", "0.500"],
        ["traffic light", "2", "0.500"],
    ]
    vectors = np.loadtxt(board / entry.tensor_path, delimiter="\t")
    np.testing.assert_allclose(vectors, made.prototypes[:2].flatten(0, 1), atol=1e-4)


def test_prototypes_that_are_all_the_same_can_be_drawn(tmp_path: Path) -> None:
    same = np.full((2, 2, 4), 0.5000001, np.float32)
    matrix = cosine_figure(same, ["a", "b"]).axes[0]
    assert np.ptp(matrix.images[0].get_array()) == 0
    log = RunLog(tmp_path, 0, CLASSES, PALETTE)
    log.prototypes(PrototypeHead(4, 3, 2), step=1)
    assert not (tmp_path / "tensorboard/prototypes").exists(), "nothing to show before the first step"


def test_results_are_written_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert environment(torch.device("cpu"))["git_commit"] is None


def test_nothing_that_only_shows_a_training_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names as file systems take them, then a folder in which nothing can be written."""
    log = RunLog(tmp_path, 0, ("a$b$", "tab\tand\nline", "[/]"), PALETTE)
    image, label = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.tensor([[0, 1]] * 2).repeat(4, 4)
    for name in ("图" * 82, f"{'a' * 130}/{'b' * 130}", "stra\udcdfe", "a$x$b"):
        log.sample(name, image, label, label, 255, 60)
    log.prototypes(head(), 60)
    assert capsys.readouterr().out == ""
    names = [path.name for path in (tmp_path / "samples").iterdir()]
    assert len(names) == 4
    assert all(len(name.encode()) <= 255 and name.endswith("_000060.png") for name in names)
    about = (tmp_path / "tensorboard/prototypes/metadata.tsv").read_text().splitlines()
    assert about[3] == "tab and line\t1\t0.500"
    log.folder = log.metrics = tmp_path / "metrics.jsonl/not a folder"
    for step in (61, 62):
        log.line("train", step, {"loss": 1.0})
        log.sample("x", image, label, label, 255, step)
        log.curves()
    log.close()
    notes = capsys.readouterr().out.splitlines()
    assert [note.split(":")[0:2] for note in notes] == [
        ["note", " no line of metrics.jsonl"],
        ["note", " no picture of x"],
        ["note", " no curves.png"],
    ], "each kind once"
