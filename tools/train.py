"""python tools/train.py --help; the same as `protoseg train`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("train"))
