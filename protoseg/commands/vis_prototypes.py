"""`vis_prototypes`: a trained run → a folder of figures and the explorer page."""

import argparse
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from protoseg.commands.arguments import runs_and_overrides
from protoseg.config import Config, merge_into_trained
from protoseg.data.datasets import open_dataset
from protoseg.data.file_dataset import with_classes
from protoseg.evaluation.nearest_patches import FILE as PATCHES_FILE
from protoseg.evaluation.nearest_patches import save_patches
from protoseg.figures.page import FigureEntry, explorer_page
from protoseg.figures.pictures import outlined, save_figure
from protoseg.figures.prototype_figures import assignment_figure, cosine_figure, embedding_figure, project
from protoseg.figures.sample_figures import (
    comparison_figure,
    patches_figure,
    similarity_figure,
    which_prototype_figure,
)
from protoseg.figures.survey import (
    Pixels,
    Sample,
    Survey,
    read_samples,
    similarity_maps,
    spread_indices,
    survey,
)
from protoseg.figures.training_figures import health_figure
from protoseg.models.checkpoint import find_checkpoint, load_segmenter
from protoseg.models.segmenter import Segmenter, autocast
from protoseg.runtime import distributed
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import make_folder, write_text
from protoseg.training.log import read_metrics


def main(arguments: Sequence[str]) -> None:
    """Figures of a run's prototypes, and a page to explore them."""
    parser = argparse.ArgumentParser(
        prog="vis_prototypes", description="Figures of a run's prototypes, and a page to explore them."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_OR_CHECKPOINT", help="one, or another to set beside it: a linear run"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/prototypes")
    parser.add_argument("--split", default="train", help="where patches and numbers come from")
    parser.add_argument("--format", choices=("png", "pdf"), default="png")
    parser.add_argument("--images", type=int, default=400, metavar="N", help="images of the split to look at")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="validation images in the page")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as data.root=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    runs, overrides = runs_and_overrides(args.runs + args.overrides)
    if args.images < 1 or args.samples < 1:
        raise UserError("--images and --samples: expected 1 or more")
    write_gallery(
        runs,
        args.out,
        split=args.split,
        suffix=args.format,
        images=args.images,
        samples=args.samples,
        overrides=overrides,
    )


ROWS = 4  # samples in a figure
MOST_POINTS = 1500  # pixels in an embedding figure
MOST_CLASSES = 20  # classes in an embedding figure, and classes with a patches figure
MOST_MAPS = 6  # heat maps in a row
PATCH_SIDE = 144  # pixels


class Loaded(NamedTuple):
    """A trained run, ready to be looked at."""

    name: str
    folder: Path
    model: Segmenter
    config: Config
    step: int
    classes: list[str]
    palette: list[tuple[int, int, int]]


