"""Whole segmenters made by other programs: Hugging Face, mmsegmentation, the releases of the papers."""

import re
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from protoseg.core.prototypes import PrototypeHead
from protoseg.core.similarity import unit
from protoseg.models.decode_heads import HEADS
from protoseg.models.hrnet import HRNet
from protoseg.runtime.errors import UserError
from protoseg.weights.foreign_backbone import (
    NO_PLACE,
    ImportReport,
    copy_pieces,
    finish_mit,
    likeliest_translation,
)
from protoseg.weights.foreign_files import read_state
from protoseg.weights.head_names import HEAD_FORMATS
from protoseg.weights.names import translate


def load_segmenter_weights(model: Any, name: str, path: str) -> ImportReport:
    """Load a whole segmenter of another program into a Segmenter, in place.

    model has `backbone` (built as `name`), `decode_head` and `classifier`: a 1×1 convolution, or for ProtoSeg
    the head of the `official` preset. What the file lacks is reported; see require_complete.
    Errors: as load_backbone_weights.
    """
    state = read_state(Path(path))
    pieces, program = likeliest_translation(model.backbone, name, state, "backbone.")
    known = model.state_dict().keys()
    heads = {
        head: max((translate(f.rules, state) for f in formats), key=lambda found: len(found.keys() & known))
        for head, formats in HEAD_FORMATS.items()
    }
    ours = type(model.decode_head).__name__
    report = copy_pieces(model, pieces | heads.get(ours, {}), state, path, program)
    report.missing = [name for name in report.missing if name not in ("mean", "std")]  # the backbone's
    report.notes += finish_mit(model.backbone, program)
    if not any(name.startswith("decode_head.") for name in report.matched):
        fitting = max(heads, key=lambda head: len(heads[head]))
        needed = next(name for name, head in HEADS.items() if head.__name__ == fitting)
        report.notes.append(
            f"nothing of the file fits the decode head {ours}"
            + (f": it needs decode_head.name {needed}" if heads[fitting] else "")
        )
    for key in report.unexpected:
        twin = key.replace("proj_head.mlp2.", "proj_head.proj.")
        if twin != key and twin in state and torch.equal(state[key], state[twin]):
            report.unexpected[key] = f"stored twice, equal to {twin}"
    if isinstance(model.classifier, PrototypeHead) and "classifier.prototypes" in report.matched:
        report.notes += take_prototypes(model.classifier)
    return report


def take_prototypes(head: PrototypeHead) -> list[str]:
    """The published code brings prototypes to unit length at each use, so its files need not hold them so."""
    length = head.prototypes.norm(dim=-1)
    head.prototypes.copy_(unit(head.prototypes))
    head.initialized.fill_(True)
    return [f"prototypes brought to unit length (from {length.min():.3f} … {length.max():.3f})"]


# The model predicts the same without them.
OPTIONAL = re.compile(
    r"mean|std|decode_head\.auxiliary\..+|classifier\.((nearest_)?usage|agreeing|pixel_counts|movement|initialized)"
)


def require_complete(report: ImportReport) -> None:
    """Errors: UserError naming the first tensor that only the file or only the model has, if it matters."""
    problems = [f"{name} is not in the file" for name in report.missing if not OPTIONAL.fullmatch(name)]
    problems += [f"{name}: {why}" for name, why in report.unexpected.items() if why.endswith(NO_PLACE)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{report.path} is not the configured model: {problems[0]}{more}; "
            "check backbone.name, decode_head.name, classifier and preset"
        )


def take_bgr_(net: HRNet) -> None:
    """Let a network take RGB images that was trained on BGR ones, in the manner of OpenSeg and ProtoSeg.

    There, channel c of a BGR image is normalised by ImageNet's numbers for channel c of RGB ones. The first
    convolution takes up order and scale, the BatchNorm after it the shift; exact but for the rows and columns
    of its output that see padding.
    """
    conv, norm = net.net.conv1, net.net.bn1
    numbers = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = (torch.tensor(each)[None, :, None, None] for each in numbers)
    theirs = conv.weight.data.flip(1)  # what they apply to R, G, B in this order
    shift = (theirs * (mean - mean.flip(1)) / std.flip(1)).sum((1, 2, 3))
    conv.weight.data.copy_(theirs * std / std.flip(1))
    norm.running_mean -= shift
