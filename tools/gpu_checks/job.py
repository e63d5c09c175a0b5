"""One check in a process of its own: what it gets, what it records, and when it must end."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from protoseg.runtime.files import write_json

Entry = dict[str, Any]


@dataclass
class Job:
    """What a check is given. `record` may be called many times: what was recorded survives a kill."""

    device: str  # "cuda" or "cpu"
    deadline: float  # of time.monotonic(); the process is killed some seconds after it
    folder: Path  # for files of its own
    path: Path  # of the entry
    entry: Entry = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        """On the CPU a check only shows that it runs: sizes are as small as they go."""
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def record(self, **values: Any) -> None:
        """Add to the check's entry, on disk at once."""
        self.entry |= values
        write_json(self.path, self.entry)

    def row(self, table: str, **values: Any) -> None:
        """Add a row to one of the entry's tables, and print it."""
        self.record(**{table: [*self.entry.get(table, []), values]})
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"  {table}: " + ", ".join(shown), flush=True)


class Check(NamedTuple):
    """A named check: its work, and the most seconds that it may take of the whole."""

    name: str
    seconds: float
    work: Callable[[Job], None]


class Failed(Exception):
    """A check found something wrong; what it says goes into the entry, without a traceback."""


GRACE = 5.0  # seconds between a check's deadline and its end by force


def run_check(check: Check, device: str, seconds: float, folder: Path) -> Entry:
    """Run one check in a forked process: a failed CUDA context, or a hang, ends with it.

    The parent must not have touched CUDA. Returns the entry: what the check recorded, with `status` "ok",
    "failed", "cut" (by its time) or "died", `seconds`, and where it failed `error` and `traceback`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "entry.json"
    start = time.monotonic()
    job = Job(device, start + seconds, folder, path)
    process = get_context("fork").Process(target=_work, args=(check, job))
    process.start()
    process.join(seconds + GRACE)
    cut = process.is_alive()
    _end_group(process.pid)  # also what the check has started and not ended
    process.join()
    entry: Entry = json.loads(path.read_text()) if path.is_file() else {}
    if cut:
        entry["status"] = "cut"
    elif "status" not in entry:
        entry |= {"status": "died", "error": f"the process ended with code {process.exitcode}"}
    entry["seconds"] = round(time.monotonic() - start, 1)
    return entry


def _work(check: Check, job: Job) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        check.work(job)
        job.record(status="ok")
    except BaseException as error:
        rest = {} if isinstance(error, Failed) else {"traceback": traceback.format_exc()[-2500:]}
        job.record(status="failed", error=f"{type(error).__name__}: {error}"[-600:], **rest)
        if rest:
            print(rest["traceback"], file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no clean-up that could hang on a broken device


def _end_group(pid: int | None) -> None:
    if pid is None:
        return
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left of it
        return
