"""Writing files: whole or not at all, in one place."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from protoseg.runtime.errors import UserError


def make_folder(path: Path) -> None:
    """With its parents. Errors: UserError if there can be no folder of this name."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: no folder can be made there ({error.strerror}); choose another") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write to; what is there when the block ends well takes the place of `path`.

    Folders are made. Errors: UserError if the file cannot be written; an older one then stays as it was.
    """
    # A digest, since the name of the file itself may leave no room for an ending.
    part = path.with_name(f".{hashlib.sha1(os.fsencode(path.name)).hexdigest()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError of its own, on top of the OSError.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise cannot_write(path, reason) from None
    finally:
        with suppress(OSError):
            part.unlink()


def cannot_write(path: Path, reason: Exception) -> UserError:
    """The one message for a file that cannot be written."""
    why = getattr(reason, "strerror", None) or reason
    return UserError(f"{path}: cannot write ({why}); make room or choose another place")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")
