"""python tools/import_weights.py --help; the same as `protoseg import_weights`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("import_weights"))
