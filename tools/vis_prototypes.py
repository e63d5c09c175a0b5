"""python tools/vis_prototypes.py --help; the same as `protoseg vis_prototypes`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("vis_prototypes"))
