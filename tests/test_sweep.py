"""Sweeps: the grid, killing and going on, the tables, Slurm, and what a user can get wrong."""

import builtins
import json
import os
import re
import signal
import stat
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from protoseg.cli import run as command
from protoseg.config import UserError
from protoseg.sweep import LocalLauncher, load_sweep
from protoseg.sweep_tables import Record, mean_sd, sweep_figure, to_csv, to_markdown

TINY: dict[str, Any] = {
    "data": {"name": "digits", "crop": [48, 48], "batch_size": 2, "workers": 0, "flip": 0},
    "decode_head": {"dim": 8, "dropout": 0.1},
    "prototypes": {"num_per_class": 2, "revive_after": 0},
    "train": {"iterations": 3, "log_interval": 1},
    "eval": {"samples": 0},
    "checkpoint": {"interval": 1},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def timeless(table: str) -> list[list[str]]:
    """Cells of results.csv or results.md without the seconds per step."""
    split = [re.split(r"\s*[|,]\s*", line) for line in table.splitlines()]
    gone = next(i for i, name in enumerate(split[0]) if name in ("seconds_per_step", "s/step"))
    return [cells[:gone] + cells[gone + 1 :] for cells in split]


def test_killed_sweep_goes_on_and_ends_with_the_same_table(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep and its run are killed; then the sweep alone, whose run works on and is waited for."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums depend on the number of threads, and so would the table
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    arguments = [str(config), "--vary", "prototypes.num_per_class=1,2", "--seeds", "2"]
    assert command("sweep", [*arguments, "--out", str(straight), "--jobs", "2"]) == 0

    def start_and_kill(with_run: bool) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "protoseg.cli", "sweep", *arguments, "--out", str(broken)]
        )
        folder = broken / "num_per_class=1/seed0"
        deadline = time.time() + 300
        while not (holders(folder / "lock") and (folder / "metrics.jsonl").exists()):
            assert time.time() < deadline, "the first run never started"
            time.sleep(0.05)
        process.kill()
        process.wait()
        if with_run:
            for pid in holders(folder / "lock"):
                os.kill(pid, signal.SIGKILL)

    start_and_kill(with_run=True)
    assert not (broken / "results.csv").exists()
    start_and_kill(with_run=False)
    done = straight / "num_per_class=2/seed1/results.json"
    before = done.stat().st_mtime_ns
    assert command("sweep", [*arguments, "--out", str(broken)]) == 0
    assert command("sweep", [*arguments, "--out", str(straight)]) == 0
    assert done.stat().st_mtime_ns == before, "a finished run was run again"
    for name in ("results.csv", "results.md"):
        assert timeless((broken / name).read_text()) == timeless((straight / name).read_text())
    assert (broken / "results.png").stat().st_size > 5000
    scores = [json.loads(p.read_text())["mIoU"] for p in sorted(straight.glob("*=1/*/results.json"))]
    assert len(scores) == 2
    mean, sd = 100 * statistics.mean(scores), 100 * statistics.stdev(scores)
    assert f"| num_per_class=1 | {mean:.1f} ± {sd:.1f} |" in (straight / "results.md").read_text()


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


def test_interrupt_lets_the_runs_write_their_checkpoints(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = ["--vary", "train.iterations=5000", "--vary", "checkpoint.interval=5000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "protoseg.cli", "sweep", str(config), "--out", str(out), *long],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 60
    while not list(out.glob("*/*/metrics.jsonl")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, text
    assert "the same command goes on" in text
    assert len(list(out.glob("*/*/last.pt"))) == 1


def test_a_failed_run_is_named_and_the_others_count(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), "--vary", "classifier=linear", "--vary", "data.val_split=val,nowhere"]
    assert command("sweep", [*arguments, "--out", str(tmp_path / "out"), "--jobs", "2"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "1 of 2 runs failed" in message
    assert "no split 'nowhere'" in message
    table = (tmp_path / "out/results.md").read_text().splitlines()
    assert "| – |" in table[2], "a linear classifier has no effective K"
    assert table[3].startswith("| classifier=linear, val_split=nowhere | – |")


def test_devices_are_shared_out(config: Path, tmp_path: Path) -> None:
    launcher = LocalLauncher(3, ["4", "7"])
    assert launcher.free == ["4", "7", "4"]


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
        ("config: tiny.yaml\nrow: {a: {}}", [], "unknown key row"),
        ("config: tiny.yaml\nrows: {a: 3}", [], "expected `key.sub: value`"),
        ("config: tiny.yaml", [], "nothing to compare"),
        ("config: tiny.yaml\nrows: {a: {}}\nseeds: 0", [], "expected 1 or more"),
        ("config: gone.yaml\nrows: {a: {}}", [], "cannot read the config"),
        ("config: tiny.yaml", ["loss.ppc"], "expected key=a,b,c"),
        ("config: [", [], "not valid YAML"),
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
            "effective_k": health,
            "mean_intra_cosine": nan,
            "churn": health,
            "parameters": parameters,
            "seconds_per_step": 0.5,
        },
    )


def test_tables() -> None:
    records = [record("K=1", 0, 1, 0.5), record("K=1", 1, 1, 0.52), record("linear", 0, None, 0.4)]
    lines = to_markdown(["linear", "K=1", "K=9"], records).splitlines()
    assert lines[2] == "| linear | 40.0 | – | – | – | 1.000 | 0.500 | 1 |"
    assert lines[3] == "| K=1 | 51.0 ± 1.4 | 1.0 ± 0.0 | – | 1.0000 | 1.000 | 0.500 | 2 |"
    assert lines[4] == "| K=9 | – | – | – | – | – | – | 0 |"
    assert to_csv(records).splitlines()[3] == "linear,0,0.4,,,,1000000.0,0.5"
    assert mean_sd([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"


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
    left, _ = sweep_figure(["μ=0", "μ=1"], [record("μ=0", 0, 4, 0.5), record("μ=1", 0, 4, 0.6)]).axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["μ=0", "μ=1"]


def test_slurm_without_submitit_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def no_submitit(name: str, *rest: Any, **named: Any) -> Any:
        if name == "submitit":
            raise ImportError(name)
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_submitit)
    arguments = [str(config), "--vary", "loss.ppc=0", "--launcher", "slurm", "--out", str(tmp_path / "out")]
    assert command("sweep", arguments) == 2
    assert "pip install 'protoseg[slurm]'" in capsys.readouterr().err


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
    assert (tmp_path / "out/iterations=1/seed0/results.json").is_file()
    assert list((tmp_path / "out/slurm").glob("*submission.sh"))
    assert command("sweep", [*arguments, "--launcher", "slurm", "--slurm", "colour=blue"]) == 2
    assert "colour" in capsys.readouterr().err
