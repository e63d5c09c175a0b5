"""`vis_prototypes`: a trained run → a folder of figures and the explorer page."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from protoseg.commands.arguments import runs_and_overrides
from protoseg.commands.parser import parser_of
from protoseg.config import Config, merge_into_trained
from protoseg.data.datasets import model_tree, open_dataset
from protoseg.data.file_dataset import Dataset, with_classes
from protoseg.data.tree import LabelTree
from protoseg.evaluation.nearest_patches import FILE as PATCHES_FILE
from protoseg.evaluation.nearest_patches import save_patches
from protoseg.figures.page import FigureEntry, explorer_page
from protoseg.figures.pictures import outlined, png_of, save_figure
from protoseg.figures.prototype_figures import (
    assignment_figure,
    cosine_figure,
    distance_figure,
    embedding_figure,
    project,
    prototypes_in_use,
    tree_figure,
)
from protoseg.figures.sample_figures import (
    comparison_figure,
    patch_rows,
    patches_figure,
    similarity_figure,
    which_prototype_figure,
)
from protoseg.figures.survey import (
    Pixels,
    Sample,
    Survey,
    prior_in_cosines,
    read_samples,
    richest_class,
    similarity_maps,
    spread_indices,
    survey,
)
from protoseg.figures.training_figures import health_figure
from protoseg.models.checkpoint import find_checkpoint, load_segmenter
from protoseg.models.segmenter import Segmenter, autocast
from protoseg.runtime import distributed
from protoseg.runtime.console import with_bar
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import make_folder, safe_name, write_text
from protoseg.training.log import read_metrics


def main(arguments: Sequence[str]) -> None:
    """Figures of a run's prototypes, and a page to explore them."""
    parser = parser_of("vis_prototypes", "Figures of a run's prototypes, and a page to explore them.")
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
    write_gallery(runs, overrides, args)


ROWS = 4  # samples in a figure
MOST_POINTS = 1500  # pixels in an embedding figure
MOST_IN_FIGURES = 20  # classes in an embedding figure, and classes with a patches figure
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
    tree: LabelTree | None


class Seen(NamedTuple):
    """What a run makes of the images: its prototypes' deeds (none if it is linear), pixels, samples."""

    deeds: Survey | None
    pixels: Pixels
    samples: list[Sample]


class FolderFigure(NamedTuple):
    """A figure of the folder; in the page too if it has a caption."""

    name: str
    figure: Figure
    title: str = ""
    caption: str = ""


def write_gallery(runs: Sequence[Path], overrides: Sequence[str], args: argparse.Namespace) -> None:
    """Look at images of the split and of the validation split; write figures and page.

    The first run must have prototypes; the second one, if any, is set beside it. Errors: UserError.
    """
    split, suffix = args.split, args.format
    device = distributed.setup()
    loaded = [_load(run, overrides, device) for run in runs]
    first = loaded[0]
    head = first.model.require_prototypes(f"the first run: {runs[0]}")
    if len({tuple(run.classes) for run in loaded}) > 1:
        raise UserError(f"{runs[1]}: trained on other classes than {runs[0]}; compare runs on the same data")
    surveyed, val = (
        with_classes(open_dataset(first.config, part), first.classes, first.palette)
        for part in (split, first.config.data.val_split)
    )
    out = args.out or first.folder / "prototypes"
    make_folder(out)
    images = min(args.images, len(surveyed))
    print(f"{runs[0]}: looking at {images} images of {split}", flush=True)
    seen = [_look(run, surveyed, images, val, args.samples) for run in loaded]
    deeds = seen[0].deeds
    if deeds is None or not deeds.won_CK.any():
        raise UserError(f"{split}: no labelled pixel in {images} images; choose another --split")
    protos_CKD = head.prototypes.detach().float().cpu().numpy()
    live_C = head.initialized.cpu().numpy()
    entries: list[FigureEntry] = []
    for drawn in itertools.chain(
        _sample_figures(loaded, seen, deeds, protos_CKD),
        _prototype_figures(loaded, seen, deeds, protos_CKD, live_C),
        _patch_figures(first, deeds, live_C),
    ):
        path = out / f"{drawn.name}.{suffix}"
        save_figure(drawn.figure, path)
        if drawn.caption:
            png = path.read_bytes() if suffix == "png" else png_of(drawn.figure)
            entries.append(FigureEntry(drawn.title, drawn.caption, png))
    other = loaded[1].name if len(loaded) > 1 else None
    page = explorer_page(
        title=f"Prototypes of {first.name}",
        about=f"{first.config.data.name}, {len(first.classes)} classes × {head.num_prototypes} prototypes,"
        f" step {first.step}{_score(first.folder)}. Patches and numbers from {images} images"
        f" of {split}; samples from {first.config.data.val_split}."
        + (f" Beside it: {other}." if other else ""),
        classes=first.classes,
        palette=first.palette,
        protos_CKD=protos_CKD,
        live_C=live_C,
        survey=deeds,
        samples=seen[0].samples,
        names=(first.name, other),
        second=[sample.prediction for sample in seen[1].samples] if other else (),
        figures=entries,
        score_name="cosine" if head.settings.score_norm == "scale" else "normalised score",
        prior_C=prior_in_cosines(head),
        tree=first.tree,
    )
    write_text(out / "index.html", page)
    save_patches(
        out / Path(PATCHES_FILE).name,
        {
            number: [(p.name, p.cosine, outlined(p.picture, p.matched, PATCH_SIDE)) for p in patches]
            for number, patches in enumerate(deeds.patches)
        },
    )
    in_use_C = prototypes_in_use(deeds.share_CK)
    in_use_C = np.where(live_C & (in_use_C > 0), in_use_C, np.nan)  # 0: in none of the images looked at
    fewest = int(np.nanargmin(in_use_C))
    print(
        f"in use: {np.nanmean(in_use_C):.1f} of {head.num_prototypes} prototypes per class;"
        f" fewest: {first.classes[fewest]}, {in_use_C[fewest]:.1f}"
    )
    size = (out / "index.html").stat().st_size / 1e6
    print(f"{out}: figures and index.html ({size:.1f} MB); open it in a browser")


