"""`python -m protoseg VERB …`: the same as the `protoseg` command."""

import sys

from protoseg.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
