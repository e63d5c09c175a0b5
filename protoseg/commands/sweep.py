"""`sweep`: train many variants of a config, several seeds each, and compare them."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
import yaml
from rich.live import Live
from rich.table import Table

from protoseg.commands.parser import parser_of
from protoseg.commands.sweep_rows import Row, Sweep, load_sweep, slug
from protoseg.commands.sweep_tables import Record, read_record, sweep_figure, to_csv, to_markdown
from protoseg.config import load_config, stored_config, to_plain
from protoseg.figures.pictures import save_figure
from protoseg.runtime.console import plain_console
from protoseg.runtime.errors import UserError
from protoseg.runtime.extras import import_extra
from protoseg.runtime.files import make_folder, write_text
from protoseg.runtime.signals import Interrupted, StopSignals
from protoseg.training.log import read_metrics
from protoseg.training.resume import other_learning


def main(arguments: Sequence[str]) -> None:
    """Train many variants of a config and compare them."""
    parser = parser_of("sweep", "Train variants of a config, several seeds each, and compare them.")
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
    if args.launcher == "slurm":  # which decides itself how many run at a time
        pool, run = ThreadPoolExecutor(1000), partial(run_in_queue, slurm_executor(out / "slurm", args.slurm))
    else:
        free: SimpleQueue[str] = SimpleQueue()
        for job in range(jobs):
            free.put(devices[job % len(devices)] if devices else "")
        threads = max(1, (os.cpu_count() or 1) // jobs)
        pool, run = ThreadPoolExecutor(jobs), partial(run_here, free, threads)
    run_sweep(sweep, out, pool, run)
    print((out / "results.md").read_text() + f"table, figure and numbers of every run: {out / 'results.*'}")


POLL = 0.5  # seconds between looks at the running jobs


@dataclass(frozen=True)
class Task:
    """One run of the sweep."""

    row: Row
    seed: int
    folder: Path
    config: Path
    iterations: int

    @property
    def overrides(self) -> tuple[str, ...]:
        return (*self.row.overrides, f"train.seed={self.seed}")

    @property
    def command(self) -> list[str]:
        """Arguments of `protoseg`."""
        return ["train", str(self.config), "--out", str(self.folder), "--resume", "auto", *self.overrides]

    def is_finished(self) -> bool:
        """Whether its results are there, made with this configuration."""
        if not (self.folder / "results.json").is_file():
            return False
        path = self.folder / "config.yaml"
        made_with = to_plain(stored_config(yaml.safe_load(path.read_text()), str(path)))
        wanted = to_plain(load_config(self.config, self.overrides))
        if wanted["data"]["value_range"] == "auto":  # training has measured it
            wanted["data"]["value_range"] = made_with["data"]["value_range"]
        return not other_learning(made_with, wanted)


RunTask = Callable[[Task, Event], Any]  # returns when the run has ended; asks it to end when the event is set


def run_sweep(sweep: Sweep, out: Path, pool: Executor, run: RunTask) -> list[Record]:
    """Run what is not finished yet, then write results.csv, results.md and results.png into `out`.

    A finished run (results.json made with the same configuration) is skipped, a killed one goes on where it
    was. Ctrl-C and SIGTERM let the running ones write their checkpoints. Errors: UserError naming a failed
    run, after all others have ended and the tables are written; Interrupted.
    """
    make_folder(out)
    tasks = _tasks(sweep, out)
    stop = Event()
    with StopSignals() as signals:
        started = {task: pool.submit(run, task, stop) for task in tasks if not task.is_finished()}
        try:
            outcomes = _watch(sweep, tasks, started, signals)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    if signals.number is not None:
        raise Interrupted("stopped; the same command goes on with what is not finished", signals.number)
    failed = [task for task in tasks if outcomes[task] == "failed"]
    records = [read_record(t.row.name, t.seed, t.folder) for t in tasks if t not in failed]
    if records:
        names = [row.name for row in sweep.rows]
        write_text(out / "results.csv", to_csv(records))
        write_text(out / "results.md", to_markdown(names, records))
        for suffix in ("png", "pdf"):
            save_figure(sweep_figure(names, records), out / f"results.{suffix}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(tasks)} runs failed; the first, {failed[0].row.name} with seed"
            f" {failed[0].seed}, says: {_last_line(failed[0].folder)} (log: {failed[0].folder / 'log.txt'});"
            " the same command tries them again"
        )
    return records


def _tasks(sweep: Sweep, out: Path) -> list[Task]:
    """Seed 0 of every row comes first: an early look compares all rows."""
    return [
        Task(row, seed, out / slug(row.name) / f"seed{seed}", sweep.config, iterations)
        for seed in range(sweep.seeds)
        for row in sweep.rows
        for iterations in [load_config(sweep.config, row.overrides).train.iterations]
    ]


def _watch(
    sweep: Sweep, tasks: Sequence[Task], started: dict[Task, Future], signals: StopSignals
) -> dict[Task, str]:
    """Show how the runs stand until all have ended or a signal comes; returns "mIoU …" or "failed"."""
    console = plain_console()
    outcomes = {task: _outcome(task) for task in tasks if task not in started}
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while len(outcomes) < len(tasks) and signals.number is None:
            wait([future for task, future in started.items() if task not in outcomes], timeout=POLL)
            for task, future in started.items():
                if future.done() and task not in outcomes:
                    future.result()  # what went wrong in the thread itself
                    outcomes[task] = _outcome(task)
                    why = f": {_last_line(task.folder)}" if outcomes[task] == "failed" else ""
                    if not console.is_terminal:
                        print(f"{task.row.name}, seed {task.seed}: {outcomes[task]}{why}", flush=True)
            if console.is_terminal:
                live.update(_table(sweep, tasks, outcomes), refresh=True)
    if signals.number is None:
        console.print(_table(sweep, tasks, outcomes))
    else:
        running = sum(future.running() for future in started.values())
        print(f"stopping {running} of {len(tasks)} runs", flush=True)
    return outcomes


def run_here(free: SimpleQueue[str], threads: int, task: Task, stop: Event) -> None:
    """A process on this machine, on the next free device (CUDA number, or "" for the default).

    Waits while a process left from an earlier sweep still works in this folder: the lock is handed down, so
    that it outlives a killed sweep.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    device = free.get()
    try:
        with open(task.folder / "lock", "w") as lock, open(task.folder / "log.txt", "a") as log:
            while not _taken(lock.fileno()):
                if stop.wait(POLL):
                    return
            if stop.is_set() or task.is_finished():
                return
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
            if device:
                environment["CUDA_VISIBLE_DEVICES"] = device
            process = subprocess.Popen(
                [sys.executable, "-m", "protoseg.commands.cli", *task.command],
                env=environment,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C reaches the sweep, which passes it on once
            )
            while process.poll() is None:
                if stop.wait(POLL):
                    process.send_signal(signal.SIGTERM)  # the trainer ends its step and writes a checkpoint
                    process.wait()
    finally:
        free.put(device)


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def slurm_executor(folder: Path, options: Sequence[str]) -> Any:
    """submitit's executor for jobs of a Slurm cluster; the folder must be seen by all machines."""
    submitit = import_extra("submitit", "protoseg[slurm]", "--launcher slurm: ")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        parameters = dict(option.split("=", 1) for option in options)
        executor.update_parameters(**{key: yaml.safe_load(value) for key, value in parameters.items()})
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
        raise UserError(
            f"--launcher slurm: {str(error).splitlines()[0]}; run where sbatch is, with --slurm"
            " name=value such as timeout_min=600 gpus_per_node=1 slurm_partition=gpu"
        ) from None
    return executor


