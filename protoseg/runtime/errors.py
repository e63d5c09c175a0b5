"""The error that a user can mend, and what its messages are made of."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong, where, and what to do."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", prefix: str = "") -> str:
    """The end of a message on an unknown name: the known one most like it, if any is, behind `prefix`."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else otherwise
    return f"; {hint}" if hint else ""


def in_short(names: Sequence[str], longest: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:longest]) + (f", … and {len(names) - longest} more" if names[longest:] else "")
