"""The doctor: reads every file of a dataset in parallel and reports what training would stumble over."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protoseg.data.datasets import dataset_spec, find_split
from protoseg.data.doctor.diagnosis import (
    FileFacts,
    Finding,
    advise_label_map,
    class_table,
    diagnose,
    inverse_log_weights,
    median_frequency_weights,
)
from protoseg.data.file_dataset import ReadIds
from protoseg.data.reading.decode import read_image, read_label_ids
from protoseg.data.reading.label_ids import LabelIds, LabelMap
from protoseg.data.reading.pairing import Pairing, pair_files, read_excluded
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import write_text


@dataclass(frozen=True)
class ClassRow:
    """One line of the class table, over the first split (with its joined parts): what is trained on."""

    name: str
    pixels: int
    share: float  # of the labelled pixels
    images: int
    median_frequency_weight: float
    inverse_log_weight: float


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found. Plain data; `ok` decides the exit code."""

    dataset: str
    root: str
    images: dict[str, int]  # by split
    findings: list[Finding]
    classes: list[ClassRow]
    ignored_share: float  # of the first split's pixels
    advised_label_map: LabelMap | None = None
    bad_files: list[str] = field(default_factory=list)  # relative to the root, for data.exclude

    @property
    def ok(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"ok": self.ok, **asdict(self)}


