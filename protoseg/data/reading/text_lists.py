"""Lists of files as people and their programs write them, and the files that the entries mean."""

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from protoseg.runtime.errors import UserError, did_you_mean

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_QUOTES = "\"'\u201c\u201d\u2018\u2019"
# Folders that systems and programs add beside people's files.
_ADDED = {
    "__macosx", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "@__thumb", "#recycle", "#snapshot",
    "~snapshot", "$recycle.bin", "system volume information", "lost+found", "__pycache__",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: hidden, or added by a system."""
    return name.startswith(".") or name.lower() in _ADDED


def same_form(name: str) -> str:
    """The name in one Unicode form: the same letters can be written in several (é as one sign or two)."""
    return normalize("NFC", name)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, UTF-16 or UTF-32, or else in Windows' Western encoding."""
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:  # UTF-16 without its mark
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    return text.splitlines()


def spellings(line: str) -> Iterator[str]:
    """What an entry may mean: as it stands, without spaces and quotes around it, with slashes turned."""
    yield line
    bare = line.strip().strip(_QUOTES).strip()
    yield bare
    yield PurePosixPath(re.sub(r"^[A-Za-z]:", "", bare).replace("\\", "/")).as_posix()


def read_excluded(exclude: Path | None, root: Path) -> frozenset[Path]:
    """The files named by the lines of a text file; lines that start with # are comments.

    A line is a path, relative to `root` or absolute, or its end, with or without the ending. Raises UserError
    for a line that fits no file, or files of several samples.
    """
    if exclude is None:
        return frozenset()
    try:
        lines = read_lines(exclude)
    except OSError as error:
        raise UserError(
            f"data.exclude: cannot read {exclude} ({error.strerror}); check_data writes it"
        ) from None
    found: set[Path] = set()
    below: dict[str, Path] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        # Last the bytes themselves: a name that is not UTF-8, as zips bring them.
        meant = (*spellings(line), os.fsdecode(line.encode("cp1252", errors="ignore")))
        direct = next((root / each for each in meant if _is_inside(root, each)), None)
        if direct is not None:
            found.add(direct)
            continue
        below = below or {same_form(path.relative_to(root).as_posix()): path for path in visible_files(root)}
        found |= _meant(line, below, f"data.exclude: {exclude} line {number}", root)
    return frozenset(found)


def _is_inside(root: Path, entry: str) -> bool:
    """Whether it is the plain relative path of a file."""
    path = PurePosixPath(entry)
    return not path.is_absolute() and ".." not in path.parts and os.path.isfile(root / entry)


def visible_files(root: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones and those in hidden folders; links are followed."""
    for place, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield from (Path(place, name) for name in names if not is_hidden(name))


def _meant(line: str, below: dict[str, Path], where: str, root: Path) -> set[Path]:
    """The file that shares the longest end with the entry, with all others of its sample."""
    entry = same_form(list(spellings(line))[-1])
    parts = PurePosixPath(os.path.normpath(entry)).parts
    for ends in range(len(parts), 0, -1):
        end = "/".join(parts[-ends:])
        hits = {name for name in below if f"/{name}".endswith(f"/{end}")}
        hits = hits or {name for name in below if f"/{os.path.splitext(name)[0]}".endswith(f"/{end}")}
        samples = {tuple(PurePosixPath(os.path.splitext(name)[0]).parts[1:]) for name in hits}
        if len(samples) > 1:
            raise UserError(f"{where}: '{entry}' fits {', '.join(sorted(hits)[:3])}; write the whole path")
        if hits:
            return {below[name] for name in hits}
    raise UserError(f"{where}: '{entry}' fits no file below {root}{did_you_mean(entry, below)}")
