"""The prototype explorer: one HTML file with everything in it, from `page.html` and collected data."""

import base64
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from protoseg.data.classes.palette import default_palette
from protoseg.data.tree import LabelTree
from protoseg.figures.pictures import Colours, outlined, resized, shades
from protoseg.figures.prototype_figures import prototypes_in_use
from protoseg.figures.survey import Patch, Sample, Survey, similarity_maps

LONGEST_SIDE = 640  # pixels of a sample image in the page
MOST_CELLS = 128 * 128  # of the map in which pixels can be asked
HEAT_NUMBERS = 6_000_000  # bytes of similarity maps, before compression
PATCHES = 3600  # in the whole page
LOSSLESS_PIXELS = 20_000  # smaller pictures stay PNG


@dataclass(frozen=True)
class FigureEntry:
    """A finished picture for the page."""

    title: str
    caption: str
    png: bytes


def explorer_page(
    *,
    title: str,
    about: str,
    classes: Sequence[str],
    palette: Colours,
    protos_CKD: NDArray,
    live_C: NDArray[np.bool_],
    survey: Survey,
    samples: Sequence[Sample],
    names: tuple[str, str | None],
    second: Sequence[NDArray] = (),
    figures: Sequence[FigureEntry] = (),
    score_name: str = "cosine",
    prior_C: NDArray | None = None,
    tree: LabelTree | None = None,
) -> str:
    """The page as text. Labels of C and above are inner nodes of the tree, then ignored pixels.

    second: another model's predictions (H, W) for the samples; `names[1]` is what it is called. score_name:
    what the samples' class scores are, if not cosines. prior_C: what the model adds to a class's cosine.
    """
    num_classes, num_prototypes, _ = protos_CKD.shape
    safe = default_palette(num_classes)
    low = _lowest_cosine(samples, protos_CKD)
    scores = np.concatenate([sample.scores[live_C[sample.classes]] for sample in samples])
    score_range = (-1.0, 1.0) if score_name == "cosine" else (float(scores.min()), float(scores.max()))
    per_prototype = max(1, min(6, PATCHES // (num_classes * num_prototypes)))
    side = 96 if num_classes * num_prototypes * per_prototype <= 1000 else 64
    data = {
        "title": title,
        "about": about,
        "classes": list(classes),
        "live": [bool(live) for live in live_C],
        "num_prototypes": num_prototypes,
        "palettes": {"dataset": [list(colour) for colour in palette], "safe": [list(c) for c in safe]},
        "shades": {
            "dataset": shades(palette, num_prototypes).reshape(-1, 3).tolist(),
            "safe": shades(safe, num_prototypes).reshape(-1, 3).tolist(),
        },
        "runners_up": samples[0].classes.shape[-1],
        "heat_range": [low, 1.0],
        "score_name": score_name,
        "score_range": score_range,
        "prior": None if prior_C is None else [round(float(x), 3) for x in prior_C],
        "in_use": [round(float(x), 1) for x in prototypes_in_use(survey.share_CK)],
        "names": list(names),
        "tree": None if tree is None else _tree(tree),
        "prototypes": [
            {
                "share": _number(survey.share_CK.flat[m]),
                "precision": _number(survey.precision_CK.flat[m]),
                "cosine": _number(survey.cosine_CK.flat[m]),
                "patches": [_patch(patch, side) for patch in patches[:per_prototype]],
            }
            for m, patches in enumerate(survey.patches)
        ],
        "samples": [
            _sample(sample, protos_CKD, low, score_range, second[i] if second else None, len(samples))
            for i, sample in enumerate(samples)
        ],
        "figures": [
            {"title": figure.title, "caption": figure.caption, "src": _uri("png", figure.png)}
            for figure in figures
        ],
    }
    # "<" must not end the script element early.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("protoseg.figures").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/", text)


def _tree(tree: LabelTree) -> dict[str, Any]:
    """By node: its name, the path down to it, its first class; all nodes depth first."""
    nodes = range(len(tree.names))
    return {
        "names": tree.names,
        "paths": [tree.path(v) for v in nodes],
        "first": [tree.leaves(v)[0] for v in nodes],
        "order": tree.depth_first(),
    }


def _sample(
    sample: Sample,
    protos_CKD: NDArray,
    low: float,
    score_range: tuple[float, float],
    second: NDArray | None,
    num_samples: int,
) -> dict[str, Any]:
    height, width = sample.image.shape[:2]
    shrink = min(1.0, LONGEST_SIDE / max(height, width))
    shown = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    picture = Image.fromarray(sample.image).resize((shown[1], shown[0]), Image.Resampling.LANCZOS)
    rows, columns = sample.nearest.shape
    cells = _fit((rows, columns), MOST_CELLS)
    heat_size = _fit((rows, columns), HEAT_NUMBERS // (len(protos_CKD) * protos_CKD.shape[1] * num_samples))
    heat = similarity_maps(sample.emb_hwD, protos_CKD.reshape(-1, protos_CKD.shape[-1]), heat_size)
    content = {
        "name": sample.name,
        "image": _picture(picture),
        "height": shown[0],
        "width": shown[1],
        "rows": cells[0],
        "columns": cells[1],
        "heatRows": heat_size[0],
        "heatColumns": heat_size[1],
        "label": _pack(resized(sample.label, shown)),
        "prediction": _pack(resized(sample.prediction, shown)),
        "nearest": _pack(resized(sample.nearest, cells)),
        "classes": _pack(resized(sample.classes, cells)),
        "scores": _pack(_steps(resized(sample.scores, cells), score_range, 65535)),
        "heat": _pack(_steps(heat, (low, 1.0), 255), "u8"),
    }
    if second is not None:
        content["second"] = _pack(resized(second, shown))
    return content


def _lowest_cosine(samples: Sequence[Sample], protos_CKD: NDArray) -> float:
    """Lower end of the heat scale: the smallest cosine, to one decimal, of a coarse look."""
    rows = protos_CKD.reshape(-1, protos_CKD.shape[-1])
    size = (8, 8)
    return min(float(np.floor(similarity_maps(s.emb_hwD, rows, size).min() * 10) / 10) for s in samples)


def _fit(size: tuple[int, int], most: int) -> tuple[int, int]:
    """The size shrunk to at most `most` cells."""
    shrink = min(1.0, (most / (size[0] * size[1])) ** 0.5)
    return max(1, int(size[0] * shrink)), max(1, int(size[1] * shrink))


def _steps(values: NDArray, ends: tuple[float, float], most: int) -> NDArray:
    """Numbers between the two ends as whole numbers 0 … most."""
    return np.round((values.clip(*ends) - ends[0]) / max(ends[1] - ends[0], 1e-9) * most)


def _pack(array: NDArray, kind: str = "u16") -> dict[str, str]:
    raw = np.ascontiguousarray(array).astype("<u2" if kind == "u16" else "u1").tobytes()
    return {"type": kind, "data": base64.b64encode(zlib.compress(raw, 9)).decode()}


def _patch(patch: Patch, side: int) -> dict[str, Any]:
    picture = Image.fromarray(outlined(patch.picture, patch.matched, side))
    return {
        "src": _uri("jpeg", _bytes(picture, "JPEG", quality=85)),
        "cosine": round(patch.cosine, 4),
        "label": patch.label,
        "name": patch.name,
    }


def _picture(picture: Image.Image) -> str:
    if picture.width * picture.height <= LOSSLESS_PIXELS:
        return _uri("png", _bytes(picture, "PNG"))
    return _uri("jpeg", _bytes(picture, "JPEG", quality=88))


def _bytes(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
