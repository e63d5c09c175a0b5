"""python tools/check_data.py --help; the same as `protoseg check_data`."""

import sys

from protoseg.commands.cli import execute

if __name__ == "__main__":
    sys.exit(execute("check_data"))
