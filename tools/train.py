"""python tools/train.py --help; the same as `protoseg train`."""

import sys

from protoseg.cli import run

if __name__ == "__main__":
    sys.exit(run("train"))
