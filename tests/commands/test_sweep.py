"""Sweeps: the grid, killing and going on, the tables, Slurm, and what a user can get wrong."""

import json
import multiprocessing
import os
import re
import shlex
import signal
import stat
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_config, write_folder

from protoseg.commands.cli import execute as command
from protoseg.commands.sweep import Task, run_in_queue, run_sweep
from protoseg.commands.sweep_rows import load_sweep, slug
from protoseg.commands.sweep_tables import Record, mean_sd, read_record, sweep_figure, to_csv, to_markdown
from protoseg.figures.pictures import save_figure
from protoseg.runtime.errors import UserError
from protoseg.training.log import read_metrics


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of three steps on three pictures."""
    write_folder(tmp_path / "data")
    values = tiny_config(
        tmp_path / "data",
        decode_head={"dim": 8, "dropout": 0.1},
        prototypes={"num_per_class": 2, "revive_after": 0},
        train={"iterations": 3, "log_interval": 1},
        eval={"samples": 0},
        checkpoint={"interval": 2},
    )
    values["data"] |= {"crop": [32, 32], "batch_size": 2}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class InThisProcess(Executor):
    """Without the seconds that a process takes to start; the commands are the same."""

    def submit(self, run: Any, task: Task, stop: Event) -> Future:  # type: ignore[override]
        ended: Future[int] = Future()
        ended.set_result(command(task.command[0], task.command[1:]))
        return ended


def timeless(table: str) -> list[list[str]]:
    """Cells of results.csv or results.md without the seconds per step."""
    split = [re.split(r"\s*[|,]\s*", line) for line in table.splitlines()]
    gone = next(i for i, name in enumerate(split[0]) if name in ("seconds_per_step", "s/step"))
    return [cells[:gone] + cells[gone + 1 :] for cells in split]


def forked_sweep(arguments: list[str]) -> multiprocessing.process.BaseProcess:
    """The command in a fork, which starts at once; its runs are processes of their own, as always."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: sys.exit(command("sweep", arguments)))
    process.start()
    return process


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums depend on the number of threads, and so would the tables."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_killed_sweep_goes_on_and_ends_with_the_same_table(config: Path, tmp_path: Path) -> None:
    """The sweep and its run are killed; then the sweep alone, whose run works on and is waited for."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    arguments = [str(config), "--vary", "train.iterations=25", "--seeds", "2"]
    sweep = load_sweep(config, ["train.iterations=25"], 2)
    run_sweep(sweep, straight, InThisProcess(), run_in_queue)
    folder = broken / "iterations-25/seed0"

    def start_and_kill(with_run: bool) -> None:
        process = forked_sweep([*arguments, "--out", str(broken)])
        deadline = time.time() + 300
        while not (holders(folder / "lock") and read_metrics(folder)):
            assert time.time() < deadline, "the first run never started"
            time.sleep(0.02)
        process.kill()
        process.join()
        if with_run:
            for pid in holders(folder / "lock"):
                os.kill(pid, signal.SIGKILL)

    start_and_kill(with_run=True)
    assert 1 <= read_metrics(folder)[-1]["step"] < 25, "killed half-way"
    assert not (folder / "results.json").exists()
    start_and_kill(with_run=False)
    assert not (broken / "results.csv").exists()
    assert command("sweep", [*arguments, "--out", str(broken)]) == 0
    assert (folder / "log.txt").read_text().count("going on at step") <= 2
    done = straight / "iterations-25/seed1/results.json"
    before = done.stat().st_mtime_ns
    assert command("sweep", [*arguments, "--out", str(straight)]) == 0
    assert done.stat().st_mtime_ns == before, "a finished run was run again"
    for name in ("results.csv", "results.md"):
        assert timeless((broken / name).read_text()) == timeless((straight / name).read_text())
    assert (broken / "results.png").stat().st_size > 5000
    scores = [json.loads(p.read_text())["mIoU"] for p in straight.glob("*/*/results.json")]
    assert len(scores) == 2
    mean, sd = 100 * statistics.mean(scores), 100 * statistics.stdev(scores)
    assert f"| iterations=25 | {mean:.1f} ± {sd:.1f} |" in (straight / "results.md").read_text()


def holders(lock: Path) -> list[int]:
    """Processes that have the lock file open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(fd) == str(lock) for fd in folder.iterdir()):
                found.append(int(folder.parent.name))
        except OSError:
            continue  # ended meanwhile, or not ours
    return found


