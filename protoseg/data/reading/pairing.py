"""Which image file goes with which label file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from protoseg.data.reading.decode import IMAGE_ENDINGS, LABEL_ENDINGS
from protoseg.data.reading.text_lists import is_hidden, read_lines, same_form, spellings
from protoseg.runtime.errors import UserError, did_you_mean, in_short


@dataclass(frozen=True)
class Split:
    """Where one split lies under the root: a stem is a path below the folder without its ending."""

    images: str
    labels: str
    image_endings: tuple[str, ...] = IMAGE_ENDINGS
    label_endings: tuple[str, ...] = LABEL_ENDINGS
    other_endings: tuple[str, ...] = ()  # files of a label ending that are something else
    listed: str = ""  # text file with the stems of the split, one per line; none: all files


@dataclass(frozen=True)
class Pairing:
    """The files of one split: stems with both files, and those that lack one."""

    pairs: dict[str, tuple[Path, Path]]
    images_alone: list[Path]
    labels_alone: list[Path]
    missing: list[str]  # stems in the list of the split for which there is no image
    twins: list[tuple[Path, Path]]  # second files of one stem: which one is meant?
    advice: str  # what to do about files that lack their partner


def pair_files(root: Path, where: Split, homepage: str, excluded: frozenset[Path] = frozenset()) -> Pairing:
    """Finds the files of one split. Raises UserError for a missing folder."""
    images_at, labels_at = root / where.images, root / where.labels
    for what, folder in (("images", images_at), ("labels", labels_at)):
        if not folder.is_dir():
            raise UserError(
                f"data.root: folder {folder} does not exist and should hold {what}; get them: {homepage}"
            )
    images, image_twins, other_images = _stems(images_at, where.image_endings, (), excluded)
    labels, label_twins, other_labels = _stems(labels_at, where.label_endings, where.other_endings, excluded)
    missing: list[str] = []
    if where.listed:
        images, missing = _listed(root / where.listed, homepage, images)
        labels = {stem: labels[stem] for stem in images if stem in labels}
    # A file left out takes its partner with it.
    out = {stem for files in (images, labels) for stem, path in files.items() if path in excluded}
    images = {stem: path for stem, path in images.items() if stem not in out}
    labels = {stem: path for stem, path in labels.items() if stem not in out}
    images_alone, labels_alone = sorted(images.keys() - labels.keys()), sorted(labels.keys() - images.keys())
    if images_at == labels_at:  # then a file of another ending is the partner itself
        other_images = other_labels = {}
    return Pairing(
        {stem: (images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())},
        [images[stem] for stem in images_alone],
        [labels[stem] for stem in labels_alone],
        missing,
        sorted(image_twins + label_twins),
        _other_ending("a label", images_alone, other_labels, where.label_endings)
        or _other_ending("an image", labels_alone, other_images, where.image_endings)
        or _other_name(images_alone, labels_alone)
        or "add the missing files or exclude these",
    )


def _stems(
    folder: Path, endings: tuple[str, ...], others: tuple[str, ...], excluded: frozenset[Path]
) -> tuple[dict[str, Path], list[tuple[Path, Path]], dict[str, Path]]:
    """Files with one of the endings, by their path below `folder` without it; follows links to folders.

    Also pairs of files of one stem, and by stem the files of other endings.
    """
    found: dict[str, Path] = {}
    twins: list[tuple[Path, Path]] = []
    strangers: dict[str, Path] = {}
    for place, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if os.path.islink(place) and Path(place).parent.resolve().is_relative_to(Path(place).resolve()):
            raise UserError(f"{place}: links to a folder that it lies in; remove the link")
        below = Path(place).relative_to(folder).as_posix() + "/" if place != str(folder) else ""
        for name in sorted(names):
            if is_hidden(name) or name.endswith(others):
                continue
            ending = next((e for e in endings if name.lower().endswith(e.lower())), None)
            path = Path(place, name)
            if ending is None:
                strangers[same_form(below + os.path.splitext(name)[0])] = path
                continue
            stem = same_form(below + name[: -len(ending)])
            if stem not in found or found[stem] in excluded:
                found[stem] = path
            elif path not in excluded:
                twins.append((found[stem], path))
    return found, twins, strangers


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}); mend or remove it")


def _other_ending(what: str, alone: list[str], strangers: dict[str, Path], endings: tuple[str, ...]) -> str:
    """Advice where the partners are there, but with endings that are not read."""
    near = [strangers[stem] for stem in alone if stem in strangers]
    lossy = (
        " (JPEG changes ids)" if what == "a label" and near and near[0].suffix[:3].lower() == ".jp" else ""
    )
    return f"{near[0]} is not read: {what} ends in {' '.join(endings)}{lossy}" if near else ""


def _other_name(images: list[str], labels: list[str]) -> str:
    """Advice where lonely images and labels differ in the case or at one end of their names alone."""
    if not images or not labels:
        return ""
    lower = {stem.lower() for stem in labels}
    if all(stem.lower() in lower for stem in images):
        return "the names differ in upper and lower case: make them alike"
    first = Path(images[0]).name
    for label in labels:
        name = Path(label).name
        for longer, shorter, whose in ((name, first, "labels"), (first, name, "images")):
            extra = longer.replace(shorter, "", 1)
            if shorter in longer and (longer.startswith(extra) or longer.endswith(extra)):
                return f"the names of the {whose} have '{extra}' more: rename them"
    return ""


def _listed(path: Path, homepage: str, stems: Mapping[str, Path]) -> tuple[dict[str, Path], list[str]]:
    """The images of a list by their stems, and the entries for which there is none.

    An entry is a stem, or a path that ends in it, with or without the ending; more columns may follow.
    """
    try:
        lines = read_lines(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this list of files ({error.strerror}); get it: {homepage}"
        ) from None
    wanted: dict[str, Path] = {}
    missing: list[str] = []
    for line in filter(str.strip, lines):
        columns = [line, line.split()[0]]
        forms = [same_form(form) for column in columns for form in spellings(column)]
        forms += [os.path.splitext(form)[0] for form in forms]
        forms += [PurePosixPath(form).name for form in forms]
        stem = next((form for form in forms if form in stems), None)
        if stem is not None:
            wanted[stem] = stems[stem]
        else:
            entry = line.split()[0]
            missing.append(entry + (did_you_mean(entry, stems) if len(missing) < 3 else ""))
    return wanted, missing


def check_pairing(pairing: Pairing, split: str) -> None:
    """Raises UserError for files that lack their partner and for a split without files."""
    faults = [
        f"{len(files)} {what} ({in_short([*map(str, files)], 3)})"
        for files, what in (
            (pairing.images_alone, "image(s) without label"),
            (pairing.labels_alone, "label(s) without image"),
            (pairing.missing, "listed name(s) without image"),
        )
        if files
    ]
    if faults:
        raise UserError(f"split '{split}': {'; '.join(faults)}; {pairing.advice}")
    if pairing.twins:
        first, second = pairing.twins[0]
        raise UserError(f"{second}: has the same stem as {first.name}; keep one of the two")
    if not pairing.pairs:
        raise UserError(f"split '{split}': no images found; is data.root right?")
