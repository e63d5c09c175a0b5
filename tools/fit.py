"""python tools/fit.py --help; the same as `protoseg fit`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("fit"))
