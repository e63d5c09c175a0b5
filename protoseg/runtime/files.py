"""Writing files: whole or not at all, in one place."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from protoseg.runtime.errors import UserError

LONGEST_NAME = 230  # bytes: file systems take 255, and a step and an ending come to it
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # no other file will fare better
OF_A_FILE = {errno.EFBIG, errno.EACCES}
MAKE_ROOM = "make room or choose another place"


class DiskError(UserError):
    """The disk is full, read-only or damaged."""


def safe_name(name: str) -> str:
    """One part of a path from any text. A name that every file system takes stays as it is.

    Separators, control characters and what is not UTF-8 become "_"; a name that was changed or cut ends in a
    digest of the whole, so that two never become one.
    """
    safe = re.sub(r"[/\x00-\x1f\x7f\ud800-\udfff]", "_", name)
    kept = safe.encode()
    if safe == name and len(kept) <= LONGEST_NAME:
        return name
    digest = hashlib.sha1(os.fsencode(name)).hexdigest()[:8]
    return f"{kept[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"


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
    # A digest, since the name of the file itself may leave no room for an ending; one for each process, since
    # two may write the same features.
    part = path.with_name(f".{hashlib.sha1(os.fsencode(path.name)).hexdigest()}.{os.getpid()}.part")
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
    kind = DiskError if getattr(reason, "errno", None) in OF_THE_DISK else UserError
    return kind(f"{path}: cannot write ({why}); {MAKE_ROOM}")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, whole or not at all; names of files that are not UTF-8 come out as they are."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value
