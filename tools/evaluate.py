"""python tools/evaluate.py --help; the same as `protoseg evaluate`."""

import sys

from protoseg.cli import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
