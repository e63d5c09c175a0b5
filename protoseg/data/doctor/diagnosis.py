"""What is wrong with a dataset, told from facts about its files: pure functions, no reading."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protoseg.data.reading.label_ids import IGNORE, LabelIds, LabelMap, id_ranges

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class FileFacts:
    """What the doctor keeps of one image and its label. Paths are relative to the root."""

    split: str
    image: str
    label: str
    image_error: str = ""
    label_error: str = ""
    image_size: tuple[int, int] = (0, 0)  # height, width
    label_size: tuple[int, int] = (0, 0)
    label_bits: int = 8
    digest: str = ""  # of the image's pixels
    id_counts: Mapping[int, int] = field(default_factory=dict)  # raw id → pixels
    colours: tuple[tuple[int, int, int], ...] = ()  # of a label that is a colour mask, the first few


@dataclass(frozen=True)
class Finding:
    """One kind of fault and the files that have it."""

    kind: str
    severity: Severity
    message: str  # one line: what is wrong and what to do
    files: tuple[str, ...]


def diagnose(
    facts: Sequence[FileFacts],
    ids: LabelIds,
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> list[Finding]:
    """Every finding about the contents of the files, errors first."""
    findings = [
        *_unreadable(facts),
        *_colour_masks(facts, palette),
        *_sizes(facts),
        *_unknown_ids(facts, ids, len(classes)),
        *_binary_masks(facts, ids, len(classes)),
        *_mixed_bits(facts),
        *_all_ignored(facts, ids),
        *_duplicates(facts),
    ]
    return sorted(findings, key=lambda finding: finding.severity)


def _unreadable(facts: Sequence[FileFacts]) -> list[Finding]:
    found = []
    for what in ("image", "label"):
        bad = [(getattr(f, what), getattr(f, f"{what}_error")) for f in facts if getattr(f, f"{what}_error")]
        bad = [(path, error) for path, error in bad if error != "colour mask"]
        if bad:
            text = f"{len(bad)} {what}(s) cannot be read, the first: {bad[0][1]}"
            found.append(Finding(f"unreadable {what}", "error", text, tuple(path for path, _ in bad)))
    return found


def _colour_masks(facts: Sequence[FileFacts], palette: Sequence[tuple[int, int, int]]) -> list[Finding]:
    masks = [f for f in facts if f.label_error == "colour mask"]
    if not masks:
        return []
    colours = {colour for f in masks for colour in f.colours}
    if colours and all(r == g == b for r, g, b in colours):
        advice = "the three channels are equal: save one of them"
    elif len(colours & set(palette)) > len(colours) / 2:
        advice = "the colours are those of the palette: replace each by its class id"
    else:
        advice = f"replace each colour by its class id; some of the colours: {sorted(colours)[:4]}"
    text = f"{len(masks)} label(s) are colour masks, wants one channel of class ids; {advice}"
    return [Finding("colour mask", "error", text, tuple(f.label for f in masks))]


def _sizes(facts: Sequence[FileFacts]) -> list[Finding]:
    bad = [f for f in facts if f.id_counts and f.digest and f.image_size != f.label_size]
    if not bad:
        return []
    (ih, iw), (lh, lw) = bad[0].image_size, bad[0].label_size
    turned = all(f.image_size == f.label_size[::-1] for f in bad)
    why = " (turned: an EXIF rotation that the label does not have?)" if turned else ""
    text = f"{len(bad)} label(s) differ in size from their image, the first: {lw} x {lh} for {iw} x {ih}{why}"
    return [Finding("size mismatch", "error", text, tuple(f.label for f in bad))]


def _unknown_ids(facts: Sequence[FileFacts], ids: LabelIds, count: int) -> list[Finding]:
    allowed = set(ids.allowed.tolist())
    bad = [f for f in facts if set(f.id_counts) - allowed]
    if not bad:
        return []
    every = sorted({raw for f in facts for raw in f.id_counts})
    unknown = [raw for raw in every if raw not in allowed]
    if len(unknown) > 40 and any(len(f.id_counts) > 60 for f in bad):
        why = "so many ids look like a photograph or a lossy (JPEG) copy in place of a label"
    else:
        why = _explain(every, ids, count)
    text = (
        f"{len(bad)} label(s) hold ids that are neither mapped nor ignored: {id_ranges(unknown)} "
        f"(allowed {id_ranges(ids.allowed)}); {why}"
    )
    return [Finding("unknown label id", "error", text, tuple(f.label for f in bad))]


def _explain(every: Sequence[int], ids: LabelIds, count: int) -> str:
    step = _stretch(every, ids.ignore_index, count)
    if step > 255:
        return f"ids are multiples of {step}: 8-bit ids stretched to 16 bits, see the advised label_map"
    if step > 1:
        return f"ids are multiples of {step}: labels stretched for display, see the advised label_map"
    if set(every) <= {0, 255}:
        return "0 and 255 only: a binary mask, see the advised label_map"
    if max(v for v in every if v != ids.ignore_index) == count and count not in ids.allowed:
        return "ids run from 1 or include one more than there are classes, see the advised label_map"
    return "map them in data.label_map, or mend the files"


def _stretch(every: Sequence[int], ignore_index: int, count: int) -> int:
    """The factor by which ids were multiplied, 1 if they were not."""
    # The ignored id is stretched like the others, or left alone.
    values = [v for v in every if v not in (0, ignore_index, ignore_index * 257)]
    step = int(np.gcd.reduce(values)) if values else 1
    return step if len(values) > 1 and step > 1 and max(values) // step < count else 1


def _binary_masks(facts: Sequence[FileFacts], ids: LabelIds, count: int) -> list[Finding]:
    """0/255 masks whose 255 the loader would ignore without a word."""
    seen = {raw for f in facts for raw in f.id_counts}
    if seen != {0, 255} or ids.ignore_index != 255 or count < 2 or ids.is_class(255):
        return []
    text = "labels hold 0 and 255 only and 255 is ignored: binary masks? see the advised label_map"
    return [Finding("binary mask", "error", text, tuple(f.label for f in facts if 255 in f.id_counts))]


def _mixed_bits(facts: Sequence[FileFacts]) -> list[Finding]:
    wide = [f for f in facts if f.label_bits > 8]
    if not wide or len(wide) == sum(bool(f.id_counts) for f in facts):
        return []
    text = f"{len(wide)} label(s) have {wide[0].label_bits} bits, the others 8; were they exported alike?"
    return [Finding("mixed bit depth", "warning", text, tuple(f.label for f in wide))]


def _all_ignored(facts: Sequence[FileFacts], ids: LabelIds) -> list[Finding]:
    empty = [
        f for f in facts if f.id_counts and all(ids.target(raw) == ids.ignore_index for raw in f.id_counts)
    ]
    if not empty:
        return []
    text = (
        f"{len(empty)} label(s) are ignored everywhere and teach nothing; exclude them or mend the label_map"
    )
    return [Finding("all ignored", "warning", text, tuple(f.label for f in empty))]


def _duplicates(facts: Sequence[FileFacts]) -> list[Finding]:
    groups = defaultdict(list)
    for f in facts:
        if f.digest:
            groups[f.digest].append(f)
    across = [g for g in groups.values() if len({f.split for f in g}) > 1]
    within = [g for g in groups.values() if len(g) > 1 and len({f.split for f in g}) == 1]
    found: list[Finding] = []
    rows: tuple[tuple[list, Severity, str, str], ...] = (
        (across, "error", "in more than one split", "scores on them mean nothing: remove one copy"),
        (within, "warning", "twice in one split", "remove one copy"),
    )
    for sets, severity, where, advice in rows:
        if sets:
            pair = " = ".join(f.image for f in sets[0][:2])
            text = f"{len(sets)} image(s) are {where} ({pair}); {advice}"
            found.append(
                Finding(f"duplicate {where}", severity, text, tuple(f.image for g in sets for f in g))
            )
    return found


def advise_label_map(facts: Sequence[FileFacts], ids: LabelIds, count: int) -> LabelMap | None:
    """A label map that would make the ids found fit, None where they fit already or cannot."""
    every = sorted({raw for f in facts for raw in f.id_counts})
    if every == [0, 255] and count >= 2 and not ids.is_class(255):
        return {0: 0, 255: 1}
    if not set(every) - set(ids.allowed.tolist()) or len(every) > 4 * count + 40:
        return None
    step = _stretch(every, ids.ignore_index, count)
    values = [v for v in every if v != ids.ignore_index]
    if step > 1:
        return {v: v // step if v // step < count else IGNORE for v in values}
    if max(values) == count:  # every id, since a rare class may be missing in these files
        return {**({0: IGNORE} if 0 in values else {}), **{v: v - 1 for v in range(1, count + 1)}}
    return {v: v if v < count else IGNORE for v in values}


def class_table(
    facts: Sequence[FileFacts], ids: LabelIds, count: int
) -> tuple[NDArray, NDArray, NDArray, int]:
    """Per class: pixels, images that hold it, labelled pixels of those images; and ignored pixels in all."""
    pixels, images, extent = (np.zeros(count, dtype=np.int64) for _ in range(3))
    ignored = 0
    for f in facts:
        own: Counter[int] = Counter()
        for raw, number in f.id_counts.items():
            target = ids.target(raw)
            if 0 <= target < count:
                own[target] += number
            elif target == ids.ignore_index:
                ignored += number
        for target, number in own.items():
            pixels[target] += number
            images[target] += 1
            extent[target] += own.total()
    return pixels, images, extent, ignored


def median_frequency_weights(pixels: NDArray, extent: NDArray) -> list[float]:
    """median(f) / f_c, f_c = share of class c in the images that hold it; 0 for absent classes.

    Source: Eigen, Fergus, "Predicting depth, surface normals and semantic labels", ICCV 2015, section 4.3.2.
    """
    present = pixels > 0
    frequency = pixels[present] / extent[present]
    weights = np.zeros(len(pixels))
    weights[present] = np.median(frequency) / frequency if present.any() else 0
    return [round(float(w), 4) for w in weights]


def inverse_log_weights(pixels: NDArray) -> list[float]:
    """1 / ln(1.02 + p_c), p_c = share of class c in all labelled pixels.

    Source: Paszke et al., "ENet", arXiv 1606.02147, section 4.
    """
    return [round(float(w), 4) for w in 1 / np.log(1.02 + pixels / max(1, pixels.sum()))]
