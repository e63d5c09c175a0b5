"""python tools/sweep.py --help; the same as `protoseg sweep`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("sweep"))
