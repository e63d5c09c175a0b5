"""Many runs of one config: a grid or named rows, times seeds, each run in its own process and folder."""

import csv
import io
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from protoseg.config import UserError, load_config, to_plain
from protoseg.report import write_text
from protoseg.visualize import mean_of_known

COLUMNS = ("mIoU", "effective_k", "mean_intra_cosine", "parameters", "seconds_per_step")


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


def load_sweep(path: Path, vary: Sequence[str], seeds: int | None) -> Sweep:
    """A sweep from a run config and `--vary key=a,b` options, or from a sweep file.

    A sweep file names a `config`, and `rows` (name → key: value) or `vary` (key → list), `overrides` for all
    rows and `seeds`. Errors: UserError naming the file and key; every row's configuration is checked at once.
    """
    content = _read_yaml(path)
    if "config" in content:
        unknown = set(content) - {"config", "rows", "vary", "overrides", "seeds"}
        if unknown:
            raise UserError(
                f"{path}: unknown key {sorted(unknown)[0]};"
                " a sweep file has config, rows, vary, overrides, seeds"
            )
        config = Path(content["config"])
        common = [f"{key}={_yaml(value)}" for key, value in content.get("overrides", {}).items()]
        rows = [
            Row(str(name), tuple(common + [f"{key}={_yaml(value)}" for key, value in (values or {}).items()]))
            for name, values in content.get("rows", {}).items()
        ]
        grid = {key: [_yaml(value) for value in values] for key, values in content.get("vary", {}).items()}
        seeds = seeds or content.get("seeds", 1)
    else:
        config, rows, grid, common = path, [], {}, []
    for option in vary:
        key, equals, values = option.partition("=")
        if not equals:
            raise UserError(f"--vary {option!r}: expected key=a,b,c")
        grid[key] = values.split(",")
    if grid:
        rows += [
            Row(
                ", ".join(f"{key.split('.')[-1]}={value}" for key, value in zip(grid, values)),
                tuple(common + [f"{key}={value}" for key, value in zip(grid, values)]),
            )
            for values in itertools.product(*grid.values())
        ]
    if not rows:
        raise UserError(f"{path}: nothing to compare; give --vary key=a,b,c or a sweep file with rows")
    for row in rows:
        load_config(config, row.overrides)
    return Sweep(config, tuple(rows), seeds or 1)


def run_sweep(sweep: Sweep, out: Path, jobs: int = 1, devices: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run what is not finished yet, `jobs` at a time; returns one record per run and writes the tables.

    A finished run (results.json of the same configuration) is skipped, a killed one goes on where it was.
    """
    free: queue.Queue[str] = queue.Queue()
    for job in range(jobs):
        free.put(devices[job % len(devices)] if devices else "")

    def one(task: tuple[Row, int]) -> dict[str, Any] | None:
        row, seed = task
        folder = out / _slug(row.name) / f"seed{seed}"
        overrides = [*row.overrides, f"train.seed={seed}"]
        device = free.get()
        try:
            if not _is_finished(folder, sweep.config, overrides):
                _run(sweep.config, folder, overrides, jobs, device)
        finally:
            free.put(device)
        record = _record(row, seed, folder)
        print(
            f"{row.name}, seed {seed}: "
            + (f"mIoU {record['mIoU']:.4f}" if record else f"FAILED, see {folder}/log.txt"),
            flush=True,
        )
        return record

    out.mkdir(parents=True, exist_ok=True)
    tasks = [(row, seed) for seed in range(sweep.seeds) for row in sweep.rows]
    with ThreadPoolExecutor(jobs) as pool:
        records = [record for record in pool.map(one, tasks) if record]
    write_text(out / "results.csv", to_csv(records))
    write_text(out / "results.md", to_markdown(sweep.rows, records))
    return records


def to_csv(records: Sequence[dict[str, Any]]) -> str:
    """One line per run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["row", "seed", *COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_markdown(rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> str:
    """One line per row of the sweep: mean ± standard deviation over its seeds."""
    lines = [
        "| | mIoU % | effective K | intra-class cosine | parameters (M) | s/step | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = [record for record in records if record["row"] == row.name]
        cells = [
            mean_sd([100 * run["mIoU"] for run in runs], 1),
            mean_sd([run["effective_k"] for run in runs], 1),
            mean_sd([run["mean_intra_cosine"] for run in runs], 2),
            mean_sd([run["parameters"] / 1e6 for run in runs], 2, spread=False),
            mean_sd([run["seconds_per_step"] for run in runs], 3, spread=False),
            str(len(runs)),
        ]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_sd(values: Sequence[float], digits: int, spread: bool = True) -> str:
    """`mean ± sample standard deviation`; a dash where nothing is known."""
    known = [value for value in values if value == value]
    if not known:
        return "–"
    text = f"{statistics.mean(known):.{digits}f}"
    return f"{text} ± {statistics.stdev(known):.{digits}f}" if spread and len(known) > 1 else text


def _run(config: Path, folder: Path, overrides: Sequence[str], jobs: int, device: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, "-m", "protoseg.cli", "train", str(config), "--out", str(folder)]
    with open(folder / "log.txt", "a") as log:
        subprocess.run(
            [*command, "--resume", "auto", *overrides], env=environment, stdout=log, stderr=log, check=False
        )


def _is_finished(folder: Path, config: Path, overrides: Sequence[str]) -> bool:
    if not (folder / "results.json").is_file():
        return False
    made_with = yaml.safe_load((folder / "config.yaml").read_text())
    return made_with == to_plain(load_config(config, overrides))


def _record(row: Row, seed: int, folder: Path) -> dict[str, Any] | None:
    try:
        results = json.loads((folder / "results.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    health = results.get("prototype_health", {"effective_k": [], "mean_intra_cosine": []})
    return {
        "row": row.name,
        "seed": seed,
        "mIoU": results["mIoU"],
        "effective_k": mean_of_known(health["effective_k"]),
        "mean_intra_cosine": mean_of_known(health["mean_intra_cosine"]),
        "parameters": results["parameters"],
        "seconds_per_step": results["seconds"] / results["step"],
    }


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror}); check the path") from None
    except yaml.YAMLError:
        raise UserError(f"{path}: not valid YAML; mend it") from None
    return content if isinstance(content, dict) else {}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "=.-+" else "_" for c in name)
