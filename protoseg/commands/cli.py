"""The command line: `protoseg VERB …`; tools/VERB.py calls the same function."""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

# GNU OpenMP's threads spin while they wait for each other, by default so long that one busy process beside a
# training on all cores slows it down twentyfold. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from protoseg.commands.parser import Parser
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import MAKE_ROOM, OF_A_FILE, OF_THE_DISK
from protoseg.runtime.signals import Interrupted

# Each is a module of this package with a `main(arguments)`; it is imported when asked for.
VERBS = {
    "train": "train a model",
    "fit": "put prototypes on frozen features, without training",
    "evaluate": "score a trained model on a split, or compare two",
    "predict": "label images, folders, videos or a webcam",
    "vis_prototypes": "figures of a run's prototypes, and a page to explore them",
    "sweep": "train many variants of a config and compare them",
    "check_data": "find what is wrong with a dataset before training on it",
    "convert_labels": "make a dataset of COCO, labelme, YOLO or colour-coded annotations",
    "import_weights": "make a checkpoint of ours from another program's",
    "export": "write a trained model as ONNX, torch.export or safetensors",
    "configs": "list the configs that come with the package",
}


def execute(verb: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command → exit code: 0; 1 for bad data; 2 for a user's mistake or a full disk; 128 + signal."""
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text, and the terminal not know all
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        module = importlib.import_module(f"protoseg.commands.{verb}")
        return module.main(sys.argv[1:] if arguments is None else arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in OF_THE_DISK | OF_A_FILE:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror}; {MAKE_ROOM}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(stopped)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("interrupted; what was written before is good", file=sys.stderr)
        return 130
    finally:
        if "torch" in sys.modules:
            importlib.import_module("protoseg.runtime.distributed").shutdown()


def main() -> int:
    """The `protoseg` console command."""
    parser = Parser(prog="protoseg", description="Prototype-based semantic segmentation.")
    parser.add_argument("--version", action="version", version=f"protoseg {version('protoseg')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, what in VERBS.items():
        verbs.add_parser(name, help=what, add_help=False)
    try:
        verb = parser.parse_args(sys.argv[1:2]).verb
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return execute(verb, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
