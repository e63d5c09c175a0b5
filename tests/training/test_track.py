"""Numbers of a run in the trackers that people have."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protoseg.config import config_from
from protoseg.runtime.errors import UserError
from protoseg.training.log import RunLog

CLASSES, PALETTE = ("a", "b"), ((0, 0, 0), (9, 9, 9))


def log_two_steps(folder: Path, track: str, first: int = 0) -> None:
    log = RunLog(folder, first, CLASSES, PALETTE, [track])
    for step in (first + 1, first + 2):
        log.line("train", step, {"loss": 10.0 - step, "text": "is no number"})
    log.line("eval", first + 2, {"mIoU": 0.5, "prototype_health": {"effective_k": [2.0, None]}})
    log.close()
    assert not (folder / "tensorboard").exists()


def test_mlflow_in_its_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    (tmp_path / "mine").mkdir()
    log_two_steps(tmp_path / "mine", "mlflow")
    log_two_steps(tmp_path / "mine", "mlflow", first=2)  # resumed: goes on in the same run
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("protoseg").experiment_id])
    assert run.info.run_name == "mine"
    assert run.info.status == "FINISHED"
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert history == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
    assert run.data.metrics["eval/mIoU"] == 0.5
    assert run.data.metrics["prototypes/effective_k"] == 2.0


def test_wandb_by_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    asked: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)
    stand_in = SimpleNamespace(init=lambda **options: asked.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for _ in range(2):
        log_two_steps(tmp_path, "wandb")
    assert logged[:3] == [
        ({"train/loss": 9.0}, 1),
        ({"train/loss": 8.0}, 2),
        ({"eval/mIoU": 0.5, "prototypes/effective_k": 2.0}, 2),
    ]
    assert asked[0] == asked[1], "the same folder is the same run"
    assert (asked[0]["name"], asked[0]["resume"]) == (tmp_path.name, "allow")


def test_a_client_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^train\.track: wandb is not installed; run: pip install wandb$"):
        RunLog(tmp_path, 0, CLASSES, PALETTE, ["wandb"])
    with pytest.raises(UserError, match=r"train\.track"):
        config_from({"train": {"track": ["comet"]}}, "test")


def test_a_client_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("api_key not configured\nrun wandb login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fails))
    message = r"^train\.track: wandb does not start \(api_key not configured run wandb login\); mend"
    with pytest.raises(UserError, match=message):
        RunLog(tmp_path, 0, CLASSES, PALETTE, ["wandb"])


def test_a_tracker_that_fails_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    stand_in = SimpleNamespace(init=lambda **_: SimpleNamespace(log=fails, finish=fails))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    log_two_steps(tmp_path, "wandb")
    assert "note: no numbers for wandb: no route; training goes on without" in capsys.readouterr().out
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
