"""python tools/evaluate.py --help; the same as `protoseg evaluate`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("evaluate"))
