"""`configs`: list the configs that come with the package."""

from collections.abc import Sequence

from protoseg.commands.parser import parser_of
from protoseg.runtime.shipped import shipped_configs


def main(arguments: Sequence[str]) -> None:
    """List the shipped configs: name, and what its header says."""
    parser = parser_of("configs", "List the shipped configs: `protoseg train NAME` takes each of them.")
    parser.parse_args(arguments)
    configs = shipped_configs()
    width = max(map(len, configs), default=0)
    for name, path in configs.items():
        # The first line of each is the command.
        about = path.read_text().splitlines()[1].removeprefix("#").strip()
        print(f"{name:{width}}  {about}")
