"""CamVid from scratch, linear and ten prototypes, as many seeds as the time allows, several runs at once."""

import contextlib
import json
import os
import statistics
import time
import warnings
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpu_checks.job import Failed, Job

from protoseg.config import load_config
from protoseg.training.log import read_metrics
from protoseg.training.loop import train

AT_ONCE = 6  # small models leave a GPU idle between launches
ITERATIONS = {"resnet18": 1000, "segformer_b0": 1200}


def camvid_root() -> Path | None:
    """Where CamVid lies, if it does."""
    root = Path(os.environ.get("PROTOSEG_CAMVID", "data/camvid"))
    return root.resolve() if (root / "images").is_dir() else None


def loader_wait(job: Job) -> None:
    """One run alone: images per second and the share of time spent waiting for data."""
    root = _needed()
    for name in ("segformer_b0",) if job.tiny else ("resnet18", "segformer_b0"):
        for workers in (0,) if job.tiny else (4, 12):
            if job.left() < 8 and not job.tiny:
                return
            out = job.folder / f"{name}-{workers}"
            limits = {"train.iterations": 2 if job.tiny else 150, "data.workers": workers}
            process = _start(name, "k10", 0, root, out, job, limits | {"train.log_interval": 25})
            process.join(max(job.left(), 1))
            lines = [line for line in read_metrics(out) if line["kind"] == "train"]
            steady = lines[2:] or lines
            if not steady:
                raise Failed(_tail(out))
            job.row(
                "loader", model=name, workers=workers,
                data_wait=statistics.mean(line["data_wait"] for line in steady),
                images_per_second=statistics.mean(line["images_per_second"] for line in steady),
                peak_gb=steady[-1]["memory_gb"],
            )  # fmt: skip


def camvid(job: Job) -> None:
    """mIoU (val, last weights) per model, classifier and seed; runs not done in time are left out."""
    root = _needed()
    seeds = range(1) if job.tiny else range(100)
    models = ("resnet18",) if job.tiny else tuple(ITERATIONS)
    waiting = list(product(seeds, models, ("linear", "k10")))
    running: dict[tuple[int, str, str], Any] = {}
    started: dict[tuple[int, str, str], float] = {}
    longest = dict.fromkeys(models, 0.0)
    failed: list[str] = []
    while running or waiting:
        now = time.monotonic()
        if job.left() < 2:
            break
        while len(running) < (1 if job.tiny else AT_ONCE):
            # The next one that can still end in time.
            case = next((each for each in waiting if longest[each[1]] < job.left() - 2), None)
            if case is None:
                break
            waiting.remove(case)
            seed, name, classifier = case
            out = job.folder / f"{name}-{classifier}-{seed}"
            changes = {"train.iterations": 2 if job.tiny else ITERATIONS[name], "train.log_interval": 100}
            changes |= {"data.workers": 0 if job.tiny else 2}
            running[case] = _start(name, classifier, seed, root, out, job, changes)
            started[case] = now
        if not running:
            break
        time.sleep(0.1)
        for case in [case for case, process in running.items() if not process.is_alive()]:
            del running[case]
            seed, name, classifier = case
            out = job.folder / f"{name}-{classifier}-{seed}"
            if not (out / "results.json").is_file():
                failed.append(f"{case}: {_tail(out)}")
                continue
            longest[name] = max(longest[name], now - started[case])
            found = json.loads((out / "results.json").read_text())
            job.row(
                "runs", model=name, classifier=classifier, seed=seed, iterations=found["step"],
                miou=found["mIoU"], seconds=found["seconds"], images_per_second=found["images_per_second"],
            )  # fmt: skip
    job.record(at_once=AT_ONCE, unfinished=len(running), failed=failed[:3])
    _summarise(job)
    if failed:
        raise Failed(f"{len(failed)} runs failed; the first: {failed[0][-500:]}")
    if not job.entry.get("runs"):
        raise Failed("no run ended in time")


def _summarise(job: Job) -> None:
    """Means of the seeds that have both classifiers."""
    scores = {(r["model"], r["seed"], r["classifier"]): r["miou"] for r in job.entry.get("runs", [])}
    for model in ITERATIONS:
        seeds = [s for m, s, c in scores if m == model and c == "k10" and (m, s, "linear") in scores]
        if not seeds:
            continue
        pairs = [(scores[model, s, "linear"], scores[model, s, "k10"]) for s in sorted(seeds)]
        gains = [k10 - linear for linear, k10 in pairs]
        job.row(
            "summary", model=model, seeds=len(pairs), linear=statistics.mean(p[0] for p in pairs),
            k10=statistics.mean(p[1] for p in pairs), gain=statistics.mean(gains),
            standard_error=statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
        )  # fmt: skip


def _needed() -> Path:
    root = camvid_root()
    if root is None:
        raise Failed("CamVid is not here: put it into data/camvid, or name its folder in PROTOSEG_CAMVID")
    return root


def _start(
    name: str, classifier: str, seed: int, root: Path, out: Path, job: Job, changes: dict[str, Any]
) -> Any:
    """A training in a process of its own, its words in the file `log` beside its results."""
    plain: dict[str, Any] = {"data.root": root, "train.seed": seed, "eval.samples": 0, **changes}
    plain |= {"eval.interval": 10**6, "checkpoint.interval": 10**6}
    if job.tiny:
        plain |= {"data.batch_size": 2, "data.crop": "[64, 64]", "decode_head.dim": 16}
    config = load_config(f"configs/camvid_{name}_{classifier}.yaml", [f"{k}={v}" for k, v in plain.items()])
    process = get_context("fork").Process(target=_train, args=(config, out, job.tiny))
    process.start()
    return process


def _train(config: Any, out: Path, tiny: bool) -> None:
    import torch

    out.parent.mkdir(parents=True, exist_ok=True)
    log = open(_log(out), "w", buffering=1)  # noqa: SIM115  (until the process ends)
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        warnings.simplefilter("ignore")
        torch.set_num_threads(1 if tiny else 2)
        try:
            train(config, out)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
    os._exit(0)


def _log(out: Path) -> Path:
    return out.with_suffix(".log")


def _tail(out: Path) -> str:
    return _log(out).read_text()[-800:] if _log(out).is_file() else "did not begin"