def check_dataset(
    name: str,
    *,
    root: str | Path,
    splits: Sequence[str],
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int | None = None,
    label_map: LabelMap | None = None,
    exclude: str | Path | None = None,
    threads: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Reads every image and label of `splits` and reports all faults at once. The first split is to train on.

    The arguments are those of `build_dataset`; `on_progress(done, total)` is called after each file.
    Raises UserError only where nothing can be read: unknown dataset, missing root or split.
    """
    if name == "digits":
        raise UserError("data.name: digits is composed on the fly and has no files to check")
    spec = dataset_spec(name, classes, palette, ignore_index, label_map)
    root = Path(root)
    excluded = read_excluded(exclude, root)
    findings: list[Finding] = []
    pairs: list[tuple[str, Path, Path]] = []
    images: dict[str, int] = {}
    pairings: dict[str, Pairing] = {}
    for split in (part for joined in splits for part in joined.split("+")):
        if split in images:
            continue
        pairing = pair_files(root, find_split(name, spec, root, split), spec.homepage, excluded)
        images[split] = len(pairing.pairs)
        pairs += [(split, image, label) for image, label in pairing.pairs.values()]
        pairings[split] = pairing
        if not pairing.pairs:
            findings.append(Finding("empty split", "error", f"split '{split}' has no image with a label", ()))
    for split, pairing in pairings.items():
        findings += _pairing_findings(root, split, pairing, pairings)

    facts: list[FileFacts] = []
    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(lambda pair: inspect(root, spec.read_ids, *pair), pairs):
            facts.append(done)
            if on_progress is not None:
                on_progress(len(facts), len(pairs))

    ids = LabelIds(len(spec.classes), spec.ignore_index, spec.label_map)
    findings += diagnose(facts, ids, spec.classes, spec.colours)
    training = [f for f in facts if f.split in splits[0].split("+")]
    pixels, holders, extent, ignored = class_table(training, ids, len(spec.classes))
    absent = [entry for entry, count in zip(spec.classes, pixels) if not count]
    if not pixels.any() and any(f.id_counts for f in training):
        text = f"{splits[0]}: every pixel is ignored and nothing can be learned; is the label_map right?"
        findings.append(Finding("nothing labelled", "error", text, ()))
    elif absent and pixels.any():
        few = ", ".join(absent[:8]) + (", …" if absent[8:] else "")
        text = f"{len(absent)} class(es) have no pixel in {splits[0]}: {few}"
        findings.append(Finding("absent class", "warning", text, ()))
    labelled = int(pixels.sum())
    rows = zip(
        spec.classes,
        pixels.tolist(),
        (pixels / max(1, labelled)).tolist(),
        holders.tolist(),
        median_frequency_weights(pixels, extent),
        inverse_log_weights(pixels),
    )
    bad = {file for finding in findings if finding.severity == "error" for file in finding.files}
    return Report(
        dataset=name,
        root=str(root),
        images=images,
        findings=sorted(findings, key=lambda finding: finding.severity),  # errors first
        classes=[ClassRow(*row) for row in rows],
        ignored_share=ignored / max(1, ignored + labelled),
        advised_label_map=advise_label_map(facts, ids, len(spec.classes)),
        bad_files=sorted(bad),
    )


def _pairing_findings(
    root: Path, split: str, pairing: Pairing, pairings: Mapping[str, Pairing]
) -> list[Finding]:
    """Files that lack their partner, or have one too many."""
    advice = pairing.advice
    alone = _stems(pairing.images_alone), _stems(pairing.labels_alone)
    for other, theirs in pairings.items():
        if (
            other != split
            and all(alone)
            and alone == (_stems(theirs.labels_alone), _stems(theirs.images_alone))
        ):
            advice = f"the partners lie in '{other}': were the splits swapped?"
    found = []
    for kind, files, todo in (
        ("image without label", [_below(root, path) for path in pairing.images_alone], advice),
        ("label without image", [_below(root, path) for path in pairing.labels_alone], advice),
        ("listed name without image", pairing.missing, "add the missing files"),
        (
            "two files of one stem",
            [_below(root, second) for _, second in pairing.twins],
            "keep one of the two",
        ),
    ):
        if files:
            text = f"{len(files)} {kind} in split '{split}'; {todo.replace(f'{root}/', '')}"
            found.append(Finding(kind, "error", text, tuple(files)))
    return found


def _stems(files: Sequence[Path]) -> set[str]:
    return {path.stem for path in files}


def inspect(root: Path, read_ids: ReadIds, split: str, image_file: Path, label_file: Path) -> FileFacts:
    """Facts about one pair of files; what cannot be read is a fact too."""
    known: dict[str, Any] = {}
    try:
        image = read_image(image_file)
        known["image_size"] = tuple(image.shape[1:])
        known["digest"] = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest()
    except UserError as error:
        known["image_error"] = _without_root(error, root)
    try:
        raw = read_ids(label_file)
        known["label_size"] = raw.shape
        known["label_bits"] = raw.dtype.itemsize * 8
        values, counts = _count(raw)
        known["id_counts"] = dict(zip(values.tolist(), counts.tolist()))
    except UserError as error:
        known["label_error"] = _without_root(error, root)
        if "colour mask" in known["label_error"] and read_ids is read_label_ids:
            known["label_error"] = "colour mask"
            known["colours"] = _colours(label_file)
    return FileFacts(split, _below(root, image_file), _below(root, label_file), **known)


def _count(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if raw.dtype == np.uint8:  # many times faster than sorting
        counts = np.bincount(raw.ravel(), minlength=256)
        return np.flatnonzero(counts), counts[counts > 0]
    return np.unique(raw, return_counts=True)


def _colours(path: Path) -> tuple[tuple[int, int, int], ...]:
    pixels = read_image(path).flatten(1).T
    few = torch.unique(pixels[:: max(1, len(pixels) // 20000)], dim=0)[:64]
    return tuple((int(r), int(g), int(b)) for r, g, b in few)


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _without_root(error: UserError, root: Path) -> str:
    return str(error).replace(f"{root}/", "")


def write_bad_files(report: Report, path: str | Path) -> None:
    """Writes the files with errors, one per line, in the form that `data.exclude` reads."""
    lines = [f"# files with errors in {report.dataset} at {report.root}, relative to it", *report.bad_files]
    write_text(Path(path), "\n".join(lines) + "\n")


def print_report(report: Report, console: Console | None = None) -> None:
    """The report for people: findings, class table, advice."""
    console = console or Console()
    counts = ", ".join(f"{number} {split}" for split, number in report.images.items())
    console.print(
        f"[bold]{escape(report.dataset)}[/] at {escape(report.root)}: images {counts}", highlight=False
    )
    for finding in report.findings:
        colour = "red" if finding.severity == "error" else "yellow"
        line = f"[{colour}]{finding.severity}[/] {escape(finding.message)}"
        console.print(line, highlight=False, soft_wrap=True)
        for file in finding.files[:5]:
            console.print(f"    {escape(file)}", highlight=False, soft_wrap=True)
        if finding.files[5:]:
            console.print(f"    … and {len(finding.files) - 5} more", highlight=False)
    table = Table("class", "pixels", "share", "images", "median freq. weight", "inverse log weight")
    for row in report.classes:
        values = (f"{row.share:.2%}", row.images, row.median_frequency_weight, row.inverse_log_weight)
        table.add_row(escape(row.name), f"{row.pixels:,}", *map(str, values))
    console.print(table)
    console.print(f"ignored: {report.ignored_share:.2%} of the pixels", highlight=False)
    if report.advised_label_map is not None:
        entries = ", ".join(f"{raw}: {target}" for raw, target in report.advised_label_map.items())
        line = f"advised, below data: in the config: label_map: {{{entries}}}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)  # one line, to be copied
    console.print("[green]no errors[/]" if report.ok else "[red]errors: see above[/]")
