"""Checkpoints: tensors and plain data only, written whole or not at all, read without executing anything."""

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from protoseg.config import Config, stored_config, to_plain
from protoseg.models.build import build_model
from protoseg.models.segmenter import Segmenter, for_bytes
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import whole_file

# A model to share is a folder of these two.
WEIGHTS_FILE = "model.safetensors"
ABOUT_FILE = "config.json"
# Buffers of a prototype head that older checkpoints have and this version has not, and the other way round:
# counters of what happened in training, of no account without the setting that reads them.
LEFT = ("classifier.idle",)
CAME = ("classifier.pixel_counts", "classifier.agreeing")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write to the disk itself: not even a power cut leaves half a file. Errors: see `whole_file`."""
    with whole_file(path) as part, open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def segmenter_content(
    model: Segmenter,
    config: Config,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    step: int = 0,
) -> dict[str, Any]:
    """What prediction needs: the model, its configuration and its class list.

    `config` is that of the training, also if the model has been edited since: its data section says for how
    many classes the decode head was made. K is taken from the model. Errors: ValueError if names or colours
    are not one per class, or two names are equal.
    """
    head = model.prototypes
    if head is not None:
        if not len(classes) == len(palette) == head.num_classes:
            raise ValueError(
                f"a model of {head.num_classes} classes needs as many names and colours,"
                f" got {len(classes)} and {len(palette)}"
            )
        prototypes = replace(config.prototypes, num_per_class=head.num_prototypes)
        config = config.model_copy(update={"prototypes": prototypes})
    if len(set(classes)) < len(classes):
        raise ValueError(f"class names must differ, got {', '.join(classes)}")
    return {
        "config": to_plain(config),
        "classes": list(classes),
        "palette": [list(colour) for colour in palette],
        "step": step,
        "model": model.state_dict(),
    }


def save_segmenter(
    path: Path,
    model: Segmenter,
    config: Config,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    step: int = 0,
) -> None:
    """Write a model, edited or not, as `load_segmenter` and the commands read it; see `segmenter_content`."""
    save_checkpoint(path, segmenter_content(model, config, classes, palette, step))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint written by the trainer, or the model.safetensors of a saved folder.

    Errors: UserError if the file is missing, truncated, unsafe, or not one of ours.
    """
    try:
        if path.name == WEIGHTS_FILE:
            about = json.loads((path.parent / ABOUT_FILE).read_text())
            content = {**about, "model": safetensors.torch.load_file(path)}
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: no such checkpoint; check the path") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not a safe checkpoint (it is damaged or holds more than tensors and plain data);"
            " use one that protoseg wrote"
        ) from None
    except Exception:  # damaged bytes can end in any error of the unpickler
        raise UserError(
            f"{path}: the checkpoint is truncated or damaged; use another one, such as best.pt or last.pt"
        ) from None
    if not isinstance(content, dict) or not {"config", "model", "classes"} <= content.keys():
        raise UserError(f"{path}: not a protoseg checkpoint (no config, model and classes in it)")
    # Until models brought their own, all got ImageNet's.
    for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        content["model"].setdefault(name, for_bytes(values))
    return content


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict that must fit exactly.

    Errors: UserError naming the first tensor that is missing, left over, or of another shape.
    """
    own = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.endswith(LEFT)}
    state = {name: tensor for name, tensor in own.items() if name.endswith(CAME)} | state
    problems = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    problems += [f"{name} is missing in the file" for name in own if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in own]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{path}: checkpoint of another architecture: {problems[0]}{more};"
            " use the config that the checkpoint was trained with"
        )
    model.load_state_dict(state)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a file or folder stands for: a run's last.pt, a saved model's model.safetensors."""
    if not path.is_dir():
        return path
    for name in ("last.pt", WEIGHTS_FILE):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{path}: neither last.pt nor {WEIGHTS_FILE} in this folder; give a run folder, a saved model, or a"
        " checkpoint file"
    )


def load_segmenter(path: Path) -> tuple[Segmenter, Config, dict[str, Any]]:
    """A trained model in eval mode, its configuration, and the checkpoint's content, from a run or a file."""
    path = find_checkpoint(path)
    content = load_checkpoint(path)
    config = stored_config(content["config"], f"{path} (its config)")
    backbone = config.backbone.model_copy(update={"weights": "none"})  # they come from the checkpoint
    model = build_model(config.model_copy(update={"backbone": backbone}))
    if model.prototypes is not None and model.prototypes.num_classes != len(content["classes"]):
        model.prototypes.resize_(len(content["classes"]))  # edited after training
    load_weights(model, content["model"], path)
    return model.eval(), config, content
