"""`check_data`: find what is wrong with a dataset before training on it."""

from collections.abc import Sequence
from pathlib import Path

from protoseg.commands.parser import parser_of
from protoseg.config import load_config
from protoseg.data.ade20k_conversion import prepare_ade20k_full
from protoseg.data.datasets import data_root
from protoseg.data.doctor.check import check_dataset
from protoseg.data.doctor.report import print_report, write_bad_files
from protoseg.runtime.console import progress
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import write_json


def main(arguments: Sequence[str]) -> int:
    """Find what is wrong with a dataset before training on it."""
    parser = parser_of("check_data", "Check a config's dataset; exit code 1 if it has errors.")
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--bad-files", type=Path, metavar="FILE", help="write the list for data.exclude")
    parser.add_argument("--prepare", action="store_true", help="first convert a download that needs it")
    parser.add_argument("--threads", type=int, default=4, metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as data.root=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    if args.threads < 1:
        raise UserError(f"--threads: expected 1 or more, got {args.threads}")
    data = load_config(args.config, args.overrides).data
    if args.prepare:
        if not data.name.startswith("ade20k_full"):
            raise UserError(f"--prepare: '{data.name}' is read as it was released, leave the option out")
        with progress("convert") as on_progress:
            written = prepare_ade20k_full(data_root(data), threads=args.threads, on_progress=on_progress)
        print(f"{written} images converted")
    with progress("check") as on_progress:
        report = check_dataset(data, threads=args.threads, on_progress=on_progress)
    print_report(report)
    if args.json:
        write_json(args.json, report.to_plain())
    if args.bad_files:
        write_bad_files(report, args.bad_files)
    return 0 if report.ok else 1
