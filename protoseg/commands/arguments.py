"""Command-line arguments that several verbs share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from protoseg.config import Config
from protoseg.evaluation.inference import InferenceSettings
from protoseg.runtime.errors import UserError


def runs_and_overrides(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """One or two runs, and `key.sub=value` overrides, told apart from positional arguments.

    Errors: UserError for no run, or more than two.
    """
    overrides = [each for each in given if "=" in each and not Path(each).exists()]
    runs = [Path(each) for each in given if each not in overrides]
    if not 1 <= len(runs) <= 2:
        raise UserError(f"give one run, or two to compare; got {len(runs)}")
    return runs, overrides


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """The options that say how an image goes through the model."""
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1.0], metavar="S", help="averaged over these"
    )
    parser.add_argument("--flip", action="store_true", help="averaged with the mirrored image")
    parser.add_argument("--window", nargs=2, type=int, metavar=("H", "W"), help="sliding window in pixels")
    parser.add_argument(
        "--step", nargs=2, type=int, metavar=("H", "W"), help="between windows (default: 2/3 of the window)"
    )


def protocol_of(args: argparse.Namespace, config: Config) -> InferenceSettings:
    """What `add_protocol` read; without a window, that of the model's own evaluation."""
    return InferenceSettings(
        tuple(args.window) if args.window else config.eval.window,
        tuple(args.step) if args.step else None,
        tuple(args.scales),
        args.flip,
        batch=8 if torch.cuda.is_available() else 1,
    )
