"""Speed, memory and size, measured as ratios within one run: python tools/benchmark.py NAME [options]."""

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in (Path(__file__).parent / "benchmarks").glob("[a-z]*.py"))

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"usage: python tools/benchmark.py {{{','.join(NAMES)}}} [options]", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