def run_in_queue(executor: Any, task: Task, stop: Event) -> None:
    """A job of Slurm's queue; results.json tells how it ended. Taken out of the queue when told to stop."""
    task.folder.mkdir(parents=True, exist_ok=True)
    job = executor.submit(_train_into_log, task.command, task.folder / "log.txt")
    while not job.done():
        if stop.wait(POLL):
            job.cancel()
            return


def _train_into_log(command: Sequence[str], log: Path) -> int:
    """What a Slurm job does."""
    with open(log, "a") as file:
        return subprocess.run(
            [sys.executable, "-m", "protoseg.commands.cli", *command], stdout=file, stderr=file, check=False
        ).returncode


def _table(sweep: Sweep, tasks: Sequence[Task], outcomes: dict[Task, str]) -> Table:
    table = Table("", show_edge=False, pad_edge=False)
    for seed in range(sweep.seeds):
        table.add_column(f"seed {seed}", justify="right")
    for row in sweep.rows:
        mine = (task for task in tasks if task.row == row)
        table.add_row(row.name, *(outcomes.get(task) or _progress(task) for task in mine))
    return table


def _progress(task: Task) -> str:
    lines = read_metrics(task.folder)
    return f"{lines[-1]['step']}/{task.iterations}" if lines else "waiting"


def _outcome(task: Task) -> str:
    if not task.is_finished():
        return "failed"
    miou = 100 * read_record(task.row.name, task.seed, task.folder).values["mIoU"]
    return "no mIoU" if miou != miou else f"mIoU {miou:.2f}"


def _last_line(folder: Path) -> str:
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return last.removeprefix("error: ")
