"""python tools/convert_labels.py --help; the same as `protoseg convert_labels`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("convert_labels"))
