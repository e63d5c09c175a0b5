"""python tools/import_weights.py --help; the same as `protoseg import_weights`."""

import sys

from protoseg.cli import run

if __name__ == "__main__":
    sys.exit(run("import_weights"))