def _look(run: Loaded, surveyed: Dataset, images: int, val: Dataset, samples: int) -> Seen:
    per_class = max(10, MOST_POINTS // min(len(run.classes), MOST_IN_FIGURES))
    with autocast(run.config, run.model.mean.device):
        chosen = with_bar(spread_indices(len(surveyed), images), run.name, images)
        deeds, pixels = survey(run.model, surveyed, chosen, per_class=per_class)
        return Seen(deeds, pixels, read_samples(run.model, val, spread_indices(len(val), samples)))


def _sample_figures(
    loaded: Sequence[Loaded], seen: Sequence[Seen], deeds: Survey, protos_CKD: np.ndarray
) -> Iterator[FolderFigure]:
    """Figures of the sample images, those of the first one's size."""
    first, num_prototypes = loaded[0], protos_CKD.shape[1]
    samples = seen[0].samples
    fitting = [i for i, sample in enumerate(samples) if sample.image.shape == samples[0].image.shape]
    places = [fitting[i] for i in spread_indices(len(fitting), ROWS)]
    same_size = [samples[i] for i in places]
    maps = [(s.image, s.label, s.prediction, s.nearest) for s in same_size]
    yield FolderFigure(
        "which_prototype",
        which_prototype_figure(maps, first.classes, first.palette, num_prototypes, first.tree),
        "Which prototype",
        "Each prototype is its own shade of its class's colour, with its number in it.",
    )
    rows = []
    # Classes not to show again while there are others: the background, the commonest, comes last.
    tired = [int(deeds.won_CK.sum(1).argmax())]
    for sample in same_size:
        c = richest_class(sample, num_prototypes, tired)
        tired.append(c)
        cells_K = np.bincount(sample.nearest[sample.nearest // num_prototypes == c] % num_prototypes)
        busiest = np.argsort(-np.pad(cells_K, (0, num_prototypes - len(cells_K))), kind="stable")
        chosen = sorted(busiest[:MOST_MAPS].tolist())
        cosines = similarity_maps(sample.emb_hwD, protos_CKD[c, chosen])
        rows.append((sample.image, f"class {first.classes[c]}", cosines, chosen))
    yield FolderFigure(
        "similarity",
        similarity_figure(rows),
        "Similarity maps",
        "Cosine of every pixel with the busiest prototypes of one class, that with most of them at work.",
    )
    if len(loaded) > 1:
        names, pairs = (first.name, loaded[1].name), zip(same_size, (seen[1].samples[i] for i in places))
        compared = [(a.image, a.label, a.prediction, b.prediction) for a, b in pairs]
        yield FolderFigure(
            "comparison",
            comparison_figure(compared, names, first.classes, first.palette),
            "Two models",
            f"{names[0]} and {names[1]} on the same images, and where they differ.",
        )


def _prototype_figures(
    loaded: Sequence[Loaded],
    seen: Sequence[Seen],
    deeds: Survey,
    protos_CKD: np.ndarray,
    live_C: np.ndarray,
) -> Iterator[FolderFigure]:
    """Figures of the prototypes themselves."""
    first = loaded[0]
    often = set(np.argsort(-deeds.won_CK.sum(1), kind="stable")[:MOST_IN_FIGURES].tolist())
    columns = []
    for run, (its_deeds, points, _) in zip(loaded, seen):
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
    yield FolderFigure(
        "embedding",
        embedding_figure(columns, first.classes, first.palette),
        "Embedding space",
        "Class-balanced training pixels (dots) and prototypes (diamonds). t-SNE is of the pixels; a prototype"
        " stands among the five that are nearest to it.",
    )
    alive = np.flatnonzero(live_C)
    pixels = seen[0].pixels
    if len(alive) > 1 and live_C[pixels.label_N].any():
        yield FolderFigure(
            "distance",
            distance_figure(pixels.emb_ND, pixels.label_N, protos_CKD, live_C, first.classes, first.palette),
            "Signed distance",
            "Class-balanced training pixels. Below the diagonal, and right of zero, the nearest prototype is"
            " one of the pixel's own class.",
        )
    if first.tree is not None:
        yield FolderFigure(
            "tree",
            tree_figure(first.tree, first.palette, deeds),
            "Label tree",
            "A node's prototypes are those of its classes: of each the nearest training pixel and its share.",
        )
    names = [first.classes[c] for c in alive]
    yield FolderFigure(
        "cosines",
        cosine_figure(protos_CKD[alive], names),
        "Prototypes among each other",
        "Cosines between all prototypes, in blocks of one class; their spread within and between classes.",
    )
    yield FolderFigure(
        "assignments",
        assignment_figure(deeds.share_CK[alive], names, [first.palette[c] for c in alive]),
        "Assignment",
        "How each class's training pixels are shared out among its prototypes.",
    )
    lines = read_metrics(first.folder)
    if sum("prototype_health" in line for line in lines) > 1:
        yield FolderFigure(
            "health",
            health_figure(lines),
            "Health over training",
            "Line: mean over classes; band: from the smallest to the largest class value.",
        )


def _patch_figures(run: Loaded, deeds: Survey, live_C: np.ndarray) -> Iterator[FolderFigure]:
    """One figure per class, not in the page: the explorer has all of them anyway."""
    num_prototypes = deeds.share_CK.shape[1]
    often = np.argsort(-deeds.won_CK.sum(1), kind="stable")[:MOST_IN_FIGURES]
    in_use_C = prototypes_in_use(deeds.share_CK)
    for c in (c for c in often.tolist() if live_C[c]):
        name = "".join(letter if letter.isalnum() else "_" for letter in run.classes[c])
        in_use = f"{in_use_C[c]:.1f} of {num_prototypes} prototypes in use"
        title = f"class {run.classes[c]}: {in_use}; nearest training pixels, one per image"
        yield FolderFigure(
            safe_name(f"patches_{c:03d}_{name}"),
            patches_figure(title, patch_rows(deeds, c, run.classes, PATCH_SIDE)),
        )


def _score(folder: Path) -> str:
    scores = [line["mIoU"] for line in read_metrics(folder) if line["kind"] == "eval"]
    return "" if not scores or scores[-1] is None else f", mIoU {100 * scores[-1]:.1f} %"


def _load(path: Path, overrides: Sequence[str], device: torch.device) -> Loaded:
    model, config, content = load_segmenter(path)
    config = merge_into_trained(config, overrides)
    folder = find_checkpoint(path).parent
    name = folder.resolve().name
    if name.startswith("seed"):  # a run of a sweep, whose row is called like the folder above
        name = f"{folder.resolve().parent.name}, {name}"
    palette = [(int(r), int(g), int(b)) for r, g, b in content["palette"]]
    classes = content["classes"]
    tree = model_tree(config.data, classes)
    return Loaded(name, folder, model.to(device), config, content["step"], classes, palette, tree)
