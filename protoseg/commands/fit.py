"""`fit`: prototypes on a frozen backbone's features of labelled images, without a gradient."""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
import yaml

from protoseg.commands.parser import parser_of
from protoseg.config import Config, load_config, to_plain
from protoseg.data.datasets import data_tree, measured, open_dataset
from protoseg.data.loader import EvalLoader
from protoseg.evaluation.inference import InferenceSettings
from protoseg.evaluation.prototype_use import embeddings, prototype_use
from protoseg.evaluation.scores import evaluate_segmenter
from protoseg.evaluation.tables import print_scores
from protoseg.models.build import build_model
from protoseg.models.checkpoint import save_segmenter
from protoseg.runtime import distributed
from protoseg.runtime.console import clock
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import write_json, write_text
from protoseg.training.log import run_facts
from protoseg.training.placement import place_prototypes_, shrinkage_for
from protoseg.weights.foreign_backbone import load_backbone_weights


def fit(config: Config, out: Path, images: int | None = None) -> dict[str, object]:
    """Place prototypes as configured and write a run into the folder `out`; returns what results.json holds.

    images: how many of the training images are labelled, drawn by train.seed; None: all. Errors: UserError.
    """
    if (config.decode_head.name, config.classifier) != ("whiten", "prototypes"):
        raise UserError(
            f"decode_head.name {config.decode_head.name} with classifier {config.classifier} has to be"
            " trained; fit needs decode_head.name: whiten and classifier: prototypes"
        )
    if config.data.cache_features:
        raise UserError("data.cache_features: fit goes through the images once; leave it out")
    if (out / "last.pt").exists():
        raise UserError(f"{out}: this folder already holds a run; choose another by --out")
    config = measured(config)
    train_set, val_set = (
        open_dataset(config, split) for split in (config.data.train_split, config.data.val_split)
    )
    if images is not None and not 1 <= images <= len(train_set):
        raise UserError(
            f"--images: {images} is not possible, there are {len(train_set)}; give 1 to that many"
        )
    device = distributed.setup()
    torch.manual_seed(config.train.seed)
    model = build_model(config, len(train_set.classes)).to(device).eval()
    report = load_backbone_weights(model.backbone, config.backbone.name, config.backbone.weights)
    if report and distributed.is_main():
        print(report)
    generator = torch.Generator().manual_seed(config.train.seed)
    indices = torch.randperm(len(train_set), generator=generator)[:images].tolist()
    started = time.perf_counter()
    place_prototypes_(model, train_set, indices, shrinkage_for(len(indices)), config.train.seed, device)
    seconds = time.perf_counter() - started
    if distributed.is_main():  # every rank places the same; they share out the evaluation
        save_segmenter(out / "last.pt", model, config, train_set.classes, train_set.palette)
        write_text(out / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    scores = evaluate_segmenter(
        model,
        config,
        val_set,
        device,
        InferenceSettings(config.eval.window),
        title=config.data.val_split,
        tree=data_tree(config.data, train_set.classes),
    )
    head = model.require_prototypes("fit: this model")
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    with closing(EvalLoader(val_set, workers=config.data.workers, **ranks)) as loader:
        use = prototype_use(head, embeddings(model, config, loader, device))
    results = {
        **scores.to_plain(),
        "images": len(indices),
        "seconds": round(seconds, 1),
        "prototype_health": head.health().to_plain() | use,
        **run_facts(model, config, device),
    }
    if distributed.is_main():
        write_json(out / "results.json", results)
        print_scores(scores, f"{config.data.val_split}, from {len(indices)} labelled images")
        print(f"placed in {clock(seconds)}; scores in {out / 'results.json'}")
    return results


def main(arguments: Sequence[str]) -> None:
    """Put prototypes on frozen features, without training."""
    parser = parser_of(
        "fit", "Put prototypes on a frozen backbone's features of labelled images, as configured."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="with decode_head.name: whiten")
    parser.add_argument(
        "--images", type=int, metavar="N", help="labelled images, drawn at random (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/<config name>, with _images<N>)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args(arguments)
    name = args.config.stem + (f"_images{args.images}" if args.images else "")
    fit(load_config(args.config, args.overrides), args.out or Path("runs") / name, args.images)
