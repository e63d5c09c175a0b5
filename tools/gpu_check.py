"""Prove and measure everything CUDA in eight minutes, and write gpu.json as it goes.

    python tools/gpu_check.py [--minutes 8] [--out gpu_check] [--only NAME …] [--markdown docs/gpu.md]

Checks run in order of worth, each in a process of its own with its share of the time; one that fails, hangs
or breaks the device stops none of the others. --device cpu shows at tiny sizes that they all run.
CamVid is taken from data/camvid or from where PROTOSEG_CAMVID points.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START = time.monotonic()  # imports take their share
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a parent that asked CUDA itself could not fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from gpu_checks import camvid_runs, ceilings, head_cost, right, training_cost, two_processes  # noqa: E402
from gpu_checks.job import GRACE, Check, Job, run_check  # noqa: E402
from gpu_checks.tables import page  # noqa: E402

from protoseg.runtime.files import write_json, write_text  # noqa: E402


def about(job: Job) -> None:
    """The device, and that it works."""
    device = ceilings.setup(job)
    job.record(**ceilings.about(device))


# In order of worth, with the most seconds that each may take.
CHECKS = (
    Check("about", 30, about),
    Check("tests", 80, right.tests),
    Check("no_host_sync", 35, right.no_host_sync),
    Check("head", 40, head_cost.head),
    Check("clustering", 15, head_cost.clustering),
    Check("cross_entropy", 12, head_cost.cross_entropy),
    Check("steps", 70, training_cost.steps),
    Check("compiled_steps", 105, training_cost.compiled_steps),
    Check("profiles", 30, training_cost.profiles),
    Check("compiled", 60, right.compiled),
    Check("two_processes", 35, two_processes.two_processes),
    Check("hrnet", 25, training_cost.hrnet),
    Check("loader_wait", 30, camvid_runs.loader_wait),
    Check("camvid", 3600, camvid_runs.camvid),
)
KEPT = {"camvid": 110}  # seconds, of eight minutes, that those before must leave to it
LEAST = 4.0  # seconds, below which no check is begun


def main(argv: list[str]) -> int:
    """Run, write gpu.json after each check, print one line for each and the page at the end."""
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    parser.add_argument("--commit", help="what was checked, where there is no git")
    args = parser.parse_args(argv)
    out, markdown = args.out.resolve(), args.markdown and args.markdown.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    end = START + 60 * args.minutes - 2 * GRACE
    command = shlex.join(["python", "tools/gpu_check.py", *argv])
    found: dict[str, Any] = {"command": command, "device": args.device, "checks": {}}
    chosen = [check for check in CHECKS if not args.only or check.name in args.only]
    with tempfile.TemporaryDirectory(prefix="gpu_check", ignore_cleanup_errors=True) as scratch:
        for i, check in enumerate(chosen):
            later = sum(KEPT.get(each.name, 0) for each in chosen[i + 1 :]) * args.minutes / 8
            seconds = min(check.seconds, end - time.monotonic() - later)
            if seconds < LEAST:
                entry: dict[str, Any] = {"status": "skipped", "why": "the time is up"}
            else:
                entry = run_check(check, args.device, seconds, Path(scratch) / check.name)
            if check.name == "about":
                found["about"] = {k: v for k, v in entry.items() if k not in ("status", "seconds")}
                found["about"]["git_commit"] = args.commit or found["about"].get("git_commit")
                entry = {k: v for k, v in entry.items() if k in ("status", "seconds", "error", "traceback")}
            found["checks"][check.name] = entry
            write_json(out / "gpu.json", found)
            write_text(out / "gpu.md", page(found))
            why = entry.get("error") or entry.get("why") or ""
            print(f"{check.name}: {entry['status']}, {entry.get('seconds', 0)} s {why}".rstrip(), flush=True)
    profiles = found["checks"].get("profiles", {}).get("tables", {})
    write_text(out / "profiles.txt", "".join(f"{name}\n{table}\n\n" for name, table in profiles.items()))
    if markdown:
        write_text(markdown, page(found))
    print(page(found), flush=True)
    return int(any(entry["status"] in ("failed", "died") for entry in found["checks"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