def write_gallery(
    runs: Sequence[Path],
    out: Path | None = None,
    *,
    split: str = "train",
    suffix: str = "png",
    images: int = 400,
    samples: int = 8,
    overrides: Sequence[str] = (),
) -> Path:
    """Look at `images` images of the split and `samples` of the validation split → the page's path.

    The first run must have prototypes; the second one, if any, is set beside it. Errors: UserError.
    """
    device = distributed.setup()
    loaded = [_load(run, overrides, device) for run in runs]
    first = loaded[0]
    head = first.model.prototypes
    if head is None:
        raise UserError(f"{runs[0]}: a linear classifier has no prototypes; give a prototype run first")
    if len({tuple(run.classes) for run in loaded}) > 1:
        raise UserError(f"{runs[1]}: trained on other classes than {runs[0]}; compare runs on the same data")
    seen, val = (
        with_classes(open_dataset(first.config, part), first.classes, first.palette)
        for part in (split, first.config.data.val_split)
    )
    out = out or first.folder / "prototypes"
    make_folder(out)
    print(f"{runs[0]}: looking at {min(images, len(seen))} images of {split}", flush=True)
    per_class = max(10, MOST_POINTS // min(len(first.classes), MOST_CLASSES))
    surveys, shown = [], []
    for run in loaded:
        with autocast(run.config, device):
            chosen = _with_bar(spread_indices(len(seen), images), run.name)
            surveys.append(survey(run.model, seen, chosen, per_class=per_class))
            shown.append(read_samples(run.model, val, spread_indices(len(val), samples)))
    deeds = surveys[0][0]
    assert deeds is not None, "a run with prototypes has a survey"

    protos_CKD = head.prototypes.detach().float().cpu().numpy()
    live_C = head.initialized.cpu().numpy()
    entries: list[FigureEntry] = []

    def add(name: str, title: str, caption: str, figure: Figure, in_page: bool = True) -> None:
        path = out / f"{name}.{suffix}"
        with rc_context({"pdf.fonttype": 42}):  # text stays text
            save_figure(figure, path)
        if in_page:
            buffer = io.BytesIO(path.read_bytes() if suffix == "png" else b"")
            if suffix != "png":
                figure.savefig(buffer, format="png")
            entries.append(FigureEntry(title, caption, buffer.getvalue()))

    _sample_figures(add, loaded, shown, protos_CKD, val.ignore_index, int(deeds.won_CK.sum(1).argmax()))
    _prototype_figures(add, loaded, surveys, deeds, protos_CKD, live_C)
    _patch_figures(add, first, deeds, live_C)
    page = explorer_page(
        title=f"Prototypes of {first.name}",
        about=f"{first.config.data.name}, {len(first.classes)} classes × {head.num_prototypes} prototypes,"
        f" step {first.step}{_score(first.folder)}. Patches and numbers from {min(images, len(seen))} images"
        f" of {split}; samples from {first.config.data.val_split}."
        + (f" Beside it: {loaded[1].name}." if len(loaded) > 1 else ""),
        classes=first.classes,
        palette=first.palette,
        protos_CKD=protos_CKD,
        live_C=live_C,
        survey=deeds,
        samples=shown[0],
        names=(first.name, loaded[1].name if len(loaded) > 1 else None),
        second=[sample.prediction for sample in shown[1]] if len(loaded) > 1 else (),
        figures=entries,
        score_name="cosine" if head.score_norm == "scale" else "normalised score",
    )
    write_text(out / "index.html", page)
    save_patches(
        out / Path(PATCHES_FILE).name,
        {
            number: [(p.name, p.cosine, outlined(p.picture, p.matched, PATCH_SIDE)) for p in patches]
            for number, patches in enumerate(deeds.patches)
        },
    )
    size = (out / "index.html").stat().st_size / 1e6
    print(f"{out}: figures and index.html ({size:.1f} MB); open it in a browser")
    return out / "index.html"


Add = Callable[..., None]


def _sample_figures(
    add: Add,
    loaded: Sequence[Loaded],
    shown: Sequence[Sequence[Sample]],
    protos_CKD: np.ndarray,
    ignore_index: int,
    commonest: int,
) -> None:
    """Figures of the sample images."""
    first, num_prototypes = loaded[0], protos_CKD.shape[1]
    fitting = [i for i, s in enumerate(shown[0]) if s.image.shape == shown[0][0].image.shape]
    rows_shown = [fitting[i] for i in spread_indices(len(fitting), ROWS)]
    same_size = [shown[0][i] for i in rows_shown]
    add(
        "which_prototype",
        "Which prototype",
        "Each prototype is its own shade of its class's colour, with its number in it.",
        which_prototype_figure(
            [(s.image, s.label, s.prediction, s.nearest) for s in same_size],
            first.classes,
            first.palette,
            num_prototypes,
        ),
    )
    rows = []
    tired = [commonest]  # classes not to show again while there are others: the background comes last
    for sample in same_size:
        c = _richest_class(sample, num_prototypes, tired)
        tired.append(c)
        cells_K = np.bincount(sample.nearest[sample.nearest // num_prototypes == c] % num_prototypes)
        busiest = np.argsort(-np.pad(cells_K, (0, num_prototypes - len(cells_K))), kind="stable")
        chosen = sorted(busiest[:MOST_MAPS].tolist())
        maps = similarity_maps(sample.emb_hwD, protos_CKD[c, chosen])
        rows.append((sample.image, f"class {first.classes[c]}", maps, chosen))
    add(
        "similarity",
        "Similarity maps",
        "Cosine of every pixel with the busiest prototypes of one class, that with most of them at work.",
        similarity_figure(rows),
    )
    if len(loaded) > 1:
        pairs = [(shown[0][i], shown[1][i]) for i in rows_shown]
        add(
            "comparison",
            "Two models",
            f"{loaded[0].name} and {loaded[1].name} on the same images, and where they differ.",
            comparison_figure(
                [(a.image, a.label, a.prediction, b.prediction) for a, b in pairs],
                (loaded[0].name, loaded[1].name),
                first.classes,
                first.palette,
                ignore_index,
            ),
        )


def _prototype_figures(
    add: Add,
    loaded: Sequence[Loaded],
    surveys: Sequence[tuple[Survey | None, Pixels]],
    deeds: Survey,
    protos_CKD: np.ndarray,
    live_C: np.ndarray,
) -> None:
    """Figures of the prototypes themselves."""
    first = loaded[0]
    often = set(np.argsort(-deeds.won_CK.sum(1), kind="stable")[:MOST_CLASSES].tolist())
    columns = []
    for run, (its_deeds, points) in zip(loaded, surveys):
        head = run.model.prototypes
        keep_N = np.isin(points.label_N, list(often))
        owner_M, share_M = np.zeros(0, np.int64), np.zeros(0)
        protos_MD = np.zeros((0, points.emb_ND.shape[1]), np.float32)
        if head is not None and its_deeds is not None:
            chosen = [c for c in sorted(often) if bool(head.initialized[c])]
            protos_MD = head.prototypes.detach().float().cpu().numpy()[chosen].reshape(-1, head.dim)
            owner_M = np.repeat(np.array(chosen), head.num_prototypes)
            share_M = its_deeds.share_CK[chosen].reshape(-1)
        label_N = points.label_N[keep_N]
        columns.append((run.name, project(points.emb_ND[keep_N], protos_MD), label_N, owner_M, share_M))
    add(
        "embedding",
        "Embedding space",
        "Class-balanced training pixels (dots) and prototypes (diamonds). t-SNE is of the pixels; a prototype"
        " stands among the five that are nearest to it.",
        embedding_figure(columns, first.classes, first.palette),
    )
    alive = np.flatnonzero(live_C)
    names = [first.classes[c] for c in alive]
    add(
        "cosines",
        "Prototypes among each other",
        "Cosines between all prototypes, in blocks of one class; their spread within and between classes.",
        cosine_figure(protos_CKD[alive], names),
    )
    add(
        "assignments",
        "Assignment",
        "How each class's training pixels are shared out among its prototypes.",
        assignment_figure(deeds.share_CK[alive], names, [first.palette[c] for c in alive]),
    )
    lines = read_metrics(first.folder)
    if sum("prototype_health" in line for line in lines) > 1:
        add(
            "health",
            "Health over training",
            "Line: mean over classes; band: from the smallest to the largest class value.",
            health_figure(lines),
        )


def _patch_figures(add: Add, run: Loaded, deeds: Survey, live_C: np.ndarray) -> None:
    """One figure per class; the explorer has all of them anyway."""
    num_prototypes = deeds.share_CK.shape[1]
    often = np.argsort(-deeds.won_CK.sum(1), kind="stable")[:MOST_CLASSES]
    for c in (c for c in often.tolist() if live_C[c]):
        rows = []
        for k in np.lexsort((-deeds.share_CK[c], deeds.won_CK[c] == 0)).tolist():  # idle ones last
            share, precision, cosine = (
                table[c, k] for table in (deeds.share_CK, deeds.precision_CK, deeds.cosine_CK)
            )
            caption = f"prototype {k + 1}\nshare {share:.0%}\nprecision {precision:.0%}\ncosine {cosine:.2f}"
            patches = [
                (
                    outlined(patch.picture, patch.matched, PATCH_SIDE),
                    f"{patch.cosine:.2f}" + (f"  is {run.classes[patch.label]}" if patch.label != c else ""),
                )
                for patch in deeds.patches[c * num_prototypes + k]
            ]
            if not patches:
                caption = f"prototype {k + 1}: wins no pixel of the images looked at"
            rows.append((caption.replace("nan%", "–").replace("nan", "–"), patches))
        name = "".join(letter if letter.isalnum() else "_" for letter in run.classes[c])
        title = f"class {run.classes[c]}: nearest training pixels, one per image"
        add(f"patches_{c:03d}_{name}", title, "", patches_figure(title, rows), in_page=False)


def _with_bar(indices: Sequence[int], name: str) -> Iterable[int]:
    """The indices, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(indices, name, console=console, disable=not console.is_terminal)


def _richest_class(sample: Sample, num_prototypes: int, tired: Sequence[int]) -> int:
    """The class with the most prototypes at work in an image (3 cells and more), one not in `tired` first."""
    numbers, counts = np.unique(sample.nearest, return_counts=True)
    cells = np.bincount(numbers // num_prototypes, counts)
    working = np.bincount(numbers // num_prototypes, counts >= 3, minlength=len(cells))
    present = np.flatnonzero(cells).tolist()
    return max(present, key=lambda c: (c not in tired, working[c], cells[c]))


def _score(folder: Path) -> str:
    evaluations = [line for line in read_metrics(folder) if line["kind"] == "eval"]
    return f", mIoU {100 * evaluations[-1]['mIoU']:.1f} %" if evaluations else ""


def _load(path: Path, overrides: Sequence[str], device: torch.device) -> Loaded:
    model, config, content = load_segmenter(path)
    config = merge_into_trained(config, overrides)
    folder = find_checkpoint(path).parent
    name = folder.resolve().name
    if name.startswith("seed"):  # a run of a sweep, whose row is called like the folder above
        name = f"{folder.resolve().parent.name}, {name}"
    palette = [(int(r), int(g), int(b)) for r, g, b in content["palette"]]
    return Loaded(name, folder, model.to(device), config, content["step"], content["classes"], palette)