def test_interrupt_lets_the_runs_write_their_checkpoints(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    long = ["--vary", "train.iterations=5000", "--vary", "checkpoint.interval=5000"]
    process = forked_sweep([str(config), "--out", str(out), *long])
    deadline = time.time() + 300
    while not any(read_metrics(folder) for folder in out.glob("*/*")):
        assert time.time() < deadline, "the run never started"
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=60)
    text = capfd.readouterr().out
    assert process.exitcode == 128 + signal.SIGINT, text
    assert "stopping 1 of 1 runs" in text
    assert "the same command goes on" in text
    assert len(list(out.glob("*/*/last.pt"))) == 1


def test_a_failed_run_is_named_and_the_others_count(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), "--vary", "classifier=linear", "--vary", "data.val_split=val,nowhere"]
    assert command("sweep", [*arguments, "--out", str(tmp_path / "out"), "--jobs", "2"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "1 of 2 runs failed; the first, classifier=linear, val_split=nowhere with seed 0" in message
    assert str(tmp_path / "out/classifier-linear-val_split-nowhere/seed0/log.txt") in message
    assert "images/nowhere does not exist" in message
    table = (tmp_path / "out/results.md").read_text().splitlines()
    assert "| – |" in table[2], "a linear classifier has no prototypes"
    assert table[3].startswith("| classifier=linear, val_split=nowhere | – |")


def test_devices_are_shared_out(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs, two at a time: each has a device of its own, and the third gets the first that is free."""
    used: list[str] = []
    together = threading.Barrier(2, timeout=20)

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **rest: Any) -> None:
            used.append(env["CUDA_VISIBLE_DEVICES"])
            if len(used) < 3:
                together.wait()

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    arguments = [str(config), "--vary", "loss.ppc=0,1,2", "--out", str(tmp_path / "out"), "--devices", "4,7"]
    assert command("sweep", arguments) == 2, "nothing was trained"
    assert sorted(used[:2]) == ["4", "7"]
    assert used[2] in ("4", "7")


def test_a_device_that_is_not_there(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    arguments = [str(config), "--vary", "loss.ppc=0", "--out", str(tmp_path / "out"), "--devices", "0,99"]
    assert command("sweep", arguments) == 2
    message = capsys.readouterr().err
    assert re.match(r"error: --devices: no device \d+, PyTorch sees \d+; correct it\n", message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("CE + PPC + PPD", "ce-ppc-ppd"),
        ("μ = 0.9", "mu-0.9"),
        ("µ=1 (fixed)", "mu-1-fixed"),  # the micro sign, another letter
        ("lr=1e+3", "lr-1e+3"),
        ("lr=1e-3", "lr-1e-3"),
        ("lr=-1", "lr--1"),
        ("num_per_class=1, crop=[192, 256]", "num_per_class-1-crop-192-256"),
        ("λ: ../../x $HOME", "lambda-..-..-x-home"),
        ("../up", "up"),
        ("中", "row"),
    ],
)
def test_folder_names_need_no_quotes(name: str, folder: str) -> None:
    assert slug(name) == folder
    assert shlex.quote(folder) == folder


def test_grid_rows_and_overrides(config: Path, tmp_path: Path) -> None:
    grid = load_sweep(config, ["prototypes.num_per_class=1,5", "loss.ppc=0,0.01"], 3)
    assert [row.name for row in grid.rows] == [
        f"num_per_class={k}, ppc={ppc}" for k in (1, 5) for ppc in ("0", "0.01")
    ]
    assert grid.rows[1].overrides == ("prototypes.num_per_class=1", "loss.ppc=0.01")
    assert grid.seeds == 3
    (tmp_path / "sweeps").mkdir()
    file = tmp_path / "sweeps/s.yaml"
    file.write_text(
        "config: ../tiny.yaml\nseeds: 2\noverrides: {train.iterations: 7}\n"
        "rows: {linear: {classifier: linear}, as is: {}}\n"
    )
    named = load_sweep(file, [], None)
    assert named.seeds == 2
    assert [row.name for row in named.rows] == ["linear", "as is"]
    assert named.rows[0].overrides == ("train.iterations=7", "classifier=linear")


@pytest.mark.parametrize("path", sorted(Path("configs/sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_load(path: Path) -> None:
    sweep = load_sweep(path, [], None)
    assert sweep.seeds == 3
    assert len(sweep.rows) >= 4


@pytest.mark.parametrize(
    ("content", "vary", "message"),
    [
        ("config: tiny.yaml\nrows: {a: {prototypes.num_pr_class: 1}}", [], "num_per_class"),
        ("config: tiny.yaml\nrow: {a: {}}", [], "unknown key row; did you mean rows?"),
        ("config: tiny.yaml\nrows: {a: 3}", [], "rows.a: Input should be a valid dictionary, got 3"),
        ("config: tiny.yaml", [], "nothing to compare"),
        ("config: tiny.yaml\nrows: [a]", [], "rows: Input should be a valid dictionary, got ['a']"),
        ("config: tiny.yaml\nvary: {loss.ppc: 4}", [], "vary.loss.ppc: Input should be a valid list, got 4"),
        ("config: tiny.yaml\nrows: {a: {}}\nseeds: three", [], "seeds: Input should be a valid integer"),
        (
            "config: tiny.yaml\nrows: {a: {}}\nseeds: 0",
            [],
            "seeds: Input should be greater than",
        ),
        ("config: gone.yaml\nrows: {a: {}}", [], "cannot read this YAML file"),
        ("config: tiny.yaml", ["loss.ppc"], "expected key=a,b,c"),
        ("config: [", [], "mend the YAML"),
        ("config: tiny.yaml\nrows: {K=1: {}, k 1: {}}", [], "'K=1' and 'k 1' would share the folder k-1"),
    ],
)
def test_mistakes(config: Path, tmp_path: Path, content: str, vary: list[str], message: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        load_sweep(file, vary, None)


def record(row: str, seed: int, k: int | None, miou: float, parameters: float = 1e6) -> Record:
    nan = float("nan")
    health = nan if k is None else 1.0
    return Record(
        row,
        seed,
        k,
        {
            "mIoU": miou,
            "in_use": health,
            "own_cosine": health,
            "agreement": nan,
            "mean_intra_cosine": nan,
            "churn": health,
            "parameters": parameters,
            "seconds_per_step": 0.5,
        },
    )


def test_tables(tmp_path: Path) -> None:
    records = [record("K=1", 0, 1, 0.5), record("K=1", 1, 1, 0.52), record("linear", 0, None, 0.4)]
    lines = to_markdown(["linear", "K=1", "K=9"], records).splitlines()
    assert lines[2] == "| linear | 40.0 | – | – | – | 1.000 | 0.500 | 1 |"
    assert lines[3] == "| K=1 | 51.0 ± 1.4 | 1.0 ± 0.0 | 1.00 ± 0.00 | – | 1.000 | 0.500 | 2 |"
    assert lines[4] == "| K=9 | – | – | – | – | – | – | 0 |"
    assert to_csv(records).splitlines()[3] == "linear,0,0.4,,,,,,1000000.0,0.5"
    assert mean_sd([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    # A run whose validation labels are all ignored has no mIoU.
    results = {"mIoU": None, "parameters": 1_000_000, "seconds": 2.0, "step": 4}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text("classifier: linear\n")
    unknown = read_record("a|b", 0, tmp_path)
    line = to_markdown(["a|b"], [unknown]).splitlines()[2]
    assert line == "| a\\|b | – | – | – | – | 1.000 | 0.500 | 1 |"
    assert to_csv([unknown]).splitlines()[1] == "a|b,0,,,,,,,1000000,0.5"
    save_figure(sweep_figure(["a|b"], [unknown]), tmp_path / "results.png")


def test_tables_show_the_levels_of_a_label_tree(tmp_path: Path) -> None:
    levels = {"1": {"mIoU": 0.9}, "2": {"mIoU": 0.7}, "3": {"mIoU": 0.5}}
    results = {"mIoU": 0.5, "parameters": 1, "seconds": 1, "step": 1, "levels": levels, "tree_distance": 2.5}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text("classifier: linear\n")
    records = [read_record("tree", 0, tmp_path), record("flat", 0, None, 0.4)]
    lines = to_markdown(["tree", "flat"], records).splitlines()
    assert lines[0].startswith("| | mIoU % | level 1 % | level 2 % | tree distance of wrong pixels | in use")
    assert lines[2].startswith("| tree | 50.0 | 90.0 | 70.0 | 2.50 | – |")
    assert lines[3].startswith("| flat | 40.0 | – | – | – | – |")
    assert {line.count("|") for line in lines} == {12}
    table = to_csv(records).splitlines()
    assert table[0].endswith("seconds_per_step,mIoU_level_1,mIoU_level_2,tree_distance")
    assert table[1].endswith(",0.9,0.7,2.5")
    assert table[2].endswith(",0.5,,,")


def test_figure_against_k_and_row_by_row() -> None:
    records = [record(f"K={k}", s, k, 0.5 + 0.01 * k + 0.02 * s) for k in (1, 10) for s in (0, 1)]
    records += [record("linear", s, None, 0.4 + 0.1 * s, 2e6) for s in (0, 1)]
    left, right = sweep_figure(["linear", "K=1", "K=10"], records).axes
    assert left.get_xscale() == "log"
    points = left.containers[0].lines[0]
    assert points.get_xdata().tolist() == [1, 10]
    assert points.get_ydata() == pytest.approx([52.0, 61.0])
    assert [line.get_ydata()[0] for line in left.lines if line.get_linestyle() == "--"] == pytest.approx(
        [45.0]
    )
    assert {c.lines[0].get_xdata()[0] for c in right.containers} == {1.0, 2.0}
    labels = [(text.get_text(), text.xy[1]) for text in right.texts]
    assert labels[0] == ("linear", pytest.approx(45.0))
    left, right = sweep_figure(["μ=0", "μ=1"], [record("μ=0", 0, 4, 0.5), record("μ=1", 0, 4, 0.6)]).axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["μ=0", "μ=1"]
    assert [container.lines[0].get_xdata()[0] for container in left.containers] == pytest.approx([50, 60])
    assert [line.get_xdata()[0] for line in right.lines] == [1.0, 1.0]


def test_labels_of_equal_size_do_not_cover_each_other() -> None:
    records = [record(f"K={k}", 0, k, 0.5 + 0.0001 * k) for k in (1, 2, 4)]
    records += [record("far", 0, 10, 0.9)]
    _, right = sweep_figure(["K=1", "K=2", "K=4", "far"], records).axes
    heights = [text.xy[1] for text in right.texts]
    low, high = right.get_ylim()
    assert min(b - a for a, b in pairwise(heights)) >= 0.064 * (high - low)
    assert heights[0] == pytest.approx(50.01)
    assert heights[-1] == pytest.approx(90)


def test_slurm_without_submitit_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    arguments = [str(config), "--vary", "loss.ppc=0", "--launcher", "slurm", "--out", str(tmp_path / "out")]
    assert command("sweep", arguments) == 2
    said = "error: --launcher slurm: submitit is not installed; run: pip install 'protoseg[slurm]'\n"
    assert capsys.readouterr().err == said


SBATCH = """#!/bin/sh
# Stands for Slurm: runs the batch file at once, in the background.
for last; do :; done
export SLURM_JOB_ID=17 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=here
sh "$last" > /dev/null 2>&1 &
echo "Submitted batch job 17"
"""
SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SCANCEL = """#!/bin/sh
"""
SACCT = """#!/bin/sh
printf 'JobID|State\\n17|RUNNING\\n'
"""


def test_slurm_runs_the_same_command(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="needs the slurm extra")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT), ("scancel", SCANCEL)):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    arguments = [str(config), "--vary", "train.iterations=1", "--out", str(tmp_path / "out")]
    assert command("sweep", [*arguments, "--launcher", "slurm", "--slurm", "timeout_min=5"]) == 0
    assert (tmp_path / "out/iterations-1/seed0/results.json").is_file()
    assert list((tmp_path / "out/slurm").glob("*submission.sh"))
    assert command("sweep", [*arguments, "--launcher", "slurm", "--slurm", "colour=blue"]) == 2
    assert "colour" in capsys.readouterr().err
