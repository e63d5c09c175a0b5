"""python tools/predict.py --help; the same as `protoseg predict`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("predict"))
