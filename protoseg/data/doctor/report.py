"""What the doctor found: as plain data, as a list to exclude, and as text for people."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protoseg.data.doctor.class_table import ClassRow
from protoseg.data.doctor.diagnosis import Finding
from protoseg.data.doctor.label_map_advice import IdRow
from protoseg.data.reading.label_ids import LabelMap
from protoseg.data.reading.value_range import Range
from protoseg.runtime.files import write_text


@dataclass(frozen=True)
class DataReport:
    """What `check_dataset` found. Plain data; `ok` decides the exit code."""

    dataset: str
    root: str
    images: dict[str, int]  # by split
    findings: list[Finding]
    classes: list[ClassRow]  # over the first split, with its joined parts: what is trained on
    ignored_share: float  # of the first split's pixels
    value_range: Range | None = None  # of images with more than 8 bits: what becomes 0 and 255
    ids: list[IdRow] = field(default_factory=list)  # of all files, where some do not fit
    advised_label_map: LabelMap | None = None
    advice_ignores: float = 0.0  # share of all pixels that the advice would send to ignore
    bad_files: list[str] = field(default_factory=list)  # relative to the root, for data.exclude

    @property
    def ok(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"ok": self.ok, **asdict(self)}


def write_bad_files(report: DataReport, path: str | Path) -> None:
    """Writes the files with errors, one per line, in the form that `data.exclude` reads."""
    lines = [f"# files with errors in {report.dataset} at {report.root}, relative to it", *report.bad_files]
    write_text(Path(path), "\n".join(lines) + "\n")


def print_report(report: DataReport, console: Console | None = None) -> None:
    """The report for people: findings, class table, advice."""
    console = console or Console(emoji=False)
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
    if report.value_range is not None:
        low, high = report.value_range
        console.print(
            f"images have more than 8 bits: {low:g} becomes black and {high:g} white; to keep it so when"
            f" images are added, below data: in the config: value_range: [{low:g}, {high:g}]",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if report.ids:
        _print_ids(report, console)
    console.print("[green]no errors[/]" if report.ok else "[red]errors: see above[/]")


def _print_ids(report: DataReport, console: Console) -> None:
    """The ids of the files, and a label map to copy where one is plain."""
    largest = sorted(report.ids, key=lambda row: -row.pixels)[:40]
    table = Table("id in the files", "pixels", "share", "images", "read as")
    for row in sorted(largest, key=lambda row: row.raw_id):
        table.add_row(
            str(row.raw_id), f"{row.pixels:,}", f"{row.share:.2%}", str(row.images), escape(row.meaning)
        )
    console.print(table)
    if len(report.ids) > len(largest):
        console.print(f"and {len(report.ids) - len(largest)} ids with fewer pixels", highlight=False)
    if report.advised_label_map is None:
        line = "no label_map is plain from these ids: say in data.label_map what each of them means"
    else:
        entries = ", ".join(f"{raw}: {target}" for raw, target in report.advised_label_map.items())
        lost = f", ignores {report.advice_ignores:.2%} of the pixels" if report.advice_ignores else ""
        names = ", ".join(
            f"{raw} is {report.classes[target].name}"
            for raw, target in list(report.advised_label_map.items())[:5]
            if isinstance(target, int)
        )
        console.print(f"confirm this: {names}{lost}; if so,", highlight=False, markup=False, soft_wrap=True)
        line = f"advised, below data: in the config: label_map: {{{entries}}}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)  # one line, to be copied
