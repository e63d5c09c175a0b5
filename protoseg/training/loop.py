"""The loop around the step: resume, evaluate, save, report, and leave cleanly when told to."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from protoseg.config import Config, stored_config, to_plain
from protoseg.data.datasets import measured, open_dataset
from protoseg.data.file_dataset import Dataset
from protoseg.data.in_memory import in_memory
from protoseg.data.loader import EvalLoader, train_loader
from protoseg.data.transforms import TrainTransform
from protoseg.evaluation.inference import InferenceSettings, Prediction, most_likely, segment
from protoseg.evaluation.prototype_use import embeddings, prototype_use
from protoseg.evaluation.scores import Scores, evaluate
from protoseg.evaluation.tables import print_scores
from protoseg.models.checkpoint import load_checkpoint, save_checkpoint
from protoseg.models.segmenter import autocast
from protoseg.runtime import distributed
from protoseg.runtime.console import clock
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import make_folder, write_json, write_text
from protoseg.runtime.memory import peak_memory_gb
from protoseg.runtime.signals import Interrupted, StopSignals
from protoseg.training.feature_cache import FeatureCache, cache_folder
from protoseg.training.log import Meter, RunLog, health_line, progress_line, run_facts
from protoseg.training.resume import checkpoint_to_resume, model_content, require_same_config, restore, save
from protoseg.training.step import Run, build_run, train_step
from protoseg.weights.foreign_backbone import load_backbone_weights


def train(config: Config, out: Path, resume: str | None = None, extend: bool = False) -> dict[str, Any]:
    """Train as configured into the folder `out`; returns what results.json holds.

    `resume`: None (the folder must not hold a run), "auto" (go on if there is a checkpoint), or a checkpoint.
    `extend`: its train.iterations may be fewer; the learning rate follows the longer schedule from there on.
    Errors: UserError; NonFiniteLoss; Interrupted after Ctrl-C or SIGTERM.
    """
    device = distributed.setup()
    checkpoint = checkpoint_to_resume(out, resume)
    content = load_checkpoint(checkpoint) if checkpoint else None
    if content is None:
        config = measured(config)
    else:
        if config.data.value_range == "auto":  # measured once, when training began
            stored = stored_config(content["config"], str(checkpoint)).data.value_range
            data = config.data.model_copy(update={"value_range": stored})
            config = config.model_copy(update={"data": data})
        require_same_config(content["config"], config, checkpoint, extend)
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
    if config.data.cache_features:
        train_set, val_set = keep_features(run, train_set, val_set)
    if config.data.cache_mb:
        train_set, message = in_memory(train_set, config.data.cache_mb)
        if distributed.is_main():
            print(message)
    log = None
    if distributed.is_main():
        make_folder(out)
        write_text(out / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
        log = RunLog(out, run.step, run.classes, run.palette, config.train.track, run.tree)
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
    with closing(EvalLoader(val_set, workers=config.data.workers, **ranks)) as val_loader:
        loop(run, out, log, train_set, val_loader)
        results = finish(run, out, log, val_loader)
    distributed.barrier()
    return results


def keep_features(run: Run, train_set: Dataset, val_set: Dataset) -> tuple[Dataset, Dataset]:
    """The datasets with the frozen backbone's maps in place of their images; what is missing is computed."""
    started, folder = time.perf_counter(), cache_folder(run.model, run.config)
    run.train_features = FeatureCache(train_set, folder, run.config.data.crop)
    run.val_features = FeatureCache(val_set, folder, None)
    count = run.train_features.fill(
        run.model, run.config, run.device, to_come=len(run.val_features.missing())
    ) + run.val_features.fill(run.model, run.config, run.device)
    run.seconds += time.perf_counter() - started
    if distributed.is_main():
        took = f"of {count} images computed in {clock(time.perf_counter() - started)}"
        print(f"{folder}: features {took if count else 'of all images are there'}")
    return run.train_features, run.val_features


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
        TrainTransform(d, train_set.ignore_index, run.model.mean_colour)
        if run.train_features is None
        else unchanged,
        d,
        iterations=config.train.iterations,
        start=run.step,
        seed=config.train.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    with closing(loader) as batches, StopSignals() as signals:
        if evaluation_due(run):  # a run that was killed in it
            score(run, out, log, val_loader)
        meter = Meter(d.batch_size)
        while run.step < config.train.iterations:
            batch = meter.waited(batches)
            rates = [group["lr"] for group in run.optimizer.param_groups]
            with one_value_explained(config):
                values = train_step(run, batch, stop=signals.number is not None)
            run.seconds += meter.step_done()
            last = run.step == config.train.iterations
            if log and (run.step % config.train.log_interval == 0 or last or run.step == 1):
                line = {name: value for name, value in values.items() if name != "stop"}
                line |= {"lr": max(rates), **meter.rates(config.train.iterations - run.step)}
                line["memory_gb"] = peak_memory_gb(run.device)
                log.line("train", run.step, line)
                print(progress_line(run.step, config.train.iterations, line), flush=True)
            due = evaluation_due(run)
            if due or last or values["stop"] or run.step % config.checkpoint.interval == 0:
                save(run, out)  # before anything that may fail
            if values["stop"]:
                raise Interrupted(
                    f"stopped at step {run.step}; {out / 'last.pt'} is written: the same command with"
                    " --resume auto goes on",
                    signals.number or signal.SIGTERM,
                )
            if due:
                score(run, out, log, val_loader)
                save(run, out)
                meter.restart()


