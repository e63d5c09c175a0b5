"""`sweep`: train many variants of a config, several seeds each, and compare them."""

import argparse
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from protoseg.commands.sweep_tables import Record, read_record, sweep_figure, to_csv, to_markdown
from protoseg.config import differing_keys, load_config, to_plain
from protoseg.figures.pictures import save_figure
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import make_folder, write_text
from protoseg.runtime.shipped import find_config
from protoseg.runtime.signals import Interrupted, StopSignals
from protoseg.training.log import read_metrics
from protoseg.training.resume import OPERATIONAL


def main(arguments: Sequence[str]) -> None:
    """Train many variants of a config and compare them."""
    parser = argparse.ArgumentParser(
        prog="sweep", description="Train variants of a config, several seeds each, and compare them."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a run config, or a sweep file with rows")
    parser.add_argument("--vary", action="append", default=[], metavar="key=a,b,c", help="may be repeated")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs per row (default: the file's, or 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/sweep_<config name>")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: one, or one for each of --devices)"
    )
    parser.add_argument("--devices", default="", metavar="0,1,2", help="CUDA devices to spread the runs over")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="name=value",
        help="submitit parameters, such as timeout_min=600",
    )
    args = parser.parse_args(arguments)
    sweep = load_sweep(args.config, args.vary, args.seeds)
    out = args.out or Path("runs") / f"sweep_{args.config.stem}"
    devices = [device for device in args.devices.split(",") if device]
    jobs = max(len(devices), 1) if args.jobs is None else args.jobs
    if jobs < 1:
        raise UserError(f"--jobs: expected 1 or more, got {jobs}")
    count = torch.cuda.device_count()
    missing = [device for device in devices if device.isdecimal() and int(device) >= count]
    if missing and "CUDA_VISIBLE_DEVICES" not in os.environ:  # which renumbers what is counted here
        raise UserError(f"--devices: no device {missing[0]}, PyTorch sees {count}; correct it")
    launcher = (
        SlurmLauncher(out / "slurm", args.slurm) if args.launcher == "slurm" else LocalLauncher(jobs, devices)
    )
    run_sweep(sweep, out, launcher)
    print((out / "results.md").read_text() + f"table, figure and numbers of every run: {out / 'results.*'}")


POLL = 0.5  # seconds between looks at the running jobs


