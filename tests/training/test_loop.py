"""The loop: resume, ranks, interruption, and what a user can get wrong."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from ranks import one_and_two_processes
from tiny import CLASSES, PALETTE, five_class_run, write_folder
from torch import nn
from torchvision.io import write_png

from protoseg.commands import train as train_command
from protoseg.commands.cli import execute as command
from protoseg.config import Config, config_from, load_config
from protoseg.data.datasets import open_dataset
from protoseg.data.loader import Batch
from protoseg.evaluation.inference import InferenceSettings, Prediction, segment
from protoseg.models.checkpoint import load_checkpoint, load_segmenter, save_checkpoint
from protoseg.runtime.errors import UserError
from protoseg.training import loop
from protoseg.training.loop import train
from protoseg.training.optimizer import learning_rate_factor
from protoseg.training.step import NonFiniteLoss, build_run, start_prototypes_, train_step

DATA = {"name": "folder", "classes": CLASSES, "palette": PALETTE}
TINY: dict[str, Any] = {
    "data": DATA | {"crop": [32, 32], "batch_size": 2, "workers": 0, "flip": 0},
    "backbone": {"name": "timm:test_efficientnet"},  # 82,300 parameters
    "decode_head": {"dim": 16, "dropout": 0.1},
    "prototypes": {"num_per_class": 2, "revive_after": 25},
    "optim": {"name": "adamw", "lr": 1e-3},
    "train": {"iterations": 4, "log_interval": 10},
    "eval": {"interval": 40, "samples": 1},
    "checkpoint": {"interval": 40},
}


@pytest.fixture(scope="module", autouse=True)
def data_root(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three pictures for training and three for validation."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root)
    TINY["data"]["root"] = str(root)


def write_config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def run_cli(arguments: Sequence[str], **popen: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "protoseg.commands.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # several run at once, and sums depend on this number
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    """Until metrics.jsonl holds a training line at or after `step`."""
    deadline = time.time() + 300
    while time.time() < deadline:
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {process.communicate()[0]}")


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what the clock and the machine decide."""
    clocked = {"images_per_second", "data_wait", "eta_seconds", "memory_gb"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines]


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    arguments = ["train.iterations=100", "train.seed=3"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    first = run_cli(["train", config, "--out", str(broken), *arguments])
    whole = run_cli(["train", config, "--out", str(straight), *arguments])
    wait_for_step(broken, 50, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (broken / "results.json").exists(), "killed half-way"
    again = run_cli(["train", config, "--out", str(broken), "--resume", "auto", *arguments])
    for process in (whole, again):
        text = process.communicate(timeout=240)[0]
        assert process.returncode == 0, text
    assert "going on at step 40" in text
    a, b = load_checkpoint(straight / "last.pt"), load_checkpoint(broken / "last.pt")
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert metrics(straight) == metrics(broken)
    ra, rb = (json.loads((out / "results.json").read_text()) for out in (straight, broken))
    for key in ("mIoU", "aAcc", "mAcc", "IoU", "prototype_health", "best_mIoU", "step"):
        assert ra[key] == rb[key], key


def rank_batches(rank: int, world: int, steps: int, order: Sequence[int] = (0, 1, 2, 3)) -> list[Batch]:
    """Batches of four 32-pixel images; the images' halves hold very unequal numbers of labelled pixels."""
    batches = []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        image = torch.randint(0, 256, (4, 3, 32, 32), generator=g, dtype=torch.uint8)
        label = torch.randint(0, 5, (4, 32, 32), generator=g).repeat_interleave(4, 1)[:, :32]
        label[3, 4:] = 255
        label[2, :, 8:] = 255
        image = (image // 4 + (label[:, None].clamp(max=5) * 30).to(torch.uint8)).to(torch.uint8)
        part = torch.tensor(order[rank * 4 // world : (rank + 1) * 4 // world])
        batches.append(Batch(image[part], label[part], torch.arange(4)[part]))
    return batches


def twenty_steps_twice(rank: int, world: int, out: Path) -> None:
    """One rank's steps, whole and in two micro-batches."""
    for accumulation in (1, 2):
        twenty_steps(rank, world, out, accumulation)


def twenty_steps(rank: int, world: int, out: Path, accumulation: int) -> None:
    """Saves weights, prototypes and assignments."""
    values = {
        **TINY,
        "data": {"name": "digits", "batch_size": 4},
        "decode_head": {"dim": 16, "dropout": 0},
        "loss": {"ppc": 1.0, "ppd": 1.0, "class_weights": [1, 2, 1, 0.5, 3]},
        "optim": {"name": "sgd", "lr": 0.01},
        "prototypes": {"num_per_class": 3, "momentum": 0.9, "revive_after": 6},
        "train": {"iterations": 20, "accumulation": accumulation},
    }
    config = config_from(values, "test")
    run = five_class_run(config, 4, torch.float64)
    seen: list[torch.Tensor] = []
    assert run.model.prototypes is not None
    update = run.model.prototypes.update_

    def recording(*outputs: Any) -> None:
        seen.append(torch.cat([output.assignment.flatten(1) for output in outputs]))
        update(*outputs)

    run.model.prototypes.update_ = recording  # type: ignore[method-assign]
    # Sinkhorn runs per micro-batch. Two ranks make their first micro-batch of the images 0 and 2, so the
    # single process must too.
    order = (0, 2, 1, 3) if (world, accumulation) == (1, 2) else (0, 1, 2, 3)
    losses = [train_step(run, batch)["loss"] for batch in rank_batches(rank, world, 20, order)]
    state = {"model": run.model.state_dict(), "assignment": torch.stack(seen), "loss": losses}
    torch.save(state, out / f"{world}-{accumulation}-{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `twenty_steps` saves, of one process and of two."""
    return one_and_two_processes(twenty_steps_twice, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_equal_one(ranks: Path, accumulation: int) -> None:
    single = torch.load(ranks / f"1-{accumulation}-0.pt", weights_only=True)
    parts = [torch.load(ranks / f"2-{accumulation}-{r}.pt", weights_only=True) for r in range(2)]
    for name, value in single["model"].items():
        assert torch.equal(parts[0]["model"][name], parts[1]["model"][name]), f"ranks differ in {name}"
        torch.testing.assert_close(parts[0]["model"][name], value, rtol=0, atol=1e-5, msg=name)
    torch.testing.assert_close(parts[0]["loss"], single["loss"], rtol=0, atol=1e-6)
    if accumulation == 1:
        assert torch.equal(torch.cat([p["assignment"] for p in parts], dim=1), single["assignment"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_writes_a_checkpoint_and_goes_on(tmp_path: Path, number: int) -> None:
    config, out = str(write_config(tmp_path)), tmp_path / "run"
    arguments = ["train", config, "--out", str(out), "train.iterations=1000", "data.workers=1"]
    process = run_cli(arguments, start_new_session=True)
    wait_for_step(out, 1, process)
    os.killpg(process.pid, number)  # as a terminal and many schedulers do: the workers get it as well
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "Traceback" not in text
    assert "--resume auto goes on" in text
    step = load_checkpoint(out / "last.pt")["step"]
    content = yaml.safe_load((out / "config.yaml").read_text())
    assert content["train"]["iterations"] == 1000
    if number == signal.SIGTERM:
        process = run_cli([*arguments, "--resume", "auto"])
        wait_for_step(out, step + 1, process)
        process.send_signal(number)
        assert f"going on at step {step}" in process.communicate(timeout=60)[0]


def tiny(**sections: dict[str, Any]) -> Config:
    values = {key: {**value, **sections.get(key, {})} for key, value in TINY.items()}
    return config_from(values | {k: v for k, v in sections.items() if k not in values}, "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    train(tiny(), out)
    return out


def test_run_folder_holds_what_design_lists(trained: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "last.pt", "best.pt", "results.json", "curves.png"):
        assert (trained / name).is_file(), name
    assert "tree\t2\t" in (trained / "tensorboard/prototypes/metadata.tsv").read_text()
    assert list((trained / "samples").glob("*.png"))
    results = json.loads((trained / "results.json").read_text())
    for key in ("mIoU", "aAcc", "mAcc", "IoU", "seconds", "images_per_second", "peak_memory_gb", "versions"):
        assert key in results
    assert 0 <= results["mIoU"] <= 1
    assert len(results["prototype_health"]["mean_intra_cosine"]) == 3
    assert len(results["prototype_health"]["effective_k"]) == 3
    assert all(1 <= x <= 2.001 for x in results["prototype_health"]["in_use"] if x is not None)
    assert all(-1 <= x <= 1 for x in results["prototype_health"]["own_cosine"] if x is not None)
    assert not list(trained.rglob("*.part"))


def test_evaluate_agrees_with_the_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command("evaluate", [str(trained), "--json", str(tmp_path / "s.json")]) == 0
    assert "mIoU" in capsys.readouterr().out
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["IoU"] == json.loads((trained / "results.json").read_text())["IoU"]


def errors_of(capsys: pytest.CaptureFixture, verb: str, arguments: list[str]) -> str:
    """The one line on standard error of a command that must fail as a user's mistake."""
    assert command(verb, arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def test_folder_that_holds_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = (trained / "last.pt").read_bytes()
    text = errors_of(capsys, "train", [str(write_config(tmp_path)), "--out", str(trained)])
    assert "already holds a run" in text
    assert "--resume auto" in text
    other = tmp_path / "other.pt"
    other.write_bytes(before)
    arguments = [str(write_config(tmp_path)), "--out", str(trained), "--resume", str(other)]
    assert "already holds a run" in errors_of(capsys, "train", arguments)
    assert (trained / "last.pt").read_bytes() == before


def test_resume_with_another_config(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(write_config(tmp_path)), "--out", str(trained), "--resume", "auto", "optim.lr=0.5"]
    text = errors_of(capsys, "train", arguments)
    assert "optim.lr differ" in text


def test_a_longer_run_goes_on_if_it_is_told_to(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "longer"
    shutil.copytree(trained, out)
    again = [str(write_config(tmp_path)), "--out", str(out), "--resume", "auto", "train.log_interval=1"]
    text = errors_of(capsys, "train", [*again, "train.iterations=6"])
    assert "was to end at train.iterations=4, now 6; add --extend to go on" in text
    text = errors_of(capsys, "train", [*again, "--extend", "train.iterations=3"])
    assert "--extend: train.iterations=3 is not more than the 4" in text
    text = errors_of(capsys, "train", [*again, "--extend", "train.iterations=6", "optim.lr=0.5"])
    assert "optim.lr, train.iterations differ" in text
    monkeypatch.setattr("protoseg.core.prototypes.auto_momentum", lambda iterations: 0.5)
    assert command("train", [*again, "--extend", "train.iterations=6"]) == 0
    assert load_checkpoint(out / "last.pt")["momentum"] == 0.99, "that of the run as it began"
    steps = {line["step"]: line["lr"] for line in metrics(out) if line["kind"] == "train"}
    optim = tiny().optim
    for step in (5, 6):  # as the longer schedule has it
        factor = learning_rate_factor(step - 1, 6, optim.warmup_iterations, optim.power)
        assert steps[step] == pytest.approx(optim.lr * optim.head_lr_multiplier * factor)
    assert json.loads((out / "results.json").read_text())["step"] == 6


def test_an_evaluation_that_fails_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of the step is written before, and the window that is set reaches the model."""
    config, out = tiny(eval={"interval": 2, "window": (48, 40)}), tmp_path / "run"
    windows = []

    def killed(*_: Any, **__: Any) -> None:
        raise MemoryError

    def seen(model: Any, image: Any, size: Any, protocol: InferenceSettings) -> Prediction:
        windows.append(protocol.window)
        return segment(model, image, size, protocol)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate", killed)
        with pytest.raises(MemoryError):
            train(config, out)
    assert load_checkpoint(out / "last.pt")["step"] == 2
    assert not [line for line in metrics(out) if line["kind"] == "eval"]
    monkeypatch.setattr(loop, "segment", seen)
    train(config, out, resume="auto")
    assert [line["step"] for line in metrics(out) if line["kind"] == "eval"] == [2, 4]
    assert windows == [(48, 40)] * 6


@pytest.mark.parametrize("name", ["mlp", "fcn", "aspp", "ocr"])
def test_one_value_per_channel_is_one_line(name: str, tmp_path: Path) -> None:
    config = tiny(decode_head={"name": name}, train={"accumulation": 2})
    with pytest.raises(UserError, match=r"crop.*(larger|more)") as found:
        train(config, tmp_path / "run")
    assert "\n" not in str(found.value)


def test_labels_that_are_ignored_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "data"
    write_folder(root)
    for path in (root / "labels/val").iterdir():
        write_png(torch.full((1, *Image.open(path).size[::-1]), 255, dtype=torch.uint8), str(path))
    results = train(tiny(data={"root": str(root)}), tmp_path / "run")
    assert results["mIoU"] is results["best_mIoU"] is None
    assert "note: no mIoU and no best.pt at step 4: val has no labelled pixel" in capsys.readouterr().out
    assert not (tmp_path / "run/best.pt").exists()


def test_finished_run_resumes_to_its_results(trained: Path, tmp_path: Path) -> None:
    before = json.loads((trained / "results.json").read_text())
    assert command("train", [str(write_config(tmp_path)), "--out", str(trained), "--resume", "auto"]) == 0
    assert json.loads((trained / "results.json").read_text())["IoU"] == before["IoU"]


def test_checkpoint_of_another_architecture(trained: Path, tmp_path: Path, capsys: Any) -> None:
    content = load_checkpoint(trained / "last.pt")
    content["config"]["backbone"]["name"] = "resnet50"
    save_checkpoint(tmp_path / "other.pt", content)
    text = errors_of(capsys, "evaluate", [str(tmp_path / "other.pt")])
    assert "checkpoint of another architecture" in text


def test_truncated_checkpoint(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = (trained / "last.pt").read_bytes()
    for name, content in (("half", data[: len(data) // 2]), ("empty", b""), ("text", b"hello")):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        assert f"{name}.pt" in errors_of(capsys, "evaluate", [str(path)])


def test_checkpoint_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"config": {}, "model": nn.Linear(1, 1), "classes": []}, tmp_path / "code.pt")
    assert "not a safe checkpoint" in errors_of(capsys, "evaluate", [str(tmp_path / "code.pt")])


def test_missing_dataset_names_folder_and_source(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "nowhere"
    text = errors_of(
        capsys,
        "train",
        ["configs/ade20k_segformer_k10.yaml", "--out", str(tmp_path / "o"), f"data.root={root}"],
    )
    assert str(root) in text
    assert "ADEChallengeData2016" in text
    assert not (tmp_path / "o").exists()


def test_class_weights_must_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss.class_weights: 2 weights for 3 classes"):
        train(tiny(loss={"class_weights": [1, 2]}), tmp_path / "o")


def test_unreadable_image_stops_the_run_and_its_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "data")
    image = (tmp_path / "data/images/train/2.png").read_bytes()
    (tmp_path / "data/images/train/2.png").write_bytes(b"not an image")
    changes = [f"data.root={tmp_path / 'data'}", "data.workers=1", "data.batch_size=3"]
    arguments = [str(write_config(tmp_path)), "--out", str(tmp_path / "run"), *changes]
    assert "2.png" in errors_of(capsys, "train", arguments)
    assert not multiprocessing.active_children()
    (tmp_path / "data/images/train/2.png").write_bytes(image)
    assert command("train", arguments) == 0, "nothing was learned: the folder is as good as new"


def test_non_finite_loss_stops_before_the_update(tmp_path: Path) -> None:
    run = build_run(tiny(), tuple("abcde"), ((0, 0, 0),) * 5, 4, torch.device("cpu"))
    batch = rank_batches(0, 1, 1)[0]
    train_step(run, batch)
    with torch.no_grad():
        run.model.decode_head.fuse[1].weight[0] = float("nan")
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    prototypes = run.model.prototypes.prototypes.clone()
    with pytest.raises(NonFiniteLoss, match=r"step 2: the term \w+ is nan; nothing was updated"):
        train_step(run, batch)
    for name, value in run.model.named_parameters():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    assert torch.equal(prototypes, run.model.prototypes.prototypes)
    assert run.step == 1


def test_while_a_class_is_missing_the_labels_are_looked_at_where_the_loader_left_them() -> None:
    run = build_run(tiny(), tuple("abcde"), ((0, 0, 0),) * 5, 4, torch.device("cpu"))
    on_device: Any = [None]  # nothing of it can be read
    run.unseen = {2}
    start_prototypes_(run, torch.tensor([0, 1, 4, 255]).repeat_interleave(4).expand(2, 16, 16), on_device)
    assert run.unseen == {2}
    with pytest.raises(AttributeError):
        start_prototypes_(run, torch.full((2, 16, 16), 2, dtype=torch.uint8), on_device)


def test_linear_classifier_trains_too(tmp_path: Path) -> None:
    results = train(tiny(classifier="linear"), tmp_path / "linear")  # type: ignore[arg-type]
    assert "prototype_health" not in results
    model, config, content = load_segmenter(tmp_path / "linear")
    assert config.classifier == "linear"
    assert content["classes"] == list(open_dataset(config, "val").classes)
    assert not model.training


def test_load_config_of_the_run_folder_is_the_run(trained: Path) -> None:
    assert load_config(trained / "config.yaml") == tiny()


def test_errors_of_the_disk_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: Sequence[str]) -> None:
        raise OSError(28, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr(train_command, "main", fails)
    assert command("train", []) == 2
    said = "error: runs/x/metrics.jsonl: No space left on device; make room or choose another place\n"
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: Sequence[str]) -> None:
        Path("/nonexistent/typo.json").read_text()

    monkeypatch.setattr(train_command, "main", fails)
    with pytest.raises(FileNotFoundError):
        command("train", [])
