"""The command line: `protoseg VERB …`; tools/VERB.py calls the same functions."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# GNU OpenMP's threads spin while they wait for each other, by default so long that one busy process beside a
# training on all cores slows it down twentyfold. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from protoseg import distributed
from protoseg.commands import (
    check_data_command,
    evaluate_command,
    import_weights_command,
    predict_command,
    runs_and_overrides,
)
from protoseg.config import UserError, load_config
from protoseg.gallery import write_gallery
from protoseg.sweep import LocalLauncher, SlurmLauncher, load_sweep, run_sweep
from protoseg.trainer import Interrupted, train

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
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


def sweep_command(arguments: Sequence[str]) -> None:
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


def vis_prototypes_command(arguments: Sequence[str]) -> None:
    """Figures of a run's prototypes, and a page to explore them."""
    parser = argparse.ArgumentParser(
        prog="vis_prototypes", description="Figures of a run's prototypes, and a page to explore them."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_OR_CHECKPOINT", help="one, or another to set beside it: a linear run"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/prototypes")
    parser.add_argument("--split", default="train", help="where patches and numbers come from")
    parser.add_argument("--format", choices=("png", "pdf"), default="png")
    parser.add_argument("--images", type=int, default=400, metavar="N", help="images of the split to look at")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="validation images in the page")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as data.root=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    runs, overrides = runs_and_overrides(args.runs + args.overrides)
    if args.images < 1 or args.samples < 1:
        raise UserError("--images and --samples: expected 1 or more")
    write_gallery(
        runs,
        args.out,
        split=args.split,
        suffix=args.format,
        images=args.images,
        samples=args.samples,
        overrides=overrides,
    )


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "train": train_command,
    "evaluate": evaluate_command,
    "predict": predict_command,
    "import_weights": import_weights_command,
    "check_data": check_data_command,
    "sweep": sweep_command,
    "vis_prototypes": vis_prototypes_command,
}


def run(verb: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command → exit code: 0; 1 for bad data; 2 for a user's mistake or a full disk; 128 + signal."""
    try:
        return COMMANDS[verb](sys.argv[1:] if arguments is None else arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror}; make room or choose another place", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("interrupted; what was written before is good", file=sys.stderr)
        return 130
    finally:
        distributed.shutdown()


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
