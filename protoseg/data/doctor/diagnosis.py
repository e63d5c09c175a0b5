"""What is wrong with a dataset, told from facts about its files: pure functions, no reading."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protoseg.data.classes.palette import Palette
from protoseg.data.doctor.class_table import ClassRow
from protoseg.data.doctor.facts import COLOUR_MASK, FileFacts, below
from protoseg.data.doctor.label_map_advice import stretch_factor
from protoseg.data.file_dataset import turned_advice
from protoseg.data.reading.label_ids import LabelIds, id_ranges
from protoseg.data.reading.pairing import Pairing
from protoseg.data.reading.value_range import SMALLEST_SHARE, Range, common_range
from protoseg.runtime.errors import UserError, in_short

Severity = Literal["error", "warning"]


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
    palette: Palette,
) -> list[Finding]:
    """Every finding about the contents of the files."""
    return [
        *_unreadable(facts),
        *_colour_masks(facts, palette),
        *_unknown_ids(facts, ids, len(classes)),
        *_binary_masks(facts, ids, len(classes)),
        *_mixed_bits(facts),
        *_all_ignored(facts, ids),
        *_duplicates(facts),
    ]


def _unreadable(facts: Sequence[FileFacts]) -> list[Finding]:
    found = []
    for what in ("image", "label"):
        bad = [(getattr(f, what), getattr(f, f"{what}_error")) for f in facts if getattr(f, f"{what}_error")]
        bad = [(path, error) for path, error in bad if error != COLOUR_MASK]
        if bad:
            text = f"{len(bad)} {what}(s) cannot be read, the first: {bad[0][1]}"
            found.append(Finding(f"unreadable {what}", "error", text, tuple(path for path, _ in bad)))
    return found


def _colour_masks(facts: Sequence[FileFacts], palette: Palette) -> list[Finding]:
    masks = [f for f in facts if f.label_error == COLOUR_MASK]
    if not masks:
        return []
    colours = {colour for f in masks for colour in f.colours}
    if colours and all(r == g == b for r, g, b in colours):
        advice = "the three channels are equal: save one of them"
    elif len(colours & set(palette)) > len(colours) / 2:
        advice = "the colours are those of the palette: `protoseg convert_labels colours` makes ids of them"
    else:
        advice = f"`protoseg convert_labels colours` makes them; some of the colours: {sorted(colours)[:4]}"
    text = f"{len(masks)} label(s) are colour masks, wants one channel of class ids; {advice}"
    return [Finding("colour mask", "error", text, tuple(f.label for f in masks))]


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
    step = stretch_factor(every, ids.ignore_index, count)
    if step > 255:
        return f"ids are multiples of {step}: 8-bit ids stretched to 16 bits"
    if step > 1:
        return f"ids are multiples of {step}: labels stretched for display"
    if set(every) <= {0, 255}:
        return "0 and 255 only: a binary mask"
    if max(v for v in every if v != ids.ignore_index) == count and count not in ids.allowed:
        return "ids run from 1 or include one more than there are classes"
    return "map them in data.label_map, or mend the files"


def _binary_masks(facts: Sequence[FileFacts], ids: LabelIds, count: int) -> list[Finding]:
    """0/255 masks whose 255 the loader would ignore without a word."""
    seen = {raw for f in facts for raw in f.id_counts}
    if seen != {0, 255} or ids.ignore_index != 255 or count < 2 or ids.is_class(255):
        return []
    text = "labels hold 0 and 255 only and 255 is ignored: binary masks?"
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
    """Copies of an image, all but the first: facts begin with the split to train on, whose image stays."""
    groups = defaultdict(list)
    for f in facts:
        if f.digest:
            groups[f.digest].append(f)
    across, within = [], []
    for first, *copies in groups.values():
        if others := [f for f in copies if f.split != first.split]:
            across.append((first, others[0], copies))
        elif copies:
            within.append((first, copies[0], copies))
    found: list[Finding] = []
    rows: tuple[tuple[list, Severity, str, str], ...] = (
        (across, "error", "in more than one split", "scores on them mean nothing: keep one copy"),
        (within, "warning", "twice in one split", "keep one copy"),
    )
    for sets, severity, where, advice in rows:
        if sets:
            first, other, _ = sets[0]
            text = f"{len(sets)} image(s) are {where} ({first.image} = {other.image}); {advice}"
            too_many = tuple(f.image for _, _, copies in sets for f in copies)
            found.append(Finding(f"duplicate {where}", severity, text, too_many))
    return found


def diagnose_classes(rows: Sequence[ClassRow], split: str, readable: bool) -> list[Finding]:
    """Classes without a pixel in the split to train on."""
    absent = [row.name for row in rows if not row.pixels]
    if not absent or not readable:
        return []
    if len(absent) == len(rows):
        text = f"{split}: every pixel is ignored and nothing can be learned; is the label_map right?"
        return [Finding("nothing labelled", "error", text, ())]
    few = in_short(absent, 8)
    return [
        Finding("absent class", "warning", f"{len(absent)} class(es) have no pixel in {split}: {few}", ())
    ]


def diagnose_pairing(root: Path, pairings: Mapping[str, Pairing]) -> list[Finding]:
    """Files of a split that lack their partner, or have one too many, and splits without any."""
    found = []
    for split, pairing in pairings.items():
        if not pairing.pairs:
            found.append(Finding("empty split", "error", f"split '{split}' has no image with a label", ()))
        advice = _swapped(pairing, pairings) or pairing.advice.replace(f"{root}/", "")
        for kind, files, todo in (
            ("image without label", pairing.images_alone, advice),
            ("label without image", pairing.labels_alone, advice),
            ("listed name without image", pairing.missing, "add the missing files"),
            ("two files of one stem", [second for _, second in pairing.twins], "keep one of the two"),
        ):
            if files:
                text = f"{len(files)} {kind} in split '{split}'; {todo}"
                names = tuple(f if isinstance(f, str) else below(root, f) for f in files)
                found.append(Finding(kind, "error", text, names))
    return found


def _swapped(pairing: Pairing, pairings: Mapping[str, Pairing]) -> str:
    """Advice where the lonely images and labels of a split are just those that another one lacks."""

    def stems(files: Sequence[Path]) -> set[str]:
        return {path.stem for path in files}

    images, labels = stems(pairing.images_alone), stems(pairing.labels_alone)
    for other, theirs in pairings.items():
        same = (images, labels) == (stems(theirs.labels_alone), stems(theirs.images_alone))
        if theirs is not pairing and images and labels and same:
            return f"the partners lie in '{other}': were the splits swapped?"
    return ""


def diagnose_turned(facts: Sequence[FileFacts], upright: bool) -> list[Finding]:
    """Labels of another size than their image, and images with an EXIF tag that turns them."""
    found = []
    bad = [f for f in facts if f.id_counts and f.digest and f.image_size != f.label_size]
    if bad:
        (ih, iw), (lh, lw) = bad[0].image_size, bad[0].label_size
        advice = "export both at the same size"
        if all(f.image_size == f.label_size[::-1] for f in bad):
            advice = turned_advice(upright, all(f.orientation >= 5 for f in bad))
        text = f"{len(bad)} label(s) differ in size from their image, the first: {lw} x {lh} for {iw} x {ih}"
        found.append(Finding("size mismatch", "error", f"{text}; {advice}", tuple(f.label for f in bad)))
    tagged = [f for f in facts if f.orientation != 1]
    if tagged:
        advice = (
            "they are turned as viewers show them; if the labels were drawn on the pixels as stored, say"
            " data.exif: ignore"
            if upright
            else "data.exif: ignore leaves them as stored; labels drawn in a viewer do not fit them"
        )
        text = f"{len(tagged)} image(s) have an EXIF orientation tag; {advice}"
        found.append(Finding("orientation tag", "warning", text, tuple(f.image for f in tagged)))
    return found


def diagnose_values(
    facts: Sequence[FileFacts], trained_on: Sequence[FileFacts], given: Range | None
) -> list[Finding]:
    """Images whose values do not go together, fill little of the range, or lie outside of it.

    `given`: the configured range; without one it is that of the images that are trained on.
    """
    try:
        measured = common_range(f.extremes for f in trained_on if f.extremes)
    except UserError as error:
        if given is None:
            deep = [f for f in trained_on if f.extremes and f.extremes.dtype != "uint8"]
            return [Finding("mixed depths", "error", str(error), tuple(f.image for f in deep))]
    low, high = given or measured or (0.0, 255.0)
    known = [(f, f.extremes) for f in facts if f.extremes]
    flat = [f for f, values in known if values.high - values.low < SMALLEST_SHARE * (high - low)]
    beyond = [f for f, values in known if values.high > high or values.low < low]
    range_text = f"{low:g} to {high:g}"
    found = []
    if flat:
        text = f"{len(flat)} image(s) use less than a tenth of the values from {range_text}: nearly one grey"
        found.append(Finding("little contrast", "warning", text, tuple(f.image for f in flat)))
    if beyond:
        text = f"{len(beyond)} image(s) have values beyond {range_text}, which are cut off"
        found.append(Finding("values cut off", "warning", text, tuple(f.image for f in beyond)))
    return found


def measured_range(trained_on: Sequence[FileFacts]) -> Range | None:
    """What data.value_range: auto comes to; None for images of 8 bits, and where there is no one range."""
    try:
        return common_range(f.extremes for f in trained_on if f.extremes)
    except UserError:
        return None
