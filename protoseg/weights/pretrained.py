"""Models as folders to share (model.safetensors, config.json, a model card), and folders from the hub."""

import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from protoseg.models.checkpoint import ABOUT_FILE, WEIGHTS_FILE
from protoseg.runtime.distributed import is_main
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import make_folder, whole_file, write_json, write_text

CARD_FILE = "README.md"
PICTURES = 4  # in a model card
# Weights in the safe format where a model has them, else in the other.
SAFE = ("model*.safetensors", f"{WEIGHTS_FILE}.index.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def save_model_folder(folder: Path, content: dict[str, Any], run: Path | None = None) -> None:
    """Write a model (`segmenter_content`) as a folder that `load_segmenter` reads, with a card of its run.

    run: the folder with results.json and samples, if there is one. Errors: UserError if it cannot be written.
    """
    make_folder(folder)
    # Contiguous copies: safetensors takes no views of one memory.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in content["model"].items()}
    with whole_file(folder / WEIGHTS_FILE) as part:
        safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    about = {name: content[name] for name in ("config", "classes", "palette", "step")}
    write_json(folder / ABOUT_FILE, {"library_name": "protoseg", "version": version("protoseg"), **about})
    samples = (run / "samples").glob("*_*.png") if run else ()  # NAME_STEP.png
    pictures = sorted(samples, key=lambda path: path.stem.rsplit("_")[-1], reverse=True)[:PICTURES]
    for picture in pictures:
        make_folder(folder / "samples")
        shutil.copyfile(picture, folder / "samples" / picture.name)
    results = None
    if run is not None and (run / "results.json").is_file():
        results = json.loads((run / "results.json").read_text())
    write_text(folder / CARD_FILE, model_card(content, results, [picture.name for picture in pictures]))


def model_card(content: dict[str, Any], results: dict[str, Any] | None, pictures: Sequence[str] = ()) -> str:
    """A model card in the hub's form, from the model and what its run measured."""
    config, classes = content["config"], content["classes"]
    d, backbone = config["data"], config["backbone"]
    front = {
        "library_name": "protoseg",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", config["classifier"]],
    }
    classifier = (
        f"{config['prototypes']['num_per_class']} prototypes per class"
        if config["classifier"] == "prototypes"
        else f"a {config['classifier']} classifier"
    )
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {backbone['name']} with {classifier}, {len(classes)} classes\n",
        f"Semantic segmentation; {content['step']} steps on `{d['name']}` ({d['train_split']}).\n",
        "```python\nimport protoseg\n\nprotoseg.load(FOLDER_OR_NAME).predict(IMAGE).overlay()\n```\n",
        "## Scores\n",
    ]
    if results is None:
        lines.append("Not measured: no `results.json` came with the model.\n")
    else:
        scores = {"mIoU": results["mIoU"], **results["IoU"]}
        edited = "" if list(results["IoU"]) == list(classes) else " Classes have been edited since."
        lines += [
            f"`{d['name']}` ({d['val_split']}), as the run measured.{edited}\n",
            "| class | IoU % |\n|---|---|",
            *(f"| {name} | {'–' if x is None else f'{100 * x:.1f}'} |" for name, x in scores.items()),
            "",
        ]
    lines += [f"![{name}](samples/{name})\n" for name in pictures]
    lines += [
        "## Weights that training started from\n",
        _origin(backbone["weights"], backbone["name"]),
        "\n## Recipe\n",
        f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```",
    ]
    return "\n".join(lines) + "\n"


def _origin(weights: str, backbone: str) -> str:
    if weights == "none":
        return "None: the backbone started at random."
    licence = (
        "If they are NVIDIA's for the Mix Transformer, they are for research and evaluation only."
        if backbone.startswith("mit_")
        else "Their publisher's licence holds for this model too."
    )
    return f"`{weights}` for `{backbone}`. {licence}"


def download(name: str) -> Path:
    """A model's weights, config and card from the hub, kept in the hub's cache → their folder.

    Prints the licence that the card names. Errors: UserError saying what was looked for.
    """
    try:
        folder = Path(snapshot_download(name, allow_patterns=[ABOUT_FILE, CARD_FILE, *SAFE]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[ABOUT_FILE, CARD_FILE, *PICKLED]))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"{name}: looked for {SAFE[0]} or {PICKLED[0]} of the model huggingface.co/{name}: {reason};"
            " check the name and the connection, or log in with `hf auth login`"
        ) from None
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise UserError(f"{name}: the hub has no {SAFE[0]} and no {PICKLED[0]} there; choose another model")
    card = folder / CARD_FILE
    about = ModelCard(card.read_text(), ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    licence = about.get("license_name") or about.get("license")
    if is_main():
        print(f"{name}: licence {licence or 'not named in its card'}", file=sys.stderr)
    return folder
