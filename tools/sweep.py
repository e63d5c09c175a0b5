"""python tools/sweep.py --help; the same as `protoseg sweep`."""

import sys

from protoseg.cli import run

if __name__ == "__main__":
    sys.exit(run("sweep"))
