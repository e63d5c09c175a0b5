"""gpu.json as a page of tables: what docs/gpu.md holds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
Shown = tuple[str, str, str]  # heading, key in the row, format of a number


class Target(NamedTuple):
    """A figure that is wanted: where it stands, and whether it is reached."""

    text: str
    value: Callable[[dict[str, Any]], float | None]
    good: Callable[[float], bool]


HEAD: Sequence[Shown] = (
    ("N", "N", ",d"), ("D", "D", "d"), ("C", "C", "d"), ("K", "K", "d"), ("type", "dtype", ""),
    ("ms", "ours_ms", ".3g"), ("forward", "forward_ms", ".3g"), ("update", "update_ms", ".3g"),
    ("loop ms", "loop_ms", ".4g"), ("times faster", "times_faster", ".1f"),
    ("three products ms", "three_products_ms", ".3g"), ("floor ms", "floor_ms", ".3g"),
    ("over floor", "over_floor", ".1f"), ("MB", "ours_mb", ".0f"), ("loop MB", "loop_mb", ".0f"),
)  # fmt: skip
CLUSTERING: Sequence[Shown] = (
    ("C", "C", "d"), ("pixels per class", "pixels_per_class", ",d"), ("K", "K", "d"),
    ("Sinkhorn, assignment ms", "sinkhorn_and_assign_ms", ".3g"), ("floor ms", "floor_ms", ".2g"),
    ("loop ms", "loop_ms", ".3g"), ("similarities ms", "own_similarities_ms", ".3g"),
    ("sums ms", "sums_ms", ".3g"), ("floor of sums ms", "sums_floor_ms", ".2g"), ("MB", "memory_mb", ".0f"),
)  # fmt: skip
ENTROPY: Sequence[Shown] = (
    ("B", "B", "d"), ("C", "C", "d"), ("size", "size", "d"), ("ms", "ours_ms", ".3g"),
    ("upsampled first ms", "plain_ms", ".3g"), ("MB", "ours_mb", ".0f"),
    ("upsampled first MB", "plain_mb", ".0f"),
)  # fmt: skip
STEP: Sequence[Shown] = (
    ("model", "backbone", ""), ("classifier", "mode", ""), ("batch", "batch", "d"), ("ms", "ms", ".1f"),
    ("images/s", "images_per_second", ".0f"), ("peak GB", "peak_gb", ".2f"),
    ("time / linear", "time_against_linear", ".3f"), ("memory / linear", "memory_against_linear", ".3f"),
)  # fmt: skip
SHARES: Sequence[Shown] = (
    ("model", "backbone", ""), ("part, timed alone", "part", ""), ("ms", "ms", ".3g"),
    ("of the linear step", "of_linear_step", ".1%"),
)  # fmt: skip
BUSY: Sequence[Shown] = (
    ("profiled", "case", ""), ("wall ms", "wall_ms", ".2f"), ("kernels ms", "device_ms", ".2f"),
    ("busy", "busy_share", ".0%"), ("kernels", "launches", ".0f"),
)  # fmt: skip
LOADER: Sequence[Shown] = (
    ("model", "model", ""), ("workers", "workers", "d"), ("waiting for data", "data_wait", ".1%"),
    ("images/s", "images_per_second", ".0f"),
)  # fmt: skip
SUMMARY: Sequence[Shown] = (
    ("model", "model", ""), ("seeds", "seeds", "d"), ("linear mIoU", "linear", ".2%"),
    ("k10 mIoU", "k10", ".2%"), ("difference", "gain", "+.2%"), ("standard error", "standard_error", ".2%"),
)  # fmt: skip
COMPILED_STEP: Sequence[Shown] = (
    ("classifier", "mode", ""), ("compiled", "compiled", ""), ("ms", "ms", ".1f"),
    ("first step s", "first_seconds", ".0f"), ("peak GB", "peak_gb", ".2f"),
)  # fmt: skip
COMPILED: Sequence[Shown] = (
    ("eager ms", "eager_ms", ".3g"), ("compiled ms", "inductor_ms", ".3g"),
    ("gradient difference", "gradient_difference", ".1g"),
)  # fmt: skip
TABLES: Sequence[tuple[str, str, str, Sequence[Shown]]] = (
    ("The head: one step (forward, backward, update)", "head", "head", HEAD),
    ("Clustering, all classes at once", "clustering", "clustering", CLUSTERING),
    ("Cross-entropy at label resolution, forward and backward", "cross_entropy", "cross_entropy", ENTROPY),
    ("Training step, bf16, 512²", "steps", "step", STEP),
    ("Parts of it", "steps", "shares", SHARES),
    ("Training step, bf16, 512×1024", "hrnet", "step", STEP),
    ("How busy the device is", "profiles", "busy", BUSY),
    ("SegFormer-B0's step compiled, batch 8", "compiled_steps", "step", COMPILED_STEP),
    ("Head compiled", "compiled", "head", COMPILED),
    ("CamVid: waiting for data", "loader_wait", "loader", LOADER),
    ("CamVid from scratch, val", "camvid", "summary", SUMMARY),
)


def _rows(checks: dict[str, Any], check: str, table: str) -> list[Row]:
    return checks.get(check, {}).get(table, [])


def _one(checks: dict[str, Any], check: str, table: str, key: str, **where: Any) -> float | None:
    """A value of the first row that has these values."""
    for row in _rows(checks, check, table):
        if all(row.get(name) == value for name, value in where.items()):
            return row.get(key)
    return None


def _against(checks: dict[str, Any], backbone: str, mode: str, other: str, key: str = "ms") -> float | None:
    """A step's figure in one mode by that in another."""
    one, two = (_one(checks, "steps", "step", key, backbone=backbone, mode=m) for m in (mode, other))
    return one / two if one and two else None


