"""What is wrong with the images themselves: how they are turned, and what their values fill."""

from collections.abc import Sequence

from protoseg.data.doctor.diagnosis import Finding
from protoseg.data.doctor.facts import FileFacts
from protoseg.data.file_dataset import turned_advice
from protoseg.data.reading.value_range import SMALLEST_SHARE, Range, common_range
from protoseg.runtime.errors import UserError


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
