"""Writing files: whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from protoseg.runtime.errors import UserError


def make_folder(path: Path) -> None:
    """With its parents. Errors: UserError if there can be no folder of this name."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: no folder can be made there ({error.strerror}); choose another") from None


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON under a temporary name, then rename."""
    write_text(path, json.dumps(content, indent=2) + "\n")
