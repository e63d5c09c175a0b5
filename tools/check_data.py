"""python tools/check_data.py --help; the same as `protoseg check_data`."""

import sys

from protoseg.cli import run

if __name__ == "__main__":
    sys.exit(run("check_data"))
