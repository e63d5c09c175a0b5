"""The command line: `protoseg VERB …`; tools/VERB.py calls the same functions."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from protoseg import distributed
from protoseg.checkpoint import load_segmenter
from protoseg.config import UserError, config_from, load_config, merge, parse_override, to_plain
from protoseg.data.loader import eval_loader
from protoseg.evaluate import evaluate
from protoseg.inference import predict
from protoseg.report import print_scores, write_json
from protoseg.sweep import LocalLauncher, SlurmLauncher, load_sweep, run_sweep
from protoseg.trainer import Interrupted, open_dataset, train

OVERRIDES = "configuration values on top of the file's, for example train.iterations=1000"


def train_command(arguments: Sequence[str]) -> None:
    """Train a model."""
    parser = argparse.ArgumentParser(prog="train", description="Train as a config file says.")
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/<config name>)")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on: auto, if DIR holds a checkpoint; or from this one"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES)
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    train(config, args.out or Path("runs") / args.config.stem, args.resume)


def evaluate_command(arguments: Sequence[str]) -> None:
    """Score a trained model on a split."""
    parser = argparse.ArgumentParser(
        prog="evaluate", description="Score a trained model on a labelled split."
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--split", metavar="NAME", help="default: the run's validation split")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to FILE")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as data.root=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    model, config, content = load_segmenter(args.run)
    for override in args.overrides:
        config = config_from(merge(to_plain(config), parse_override(override)), f"override {override!r}")
    device = distributed.setup()
    split = args.split or config.data.val_split
    dataset = open_dataset(config, split)
    if list(dataset.classes) != content["classes"]:
        raise UserError(
            f"{args.run}: trained on {len(content['classes'])} classes that are not those of {split}"
            f" ({len(dataset.classes)}); evaluate on data with the same class list"
        )
    model = model.to(device)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    with closing(eval_loader(dataset, workers=config.data.workers, **ranks)) as loader:
        scores = evaluate(
            lambda image, size: predict(model, image, size),
            loader,
            dataset.classes,
            dataset.ignore_index,
            device,
        )
    if distributed.is_main():
        print_scores(scores, f"{args.run} (step {content['step']}) on {split}, {len(dataset)} images")
        if args.json:
            write_json(args.json, {**scores.to_plain(), "split": split, "step": content["step"]})


def sweep_command(arguments: Sequence[str]) -> None:
    """Train many variants of a config and compare them."""
    parser = argparse.ArgumentParser(
        prog="sweep", description="Train variants of a config, several seeds each, and compare them."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a run config, or a sweep file with rows")
    parser.add_argument("--vary", action="append", default=[], metavar="key=a,b,c", help="may be repeated")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs per row (default: the file's, or 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/sweep_<config name>")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one per device)")
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
    launcher = (
        SlurmLauncher(out / "slurm", args.slurm) if args.launcher == "slurm" else LocalLauncher(jobs, devices)
    )
    run_sweep(sweep, out, launcher)
    print((out / "results.md").read_text() + f"table, figure and numbers of every run: {out / 'results.*'}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train_command,
    "evaluate": evaluate_command,
    "sweep": sweep_command,
}


def run(verb: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command → exit code: 0, 2 for a user's mistake, 128 + signal after an interruption."""
    try:
        COMMANDS[verb](sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("interrupted; what was written before is good", file=sys.stderr)
        return 130
    finally:
        distributed.shutdown()
    return 0


def main() -> int:
    """The `protoseg` console command."""
    parser = argparse.ArgumentParser(prog="protoseg", description="Prototype-based semantic segmentation.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, command in COMMANDS.items():
        verbs.add_parser(name, help=command.__doc__, add_help=False)
    verb = parser.parse_args(sys.argv[1:2]).verb
    return run(verb, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