@dataclass(frozen=True)
class Row:
    """One line of the table: a name and what differs from the config."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """A config, the rows to compare, and how many seeds each gets."""

    config: Path
    rows: tuple[Row, ...]
    seeds: int


@dataclass
class Task:
    """One run of the sweep and where it stands."""

    row: Row
    seed: int
    folder: Path
    command: tuple[str, ...]  # arguments of `protoseg`
    iterations: int
    state: str = "waiting"  # waiting | running | done | failed
    job: "Job | None" = field(default=None, repr=False)


class Job(Protocol):
    """A started run."""

    def poll(self) -> int | None:
        """Exit code, None while it runs."""

    def stop(self) -> None:
        """Ask it to write its checkpoint and leave."""


class Launcher(Protocol):
    """What starts runs: on this machine, or through a queue."""

    def start(self, task: Task) -> Job | None:
        """The started run, or None where there is no room for it yet."""


def load_sweep(path: Path, vary: Sequence[str], seeds: int | None) -> Sweep:
    """A sweep from a run config and `--vary key=a,b` options, or from a sweep file.

    A sweep file names a `config` (relative to itself), `rows` (name → key: value) or `vary` (key → list),
    `overrides` for all rows, and `seeds`. Errors: UserError naming the file and key; every row's
    configuration is checked at once.
    """
    path = find_config(path)
    content = _read_yaml(path)
    rows: list[Row] = []
    grid: dict[str, list[str]] = {}
    common: list[str] = []
    config = path
    if "config" in content:
        unknown = sorted(set(content) - {"config", "rows", "vary", "overrides", "seeds"})
        if unknown:
            raise UserError(
                f"{path}: unknown key {unknown[0]}; a sweep file has config, rows, vary, overrides, seeds"
            )
        config = path.parent / str(content["config"])
        common = _settings(content.get("overrides"), f"{path}: overrides")
        for name, values in _mapping(content.get("rows"), f"{path}: rows").items():
            rows.append(Row(str(name), (*common, *_settings(values, f"{path}: rows: {name}"))))
        for key, values in _mapping(content.get("vary"), f"{path}: vary").items():
            if not isinstance(values, list):
                raise UserError(f"{path}: vary: {key}: expected a list, found {values!r:.60}")
            grid[key] = [_yaml(value) for value in values]
        seeds = seeds or content.get("seeds")
        if not isinstance(seeds, int | None):
            raise UserError(f"{path}: seeds: expected a number, found {seeds!r:.60}")
    for option in vary:
        key, equals, text = option.partition("=")
        if not equals or not text:
            raise UserError(f"--vary {option!r}: expected key=a,b,c")
        grid[key] = text.split(",")
    for chosen in itertools.product(*grid.values()) if grid else ():
        name = ", ".join(f"{key.split('.')[-1]}={value}" for key, value in zip(grid, chosen))
        rows.append(Row(name, (*common, *(f"{key}={value}" for key, value in zip(grid, chosen)))))
    if not rows:
        raise UserError(f"{path}: nothing to compare; give --vary key=a,b,c or a sweep file with rows")
    if seeds is not None and seeds < 1:
        raise UserError(f"seeds: expected 1 or more, got {seeds}")
    for i, row in enumerate(rows):
        load_config(config, row.overrides)
        for other in rows[:i]:
            if slug(other.name) == slug(row.name):
                raise UserError(
                    f"{path}: rows {other.name!r} and {row.name!r} would share the folder {slug(row.name)};"
                    " rename one"
                )
    return Sweep(config, tuple(rows), seeds or 1)


def run_sweep(sweep: Sweep, out: Path, launcher: Launcher) -> list[Record]:
    """Run what is not finished yet, then write results.csv, results.md and results.png into `out`.

    A finished run (results.json made with the same configuration) is skipped, a killed one goes on where it
    was. Ctrl-C and SIGTERM let the running ones write their checkpoints. Errors: UserError naming a failed
    run, after all others have ended and the tables are written; Interrupted.
    """
    make_folder(out)
    tasks = _tasks(sweep, out)
    with StopSignals() as signals:
        _run_all(tasks, sweep, launcher, signals)
    records = [read_record(t.row.name, t.seed, t.folder) for t in tasks if t.state == "done"]
    if records:
        names = [row.name for row in sweep.rows]
        write_text(out / "results.csv", to_csv(records))
        write_text(out / "results.md", to_markdown(names, records))
        for suffix in ("png", "pdf"):
            save_figure(sweep_figure(names, records), out / f"results.{suffix}")
    failed = [task for task in tasks if task.state == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(tasks)} runs failed; the first, {failed[0].row.name} with seed"
            f" {failed[0].seed}, says: {_last_line(failed[0].folder)} (log: {failed[0].folder / 'log.txt'});"
            " the same command tries them again"
        )
    return records


def _tasks(sweep: Sweep, out: Path) -> list[Task]:
    """Seed 0 of every row comes first: an early look compares all rows."""
    tasks = []
    for seed in range(sweep.seeds):
        for row in sweep.rows:
            folder = out / slug(row.name) / f"seed{seed}"
            overrides = (*row.overrides, f"train.seed={seed}")
            command = ("train", str(sweep.config), "--out", str(folder), "--resume", "auto", *overrides)
            state = "done" if _is_finished(folder, sweep.config, overrides) else "waiting"
            iterations = load_config(sweep.config, overrides).train.iterations
            tasks.append(Task(row, seed, folder, command, iterations, state))
    return tasks


def _run_all(tasks: list[Task], sweep: Sweep, launcher: Launcher, signals: StopSignals) -> None:
    """Start runs as the launcher has room, until all are done or failed."""
    console = Console()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            for task in tasks:
                before = task.state
                _advance(task, sweep, launcher)
                if task.state in {"done", "failed"} - {before} and not console.is_terminal:
                    why = f": {_last_line(task.folder)}" if task.state == "failed" else ""
                    print(f"{task.row.name}, seed {task.seed}: {_standing(task)}{why}", flush=True)
            if console.is_terminal:
                live.update(_table(sweep, tasks), refresh=True)
            running = [task for task in tasks if task.state == "running"]
            if signals.number is not None:
                jobs = [task.job for task in running if task.job]
                print(f"stopping {len(jobs)} of {len(tasks)} runs", flush=True)
                for job in jobs:
                    job.stop()
                while any(job.poll() is None for job in jobs):
                    time.sleep(POLL)
                raise Interrupted(
                    "stopped; the same command goes on with what is not finished", signals.number
                )
            if not running and not any(task.state == "waiting" for task in tasks):
                break
            time.sleep(POLL)
    console.print(_table(sweep, tasks))


def _advance(task: Task, sweep: Sweep, launcher: Launcher) -> None:
    """Start a run that waits, or see how a started one ended."""
    if task.state in ("done", "failed") or (task.job is not None and task.job.poll() is None):
        return
    if _is_finished(task.folder, sweep.config, task.command[6:]):
        task.state = "done"  # perhaps by a process that an earlier sweep left behind
    elif task.job is not None:
        task.state = "failed"
    else:
        task.folder.mkdir(parents=True, exist_ok=True)
        task.job = launcher.start(task)
        task.state = "running" if task.job else "waiting"


class LocalLauncher:
    """Runs on this machine, `jobs` at a time, each on the next free one of `devices` (CUDA numbers)."""

    def __init__(self, jobs: int, devices: Sequence[str] = ()) -> None:
        self.free = [devices[job % len(devices)] if devices else "" for job in range(jobs)]
        self.threads = str(max(1, (os.cpu_count() or 1) // jobs))

    def start(self, task: Task) -> "LocalJob | None":
        """A process of its own; None while all places are taken, or a process left from an earlier sweep
        still works in this folder."""
        if not self.free:
            return None
        lock = open(task.folder / "lock", "w")  # noqa: SIM115 - the run inherits it, and so holds the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        device = self.free.pop(0)
        environment = {"OMP_NUM_THREADS": self.threads, **os.environ}
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with open(task.folder / "log.txt", "a") as log, lock:
            process = subprocess.Popen(
                [sys.executable, "-m", "protoseg.commands.cli", *task.command],
                env=environment,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C reaches the sweep, which passes it on once
            )
        return LocalJob(process, self.free, device)


class LocalJob:
    """A process on this machine; gives its device back when it has ended."""

    def __init__(self, process: subprocess.Popen, free: list[str], device: str) -> None:
        self.process, self.free, self.device = process, free, device

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        code = self.process.poll()
        if code is not None:
            self.free.append(self.device)
        return code

    def stop(self) -> None:
        """SIGTERM: the trainer ends the step in hand and writes its checkpoint."""
        self.process.send_signal(signal.SIGTERM)


class SlurmLauncher:
    """Runs as jobs of a Slurm cluster, through submitit; the out folder must be seen by all machines."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError('--launcher slurm needs submitit: pip install -e ".[slurm]"') from None
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
            parameters = dict(option.split("=", 1) for option in options)
            self.executor.update_parameters(
                **{key: yaml.safe_load(value) for key, value in parameters.items()}
            )
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise UserError(
                f"--launcher slurm: {str(error).splitlines()[0]}; run where sbatch is, with --slurm"
                " name=value such as timeout_min=600 gpus_per_node=1 slurm_partition=gpu"
            ) from None

    def start(self, task: Task) -> "SlurmJob":
        """Queued at once: Slurm decides when it runs."""
        return SlurmJob(self.executor.submit(_train_into_log, task.command, task.folder / "log.txt"))


