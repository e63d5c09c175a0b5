"""`train`: train as a config file says."""

from collections.abc import Sequence
from pathlib import Path

from protoseg.commands.parser import parser_of
from protoseg.config import load_config
from protoseg.training.loop import train


def main(arguments: Sequence[str]) -> None:
    """Train a model."""
    parser = parser_of("train", "Train as a config file says.")
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/<config name>)")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on: auto, if DIR holds a checkpoint; or from this one"
    )
    parser.add_argument(
        "--extend", action="store_true", help="with --resume: up to more train.iterations than the run had"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="on top of the file's, such as train.iterations=1000",
    )
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    train(config, args.out or Path("runs") / args.config.stem, args.resume, args.extend)
