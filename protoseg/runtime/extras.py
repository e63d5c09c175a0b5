"""Packages that only some commands need."""

import shlex
from importlib import import_module
from typing import Any

from protoseg.runtime.errors import UserError


def import_extra(name: str, package: str, where: str = "") -> Any:
    """The module `name`, which pip installs with `package`.

    Errors: UserError with the line that installs it; it begins with `where`, which says what needs it.
    """
    try:
        return import_module(name)
    except ImportError:
        missing = name.split(".")[0]
        raise UserError(
            f"{where}{missing} is not installed; run: pip install {shlex.quote(package)}"
        ) from None
