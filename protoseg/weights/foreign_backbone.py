"""Backbone weights made by other programs: timm, torchvision, Hugging Face, mmsegmentation, the originals.

A file is read (weight_files.py), its names are translated (weight_names.py), and each tensor is
accounted for: loaded, missing in the file, or left over with a reason. A wrong shape is an error.
"""

import functools
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from protoseg.models.backbones import Backbone, ResNet
from protoseg.models.hrnet import HRNet
from protoseg.models.mit import MixTransformer
from protoseg.models.swin import SWINS, Swin
from protoseg.models.timm_features import TimmFeatures
from protoseg.runtime.distributed import is_main
from protoseg.runtime.errors import UserError
from protoseg.weights.foreign_files import read_state, shorten
from protoseg.weights.names import (
    HRNET_FORMATS,
    MIT_FORMATS,
    RESNET_FORMATS,
    SWIN_FORMATS,
    Format,
    join,
    reason,
    translate,
)

FORMATS: dict[type, tuple[Format, ...]] = {
    MixTransformer: MIT_FORMATS,
    ResNet: RESNET_FORMATS,
    HRNet: HRNET_FORMATS,
    Swin: SWIN_FORMATS,
}
# What may stand before a backbone's names, the part of a segmenter or of a wrapper.
PREFIXES = ("", "backbone.", "segformer.", "resnet.", "swin.", "model.", "encoder.")
NVIDIA = (
    "licence: the Mix Transformer weights that NVIDIA published are for research and evaluation only, "
    "not for commercial use"
)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NO_PLACE = "does not exist in this model"
Pieces = dict[str, list[tuple[str, Tensor]]]  # our name → what the file has for it


@dataclass
class Report:
    """What one import did; `str` gives it as lines to print."""

    path: str
    program: str
    matched: list[str] = field(default_factory=list)  # our names
    missing: list[str] = field(default_factory=list)  # our names: they keep the values they had
    unexpected: dict[str, str] = field(default_factory=dict)  # name in the file → why it was not used
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.program}): {len(self.matched)} tensors loaded"]
        if self.missing:
            lines.append(f"not in the file, left as they were ({len(self.missing)}): {shorten(self.missing)}")
        for why in sorted(set(self.unexpected.values())):
            names = [name for name, w in self.unexpected.items() if w == why]
            lines.append(f"not used, {why} ({len(names)}): {shorten(names)}")
        return "\n".join(lines + self.notes)


def load_backbone_weights(backbone: Backbone, name: str, weights: str) -> Report | None:
    """Load `weights` into a backbone built as `name`; in place, None for `none`.

    weights: `none`; `timm` for timm's own pretrained ones (downloaded or cached); or the path of a .pth or
    .safetensors file or of a Hugging Face folder, holding the backbone alone or a whole segmenter.
    Errors: UserError where there is nothing to load, a tensor has another shape, or a file cannot be read.
    """
    if weights == "none":
        return None
    if isinstance(backbone.net, TimmFeatures):
        return load_timm_features(backbone.net, name, weights)
    state = timm_state(backbone, name) if weights == "timm" else read_state(Path(weights))
    pieces, program = best(backbone, name, state, "")
    report = fit(backbone, pieces, state, weights, program)
    report.notes += norm_epsilon(backbone, program)
    return report


def norm_epsilon(backbone: Backbone, program: str) -> list[str]:
    """Set what a file of MiT weights does not say but means, and print its licence."""
    if not isinstance(backbone.net, MixTransformer) or program == "protoseg":
        return []
    eps = next(f.norm_eps for f in MIT_FORMATS if f.program == program)
    assert eps is not None
    backbone.net.set_norm_eps(*eps)
    print_licence()
    return [f"LayerNorm epsilon set to {eps[0]:g} in embeddings and reductions, {eps[1]:g} elsewhere"]


@functools.cache  # once per process
def print_licence() -> None:
    if is_main():
        print(NVIDIA, file=sys.stderr)


def best(backbone: Backbone, name: str, state: Mapping[str, Tensor], ours: str) -> tuple[Pieces, str]:
    """The translation, over programs and prefixes, that knows most of the backbone; `ours` goes in front."""
    known = backbone.state_dict().keys()
    options: list[tuple[Pieces, str]] = []
    for prefix in PREFIXES:
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        source = {key: prefix + key for key in part}
        options.append(
            ({key: [(prefix + key, value)] for key, value in part.items() if key in known}, "protoseg")
        )
        for form in FORMATS.get(type(backbone.net), ()):
            found = translate(form.rules, part)
            found = {key: [(source[s], t) for s, t in pieces] for key, pieces in found.items()}
            options.append((found, form.program))
    pieces, program = max(options, key=lambda option: len(option[0].keys() & known))
    if not pieces.keys() & known:
        raise UserError(
            f"none of the {len(state)} tensors (such as {shorten(list(state), 3)}) belongs to {name}: "
            "check backbone.name and backbone.weights"
        )
    return {ours + key: value for key, value in pieces.items()}, program


