"""A run's checkpoint: what it holds, how training goes on from it, and when it may not."""

from pathlib import Path
from typing import Any

import torch

from protoseg.config import Config, stored_config, to_plain
from protoseg.core.contrast import PixelContrast
from protoseg.models.checkpoint import load_weights, save_checkpoint, segmenter_content
from protoseg.runtime import distributed
from protoseg.runtime.config_keys import differing_keys
from protoseg.runtime.errors import UserError
from protoseg.training.log import read_metrics
from protoseg.training.step import Run, unseen_classes

# Keys that may differ between a run and its continuation: they do not change what is learned.
OPERATIONAL = (
    "data.root",
    "data.workers",
    "data.cache_mb",
    "data.cache_gb",
    "eval.",
    "checkpoint.",
    "train.log_interval",
    "train.track",
)


def model_content(run: Run) -> dict[str, Any]:
    """What prediction needs."""
    return segmenter_content(run.model, run.config, run.classes, run.palette, run.step)


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
            "scored": run.scored,
            "seconds": run.seconds,
            "empty_steps": run.empty_steps,
        }
        if run.model.prototypes is not None:
            rest["momentum"] = run.model.prototypes.momentum
        if run.contrast is not None:
            rest["contrast"] = run.contrast.state_dict()
        save_checkpoint(out / "last.pt", model_content(run) | rest)


def restore(run: Run, content: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's state into a fresh run."""
    if "optimizer" not in content:
        raise UserError(f"{path}: holds weights only, training cannot go on from it; resume from a last.pt")
    load_weights(run.model, content["model"], path)
    if run.contrast is not None:
        # Older checkpoints keep the projection beside the memories.
        state = content["contrast"] | content.get("projection", {})
        require_same_memory(run.contrast, state, path)
        load_weights(run.contrast, state, path)
    run.optimizer.load_state_dict(content["optimizer"])
    run.schedule.load_state_dict(content["schedule"])
    run.step, run.best, run.seconds = content["step"], content["best"], content["seconds"]
    run.empty_steps = content["empty_steps"]
    run.scored = content.get("scored", run.step)  # older checkpoints were written after the evaluation
    for group, base, factor in zip(
        run.optimizer.param_groups, run.schedule.base_lrs, run.schedule.lr_lambdas
    ):
        group["lr"] = base * factor(run.step)  # another one if the run is extended
    if run.model.prototypes is not None:  # "auto" is made for the run as it began: it may be extended since
        run.model.prototypes.momentum = content.get("momentum", run.model.prototypes.momentum)
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


def require_same_memory(contrast: PixelContrast, state: dict[str, Any], path: Path) -> None:
    """Errors: UserError if the memory was made for another number of images: it has room for each."""
    for name, mine in contrast.state_dict().items():
        if name.startswith("memory.") and name in state and state[name].shape != mine.shape:
            raise UserError(
                f"{path}: the training set had another number of images when this run began, and contrast's"
                " memory has room for those; bring them back, or begin a new run with another --out"
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
    occupied = (out / "last.pt").exists() or bool(read_metrics(out))  # not where it failed at once
    if occupied and (path is None or path.parent.resolve() != out.resolve()):
        raise UserError(
            f"{out}: this folder already holds a run; go on with it by --resume auto,"
            " or choose another folder by --out"
        )
    return path


def other_learning(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys in which two plain configurations differ so that something else is learned."""
    kept = [bool(each["data"].get("cache_features")) for each in (old, new)]  # in half precision, anywhere
    keys = [key for key in differing_keys(old, new) if not key.startswith(OPERATIONAL)]
    return [key for key in keys if key != "data.cache_features" or kept[0] != kept[1]]


def require_same_config(old: dict[str, Any], config: Config, path: Path | None, extend: bool = False) -> None:
    """Errors: UserError naming the keys in which a checkpoint's configuration differs from this one."""
    old = to_plain(stored_config(old, str(path)))
    keys = other_learning(old, to_plain(config))
    before, now = old["train"]["iterations"], config.train.iterations
    if extend and now <= before and "train.iterations" in keys:
        raise UserError(f"--extend: train.iterations={now} is not more than the {before} of {path}; raise it")
    if keys == ["train.iterations"] and now > before:
        if extend:
            return
        raise UserError(
            f"{path}: was to end at train.iterations={before}, now {now}; add --extend to go on up to there"
        )
    if keys:
        raise UserError(
            f"{path}: was trained with another configuration ({', '.join(keys)} differ);"
            " use the same config, or another --out"
        )
