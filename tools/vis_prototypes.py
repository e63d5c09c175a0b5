"""python tools/vis_prototypes.py --help; the same as `protoseg vis_prototypes`."""

import sys

from protoseg.cli import run

if __name__ == "__main__":
    sys.exit(run("vis_prototypes"))