class SlurmJob:
    """A job in the queue."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def poll(self) -> int | None:
        """0 once it has ended, however it ended: results.json tells."""
        return 0 if self.job.done() else None

    def stop(self) -> None:
        """Take it out of the queue; the last checkpoint stays."""
        self.job.cancel()


def _train_into_log(command: Sequence[str], log: Path) -> int:
    """What a Slurm job does."""
    with open(log, "a") as file:
        return subprocess.run(
            [sys.executable, "-m", "protoseg.commands.cli", *command], stdout=file, stderr=file, check=False
        ).returncode


def _table(sweep: Sweep, tasks: Sequence[Task]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for seed in range(sweep.seeds):
        table.add_column(f"seed {seed}", justify="right")
    for row in sweep.rows:
        table.add_row(row.name, *(_standing(task) for task in tasks if task.row == row))
    return table


def _standing(task: Task) -> str:
    if task.state == "done":
        return f"mIoU {100 * read_record(task.row.name, task.seed, task.folder).values['mIoU']:.2f}"
    if task.state == "failed":
        return "failed"
    lines = read_metrics(task.folder) if task.state == "running" else []
    return f"{lines[-1]['step']}/{task.iterations}" if lines else task.state


def _is_finished(folder: Path, config: Path, overrides: Sequence[str]) -> bool:
    if not (folder / "results.json").is_file():
        return False
    made_with = yaml.safe_load((folder / "config.yaml").read_text())
    differ = differing_keys(made_with, to_plain(load_config(config, overrides)))
    return not [key for key in differ if not key.startswith(OPERATIONAL)]


def _last_line(folder: Path) -> str:
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return last.removeprefix("error: ")


def _settings(values: Any, where: str) -> list[str]:
    return [f"{key}={_yaml(value)}" for key, value in _mapping(values, where).items()]


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{where}: expected `key: value` lines, found {values!r:.60}")
    return values or {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path}: not valid YAML; mend it") from None
    return content if isinstance(content, dict) else {}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def slug(name: str) -> str:
    """A row's name as a folder name that no shell makes anything of: `μ = 0.9` → `mu-0.9`."""
    letters = unicodedata.normalize("NFKD", name)
    greek = {c: unicodedata.name(c).split()[-1] for c in letters if "\u0370" <= c <= "\u03ff"}
    text = "".join(greek.get(c, c) for c in letters).replace("LAMDA", "LAMBDA")
    text = re.sub(r"[^a-z0-9._+-]+", "-", text.encode("ascii", "ignore").decode().lower())
    return re.sub(r"-\++(?=-|$)", "", text).strip("-.") or "row"  # a lone plus says nothing