def evaluation_due(run: Run) -> bool:
    """Whether it is time for an evaluation that has not been; the last one is not the loop's."""
    at_interval = run.step % run.config.eval.interval == 0 and run.step < run.config.train.iterations
    return at_interval and run.scored < run.step


def unchanged(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return image, label


def finish(run: Run, out: Path, log: RunLog | None, val_loader: EvalLoader) -> dict[str, Any]:
    """Last evaluation, last checkpoint, results.json."""
    scores = score(run, out, log, val_loader)
    save(run, out)
    results = {
        **scores.to_plain(),
        "step": run.step,
        "best_mIoU": run.best if run.best >= 0 else None,
        "seconds": round(run.seconds, 1),
        "images_per_second": round(run.step * run.config.data.batch_size / max(run.seconds, 1e-9), 2),
        "world_size": distributed.world_size(),
        **run_facts(run.model, run.config, run.device),
    }
    if run.model.prototypes is not None:
        maps = run.val_features.maps if run.val_features is not None else None
        use = prototype_use(
            run.model.prototypes, embeddings(run.model, run.config, val_loader, run.device, maps)
        )
        results["prototype_health"] = run.model.prototypes.health().to_plain() | use
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
    """Evaluate on the validation split, keep the best weights, log it with pictures."""
    left = iter(range(run.config.eval.samples if log else 0))

    def picture(name: str, image: Tensor, label: Tensor, prediction: Tensor) -> None:
        if log and next(left, None) is not None:
            if run.val_features is not None:
                image = run.val_features.dataset.read(int(image))[0]
            log.sample(name, image, label, prediction, run.model.ignore_index, run.step)

    protocol = InferenceSettings(run.config.eval.window)

    def predict(image: Tensor, size: tuple[int, int]) -> Prediction:
        if run.val_features is None:
            return segment(run.model, image, size, protocol)
        with torch.inference_mode():
            logits = run.model(run.val_features.maps(image, run.device))
        return Prediction(most_likely([logits[0].float()], size)[0], None, None)

    run.model.eval()
    with autocast(run.config, run.device):
        scores = evaluate(
            predict,
            val_loader,
            run.classes,
            run.model.ignore_index,
            run.device,
            tree=run.tree,
            on_sample=picture,
        )
    run.model.train()
    run.scored = run.step
    if not log:
        run.best = max(run.best, scores.miou)
        return scores
    split, best = run.config.data.val_split, f" (best {run.best:.4f})" if run.best >= 0 else ""
    if math.isnan(scores.miou):
        print(f"note: no mIoU and no best.pt at step {run.step}: {split} has no labelled pixel", flush=True)
    elif scores.miou > run.best:
        run.best, best = scores.miou, ", the best so far"
        save_checkpoint(out / "best.pt", model_content(run))
    log.line("eval", run.step, evaluation_line(run, scores))
    log.curves()
    print(f"step {run.step}: {split} mIoU {scores.miou:.4f}{best}", flush=True)
    if run.model.prototypes is not None:
        log.prototypes(run.model.prototypes, run.step)
        print(health_line(run.model.prototypes.health().to_plain()), flush=True)
    return scores


def evaluation_line(run: Run, scores: Scores) -> dict[str, Any]:
    """What metrics.jsonl holds of an evaluation: scores, and the state of prototypes and memories."""
    line = {name: value for name, value in scores.to_plain().items() if name != "Acc"}
    if run.model.prototypes is not None:
        line["prototype_health"] = run.model.prototypes.health().to_plain()
    if run.contrast is not None:
        line["contrast_empty_steps"] = run.empty_steps
        if run.contrast.memory is not None:
            line |= {name: share.tolist() for name, share in run.contrast.memory.fill().items()}
    return line


@contextmanager
def one_value_explained(config: Config) -> Iterator[None]:
    """Errors: UserError where batch norm has a single value per channel, in whichever part of a model."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"data.crop: {list(config.data.crop)} and one image at a time (data.batch_size"
            f" {config.data.batch_size} over {distributed.world_size()} processes × train.accumulation"
            f" {config.train.accumulation}) leave batch norm one value per channel; use a larger crop or"
            " more images at a time"
        ) from None
