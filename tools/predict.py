"""python tools/predict.py --help; the same as `protoseg predict`."""

import sys

from protoseg.cli import run

if __name__ == "__main__":
    sys.exit(run("predict"))
