"""python tools/export.py --help; the same as `protoseg export`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("export"))
