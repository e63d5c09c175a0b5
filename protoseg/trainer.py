"""The loop around the step: resume, evaluate, save, report, and leave cleanly when told to."""

import signal
import time
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from protoseg import distributed
from protoseg.checkpoint import load_checkpoint, load_weights, save_checkpoint, segmenter_content
from protoseg.config import Config, UserError, differing_keys, to_plain
from protoseg.data.datasets import Dataset, build_dataset
from protoseg.data.loader import EvalLoader, eval_loader, train_loader
from protoseg.data.transforms import TrainTransform
from protoseg.evaluate import Scores, evaluate
from protoseg.inference import predict
from protoseg.model import autocast
from protoseg.report import (
    RunLog,
    clock,
    environment,
    health_line,
    make_folder,
    peak_memory_gb,
    print_scores,
    progress_line,
    write_json,
    write_text,
)
from protoseg.step import Run, build_run, train_step, unseen_classes
from protoseg.visualize import sample_figure
from protoseg.weights import load_backbone_weights

# Keys that may differ between a run and its continuation: they do not change what is learned.
OPERATIONAL = ("data.root", "data.workers", "eval.", "checkpoint.", "train.log_interval")
PROJECTION = "projection."  # names of the part of the model that only training has


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; the checkpoint is written. `signal` is its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def train(config: Config, out: Path, resume: str | None = None) -> dict[str, Any]:
    """Train as configured into the folder `out`; returns what results.json holds.

    `resume`: None (the folder must not hold a run), "auto" (go on if there is a checkpoint), or a checkpoint.
    Errors: UserError; NonFiniteLoss; Interrupted after Ctrl-C or SIGTERM.
    """
    device = distributed.setup()
    checkpoint = checkpoint_to_resume(out, resume)
    content = load_checkpoint(checkpoint) if checkpoint else None
    if content is not None:
        require_same_config(content["config"], config, checkpoint)
    train_set, val_set = (
        open_dataset(config, split) for split in (config.data.train_split, config.data.val_split)
    )
    require_class_weights(config, len(train_set.classes))
    run = build_run(config, train_set.classes, train_set.palette, len(train_set), device)
    if content is not None and checkpoint is not None:
        restore(run, content, checkpoint)
    else:
        report = load_backbone_weights(run.model.backbone, config.backbone.name, config.backbone.weights)
        if report and distributed.is_main():
            print(report)
    log = None
    if distributed.is_main():
        make_folder(out)
        write_text(out / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
        log = RunLog(out, run.step)
        print(
            f"{out}: {len(train_set)} training and {len(val_set)} validation images,"
            f" {len(run.classes)} classes, {run.model.num_parameters:,} learnable parameters,"
            f" {device.type} × {distributed.world_size()}"
            + (f", going on at step {run.step}" if run.step else ""),
            flush=True,
        )
        if run.contrast is not None and run.contrast.memory is not None and run.contrast.memory.message:
            print(f"note: {run.contrast.memory.message}")
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    with closing(eval_loader(val_set, workers=config.data.workers, **ranks)) as val_loader:
        loop(run, out, log, train_set, val_loader)
        results = finish(run, out, log, val_loader)
    distributed.barrier()
    return results


def open_dataset(config: Config, split: str) -> Dataset:
    """One split of the configured dataset, the root defaulting to data/<name>."""
    d = config.data
    return build_dataset(
        d.name,
        root=d.root or Path("data") / d.name,
        split=split,
        classes=d.classes,
        palette=d.palette,
        ignore_index=d.ignore_index,
        label_map=d.label_map,
        exclude=d.exclude,
    )


def require_class_weights(config: Config, classes: int) -> None:
    """Errors: UserError if there are class weights, but not one per class."""
    weights = config.loss.class_weights
    if weights is not None and len(weights) != classes:
        raise UserError(
            f"loss.class_weights: {len(weights)} weights for {classes} classes; give one per class"
        )


def loop(run: Run, out: Path, log: RunLog | None, train_set: Dataset, val_loader: EvalLoader) -> None:
    """Steps until the last one, with evaluation, checkpoints and log lines on the way."""
    config = run.config
    d = config.data
    loader = train_loader(
        train_set,
        TrainTransform(
            crop=d.crop,
            scale=d.scale,
            cat_max_ratio=d.cat_max_ratio,
            flip=d.flip,
            photometric=d.photometric,
            ignore_index=train_set.ignore_index,
        ),
        batch_size=d.batch_size,
        iterations=config.train.iterations,
        start=run.step,
        seed=config.train.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=d.workers,
        on_error=d.on_error,
        rare_class_temperature=d.rare_class_temperature,
    )
    meter = Meter(d.batch_size)
    with closing(loader) as batches, StopSignals() as signals:
        while run.step < config.train.iterations:
            batch = meter.waited(batches)
            rates = [group["lr"] for group in run.optimizer.param_groups]
            values = train_step(run, batch, stop=signals.number is not None)
            run.seconds += meter.step_done()
            last = run.step == config.train.iterations
            if log and (run.step % config.train.log_interval == 0 or last or run.step == 1):
                line = {name: value for name, value in values.items() if name != "stop"}
                line |= {"lr": max(rates), **meter.rates(config.train.iterations - run.step)}
                line["memory_gb"] = peak_memory_gb(run.device)
                log.line("train", run.step, line)
                print(progress_line(run.step, config.train.iterations, line), flush=True)
            if run.step % config.eval.interval == 0 and not last:
                score(run, out, log, val_loader)
                meter.restart()
            if values["stop"]:
                save(run, out)
                raise Interrupted(
                    f"stopped at step {run.step}; {out / 'last.pt'} is written: the same command with"
                    " --resume auto goes on",
                    signals.number or signal.SIGTERM,
                )
            if run.step % config.checkpoint.interval == 0 or last:
                save(run, out)


def finish(run: Run, out: Path, log: RunLog | None, val_loader: EvalLoader) -> dict[str, Any]:
    """Last evaluation, last checkpoint, results.json."""
    scores = score(run, out, log, val_loader)
    save(run, out)
    results = {
        **scores.to_plain(),
        "step": run.step,
        "best_mIoU": run.best,
        "seconds": round(run.seconds, 1),
        "images_per_second": round(run.step * run.config.data.batch_size / max(run.seconds, 1e-9), 2),
        "peak_memory_gb": round(peak_memory_gb(run.device), 2),
        "parameters": run.model.num_parameters,
        "seed": run.config.train.seed,
        "world_size": distributed.world_size(),
        **environment(run.device),
    }
    if run.model.prototypes is not None:
        results["prototype_health"] = run.model.prototypes.health().to_plain()
    if run.contrast is not None:
        results["contrast_empty_steps"] = run.empty_steps
    if log:
        write_json(out / "results.json", results)
        log.close()
        print_scores(scores, f"{run.config.data.val_split} after {run.step} steps")
        print(
            f"trained in {clock(run.seconds)}; scores in {out / 'results.json'}, curves and samples beside it"
        )
    return results


def score(run: Run, out: Path, log: RunLog | None, val_loader: EvalLoader) -> Scores:
    """Evaluate on the validation split, log it with pictures, keep the best weights."""
    run.model.eval()
    pictures = run.config.eval.samples if log else 0

    def on_sample(index: int, name: str, *sample: torch.Tensor) -> None:
        nonlocal pictures
        if log and pictures:
            pictures -= 1
            image, label, prediction = (tensor.numpy() for tensor in sample)
            figure = sample_figure(
                image.transpose(1, 2, 0), label, prediction, run.classes, run.palette, run.model.ignore_index
            )
            log.figure(f"samples/{name.replace('/', '_')}_{run.step:06d}", figure, run.step)

    with autocast(run.config, run.device):
        scores = evaluate(
            lambda image, size: predict(run.model, image, size),
            val_loader,
            run.classes,
            run.model.ignore_index,
            run.device,
            on_sample,
        )
    run.model.train()
    values = {name: value for name, value in scores.to_plain().items() if name != "Acc"}
    if run.model.prototypes is not None:
        values["prototype_health"] = run.model.prototypes.health().to_plain()
    if run.contrast is not None:
        values["contrast_empty_steps"] = run.empty_steps
        if run.contrast.memory is not None:
            values |= {name: share.tolist() for name, share in run.contrast.memory.fill().items()}
    better = scores.miou > run.best
    run.best = max(run.best, scores.miou)
    if log:
        log.line("eval", run.step, values)
        log.curves()
        best = ", the best so far" if better else f" (best {run.best:.4f})"
        print(f"step {run.step}: {run.config.data.val_split} mIoU {scores.miou:.4f}{best}", flush=True)
        if run.model.prototypes is not None:
            log.prototypes(run.model.prototypes, run.classes, run.palette, run.step)
            print(health_line(values["prototype_health"]), flush=True)
        if better:
            save_checkpoint(out / "best.pt", weights(run))
    return scores


def weights(run: Run) -> dict[str, Any]:
    """What prediction needs, without the part of the model that only training has."""
    content = segmenter_content(run.model, run.config, run.classes, run.palette, run.step)
    content["model"] = {name: t for name, t in content["model"].items() if not name.startswith(PROJECTION)}
    return content


def save(run: Run, out: Path) -> None:
    """Write last.pt: everything a continuation needs. Every rank calls it, the main one writes."""
    generators = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(run.device)
    states = distributed.gather_states(generators)
    if distributed.is_main():
        rest = {
            "optimizer": run.optimizer.state_dict(),
            "schedule": run.schedule.state_dict(),
            "generators": states,
            "best": run.best,
            "seconds": run.seconds,
            "empty_steps": run.empty_steps,
        }
        if run.contrast is not None:
            state = run.model.state_dict()
            rest["projection"] = {name: t for name, t in state.items() if name.startswith(PROJECTION)}
            rest["contrast"] = run.contrast.state_dict()
        save_checkpoint(out / "last.pt", weights(run) | rest)


def restore(run: Run, content: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's state into a fresh run."""
    if "optimizer" not in content:
        raise UserError(f"{path}: holds weights only, training cannot go on from it; resume from a last.pt")
    load_weights(run.model, content["model"] | content.get("projection", {}), path)
    if run.contrast is not None:
        load_weights(run.contrast, content["contrast"], path)
    run.optimizer.load_state_dict(content["optimizer"])
    run.schedule.load_state_dict(content["schedule"])
    run.step, run.best, run.seconds = content["step"], content["best"], content["seconds"]
    run.empty_steps = content["empty_steps"]
    run.unseen = unseen_classes(run.model)
    if len(content["generators"]) == distributed.world_size():
        generators = content["generators"][distributed.rank()]
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators and run.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"], run.device)
    elif distributed.is_main():
        print(
            f"note: {path} was written by {len(content['generators'])} processes, there are"
            f" {distributed.world_size()} now: dropout draws other numbers than an uninterrupted run would"
        )


def checkpoint_to_resume(out: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None for a fresh run.

    Errors: UserError if the folder already holds a run, and `resume` is not one of its checkpoints.
    """
    if resume == "auto":
        return out / "last.pt" if (out / "last.pt").is_file() else None
    path = None if resume is None else Path(resume)
    if path is not None:
        path = path / "last.pt" if path.is_dir() else path
    occupied = (out / "config.yaml").exists() or (out / "last.pt").exists()
    if occupied and (path is None or path.parent.resolve() != out.resolve()):
        raise UserError(
            f"{out}: this folder already holds a run; go on with it by --resume auto,"
            " or choose another folder by --out"
        )
    return path


def require_same_config(old: dict[str, Any], config: Config, path: Path | None) -> None:
    """Errors: UserError naming the keys in which a checkpoint's configuration differs from this one."""
    keys = [key for key in differing_keys(old, to_plain(config)) if not key.startswith(OPERATIONAL)]
    if keys:
        raise UserError(
            f"{path}: was trained with another configuration ({', '.join(keys)} differ);"
            " use the same config, or another --out"
        )


class StopSignals:
    """Remembers the first Ctrl-C or SIGTERM, so that the step in hand can end; the second one kills."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()


class Meter:
    """Wall-clock rates since the last report."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self.started = self.last = time.perf_counter()
        self.steps, self.wait = 0, 0.0

    def waited(self, batches: Any) -> Any:
        """The next batch; the time it takes counts as waiting for data."""
        begin = time.perf_counter()
        batch = next(batches)
        self.wait += time.perf_counter() - begin
        return batch

    def step_done(self) -> float:
        """Seconds since the last step ended."""
        now = time.perf_counter()
        taken, self.last = now - self.last, now
        self.steps += 1
        return taken

    def rates(self, steps_left: int) -> dict[str, float]:
        """Images/s, the share of time spent waiting for data, and the seconds left; starts a new interval."""
        elapsed = max(self.last - self.started, 1e-9)
        per_step = elapsed / max(self.steps, 1)
        rates = {
            "images_per_second": self.batch_size / per_step,
            "data_wait": self.wait / elapsed,
            "eta_seconds": per_step * steps_left,
        }
        self.restart()
        return rates
