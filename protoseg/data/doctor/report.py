"""What the doctor found: as plain data, as a list to exclude, and as text for people."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protoseg.data.doctor.class_table import ClassRow
from protoseg.data.doctor.diagnosis import Finding
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
    advised_label_map: LabelMap | None = None
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
    if report.value_range is not None:
        low, high = report.value_range
        console.print(
            f"images have more than 8 bits: {low:g} becomes black and {high:g} white; to keep it so when"
            f" images are added, below data: in the config: value_range: [{low:g}, {high:g}]",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if report.advised_label_map is not None:
        entries = ", ".join(f"{raw}: {target}" for raw, target in report.advised_label_map.items())
        line = f"advised, below data: in the config: label_map: {{{entries}}}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)  # one line, to be copied
    console.print("[green]no errors[/]" if report.ok else "[red]errors: see above[/]")