def _extra(backbone: str, mode: str, other: str, key: str = "ms") -> Callable[[dict[str, Any]], float | None]:
    def value(checks: dict[str, Any]) -> float | None:
        ratio = _against(checks, backbone, mode, other, key)
        return None if ratio is None else 100 * (ratio - 1)

    return value


TARGETS: Sequence[Target] = (
    Target(
        "whole head of a B4 linear step, at most 5 %",
        lambda c: _percent(_one(c, "steps", "shares", "of_linear_step", backbone="mit_b4",
                                part="prototype head")),
        lambda x: x <= 5,
    ),
    *(
        Target(f"{b}: prototypes against linear, {what}, at most +{most} %",
               _extra(b, "prototypes", "linear", key), lambda x, most=most: x <= most)  # type: ignore[misc]
        for b in ("mit_b0", "mit_b4") for what, key, most in (("time", "ms", 3), ("memory", "peak_gb", 5))
    ),
    *(
        Target(f"{b}: contrast against prototypes, time, at most +5 %",
               _extra(b, "prototypes+contrast", "prototypes"), lambda x: x <= 5)
        for b in ("mit_b0", "mit_b4")
    ),
    Target(
        "head against the loop, C 150, times, at least 20",
        lambda c: _one(c, "head", "head", "times_faster", C=150, N=32768, dtype="tf32"), lambda x: x >= 20,
    ),
    Target(
        "clustering of 150 classes, ms, at most 0.3",
        lambda c: _one(c, "clustering", "clustering", "sinkhorn_and_assign_ms", C=150), lambda x: x <= 0.3,
    ),
    *(
        Target(f"{b}: Hugging Face's step by ours with prototypes, at least 1.5",
               lambda c, b=b: _against(c, b, "Hugging Face", "prototypes"),  # type: ignore[misc]
               lambda x: x >= 1.5)
        for b in ("mit_b0", "mit_b4")
    ),
)  # fmt: skip


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def table(columns: Sequence[Shown], rows: Sequence[Row]) -> str:
    """A markdown table; an empty cell where a row has no such value."""
    heads = [heading for heading, _, _ in columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for _, key, form in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    """All of gpu.json for people: device, outcome of every check, targets, tables."""
    checks = found["checks"]
    device = found.get("about", {})
    versions = ", ".join(f"{name} {v}" for name, v in device.get("versions", {}).items() if v)
    parts = ["# On a GPU", f"`{found['command']}`"]
    parts.append(f"{device.get('device', 'device unknown')}; {versions}; commit {device.get('git_commit')}.")
    rates = checks.get("head", {}).get("rates")
    if rates:
        parts.append(
            f"Measured rates: products {rates['bf16_tflops']:.0f} TFLOP/s in bf16, {rates['tf32_tflops']:.0f}"
            f" in TF32, {rates['fp32_tflops']:.0f} in fp32; copy {rates['copy_gb_per_s']:.0f} GB/s."
        )
    outcome: list[Row] = [{"check": name, **entry} for name, entry in checks.items()]
    for row in outcome:
        row["what"] = str(row.get("error", row.get("why", ""))).replace("|", "/").replace("\n", " ")[:160]
        counts = row.get("outcomes")
        row["what"] = row["what"] or (", ".join(f"{n} {k}" for k, n in counts.items()) if counts else "")
    columns = (("check", "check", ""), ("", "status", ""), ("s", "seconds", ".0f"), ("what", "what", ""))
    parts.append(table(columns, outcome))
    reached = []
    for target in TARGETS:
        value = target.value(checks)
        word = None if value is None else "reached" if target.good(value) else "missed"
        reached.append({"target": target.text, "value": value, "word": word})
    if any(row["value"] is not None for row in reached):
        shown = [row for row in reached if row["value"] is not None]
        heads = (("target", "target", ""), ("measured", "value", ".3g"), ("", "word", ""))
        parts += ["## Targets", table(heads, shown)]
    for title, check, name, shown_columns in TABLES:
        rows = _rows(checks, check, name)
        if rows:
            parts += [f"## {title}", table(shown_columns, rows)]
    runs = _rows(checks, "camvid", "runs")
    if runs:
        iterations = ", ".join(f"{m} {n:,}" for m, n in sorted({(r["model"], r["iterations"]) for r in runs}))
        parts.append(f"Steps: {iterations}; several runs at once, on one device.")
    return "\n\n".join(parts) + "\n"