def fit(module: nn.Module, pieces: Pieces, state: Mapping[str, Tensor], path: str, program: str) -> Report:
    """Copy what belongs to `module` into it and account for every tensor on both sides."""
    target = module.state_dict()
    report = Report(path, program)
    used: dict[str, str] = {}
    loaded = {}
    for name, parts in pieces.items():
        if name not in target:
            used |= {source: f"{name} {NO_PLACE}" for source, _ in parts}
            continue
        tensor, sources = join(parts), " + ".join(source for source, _ in parts)
        if tensor.ndim == target[name].ndim + 2 and tensor.shape[-2:] == (1, 1):
            tensor = tensor.flatten(-3)  # a linear layer stored as a 1×1 convolution
        if tensor.shape != target[name].shape:
            raise UserError(
                f"{path}: {sources} has shape {tuple(tensor.shape)}, "
                f"{name} needs {tuple(target[name].shape)}: "
                "the file is of another architecture, size or number of classes"
            )
        loaded[name] = tensor
        used |= {source: "" for source, _ in parts}
    module.load_state_dict(loaded, strict=False)
    report.matched = list(loaded)
    # num_batches_tracked is read by nobody here, and old files do not have it.
    skip = ("num_batches_tracked", "_extra_state")
    report.missing = [key for key in target if key not in loaded and not key.endswith(skip)]
    report.unexpected = {key: used.get(key) or reason(key) for key in state if used.get(key) != ""}
    return report


def timm_state(backbone: Backbone, name: str) -> dict[str, Tensor]:
    """timm's pretrained classification network of the same name."""
    if isinstance(backbone.net, MixTransformer):
        raise UserError(f"backbone.weights timm: timm has no {name}; give the path of a file")
    return timm_pretrained(SWINS.get(name, name), {}).state_dict()


def timm_pretrained(name: str, options: dict[str, Any], path: str = "timm") -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **options)
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, AssertionError) as error:
        lines = [line.strip() for line in str(error).strip().split("\n")]
        if path == "timm":
            raise UserError(
                f"backbone.weights: timm cannot give weights for {name} ({lines[0]}); give a path"
            ) from error
        # What a network's translation of foreign names stumbles over can be of any kind.
        said = next((line for line in lines if "mismatch" in line), f"{type(error).__name__} {lines[0]}")
        raise UserError(f"{path} does not fit {name} ({said}): it is of another architecture") from error


def load_timm_features(net: TimmFeatures, name: str, weights: str) -> Report:
    """timm's own loader, which knows each network's foreign formats; what it left out, from its log."""
    name = name.removeprefix("timm:")
    state = {} if weights == "timm" else read_state(Path(weights))
    options: dict[str, Any] = dict(net.options)
    if state:
        options["pretrained_cfg_overlay"] = {"state_dict": state}
    said = Collector(logging.INFO)
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        loaded: Any = timm_pretrained(name, options, weights)
    finally:
        logger.removeHandler(said)
        logger.setLevel(level)
    report = Report(weights, "timm")
    ours = {plain(key): key for key in net.net.state_dict()}
    missing = {plain(key) for key in said.names("Missing")}
    for bare, key in ours.items():
        (report.missing if bare in missing else report.matched).append(key)
    if not report.matched:
        raise UserError(f"none of the {len(state)} tensors of {weights} belongs to {name}: check both")
    theirs = {plain(key): key for key in state}
    unused = said.names("Unexpected")
    if len(ours.keys() & theirs.keys()) > len(ours) / 2:  # the file has timm's names
        unused += [key for bare, key in theirs.items() if bare not in ours]
    report.unexpected = {key: reason(key) for key in unused}
    net.net.load_state_dict(loaded.state_dict())
    config = loaded.pretrained_cfg
    if (tuple(config["mean"]), tuple(config["std"])) != IMAGENET:
        report.notes.append(
            f"trained with mean {config['mean']} and std {config['std']}, not ImageNet's used here"
        )
    return report


def plain(key: str) -> str:
    """A name in timm's classification network or its feature extractor, which writes stages.1 as stages_1."""
    return re.sub("[._]", "", key.removeprefix("model."))


class Collector(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def names(self, kind: str) -> list[str]:
        """The names in timm's line `Missing keys (a, b) …`, or Unexpected."""
        found = (re.match(rf"{kind} keys \((.*)\)", line) for line in self.lines)
        return [name for match in found if match for name in match[1].split(", ")]
