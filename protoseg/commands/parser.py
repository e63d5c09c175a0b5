"""The arguments of a command; what is wrong with them is one line, as every other mistake."""

import argparse
from typing import NoReturn

from protoseg.runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's, without its habit to print the usage above each error."""

    def error(self, message: str) -> NoReturn:
        """Errors: UserError."""
        # Overrides may be left out; argparse names them with what is missing.
        what = message.replace(", key.sub=value", "")
        raise UserError(f"{what}; `{self.prog} --help` lists what there is")


def parser_of(verb: str, about: str) -> Parser:
    """The parser of one verb."""
    return Parser(prog=f"protoseg {verb}", description=about)
