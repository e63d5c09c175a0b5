"""A trained model as a graph for other programs: ONNX, or a torch.export program.

uint8 RGB images (B, 3, H, W) in, maps of the same size out; batch, height and width are free, from
`smallest_side` pixels on. Mean and scale are inside.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.core.losses import nearest_cells
from protoseg.models.segmenter import Segmenter
from protoseg.models.swin import Swin
from protoseg.runtime.errors import UserError
from protoseg.runtime.extras import import_extra
from protoseg.runtime.files import whole_file

SMALLEST = 64  # rows and columns; some backbones handle smaller images in another way
OPSET = 20
EXTRA = "protoseg[export]"
OUTPUTS = {
    "labels": ("labels",),
    "logits": ("logits",),
    "all": ("labels", "confidence", "logits", "prototypes", "distance"),
}


class SegmentationGraph(nn.Module):
    """What is exported: `names` of labels (int64), confidence, logits (B, C, H, W), prototypes, distance."""

    def __init__(self, model: Segmenter, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = images.shape[-2:]
        embedding = self.model.embed(images)
        head = self.model.prototypes
        if head is None:
            cells, apart = self.model.classifier(embedding), None
        else:
            cells, apart = head(embedding, return_distance=True)
        logits = F.interpolate(cells.float(), size=size, mode="bilinear", align_corners=False)
        labels = logits.argmax(1)
        made = {"logits": logits, "labels": labels}
        if "confidence" in self.names:
            made["confidence"] = logits.softmax(1).amax(1)
        if head is not None and "prototypes" in self.names:
            emb_ND = head.unit_rows(embedding)
            protos_CKD = head.prototypes.to(emb_ND.dtype)
            batch, _, height, width = embedding.shape
            sims_CKN = torch.einsum("ckd,nd->ckn", protos_CKD, emb_ND)
            nearest_BChw = rearrange(sims_CKN.argmax(1), "c (b h w) -> b c h w", b=batch, h=height)
            rows, columns = (
                nearest_cells(side, cell, images.device) for side, cell in zip(size, (height, width))
            )
            at_pixels = nearest_BChw[:, :, rows[:, None], columns]
            made["prototypes"] = at_pixels.gather(1, labels[:, None])[:, 0]
        if apart is not None and "distance" in self.names:
            spread = F.interpolate(apart[:, None], size=size, mode="bilinear", align_corners=False)
            made["distance"] = spread[:, 0]
        return tuple(made[name] for name in self.names)


def graph_of(model: Segmenter, output: str) -> SegmentationGraph:
    """The graph with what `output` ("labels", "logits" or "all") names, as far as the model has it."""
    names = OUTPUTS[output]
    if model.prototypes is None:
        names = tuple(name for name in names if name not in ("prototypes", "distance"))
    return SegmentationGraph(model.eval(), names).eval()


def smallest_side(model: Segmenter) -> int:
    """Rows and columns from which on a graph holds: of a Swin, where every map is more than one window.

    A single window would be an axis of size 1, which torch.export does not leave free.
    """
    net = model.backbone.net
    if not isinstance(net, Swin):
        return SMALLEST
    return net.strides[-1] * net.net.layers[0].blocks[0].window_size[0] + 1


def exported_program(graph: SegmentationGraph) -> torch.export.ExportedProgram:
    """The graph with free batch, height and width. Errors: UserError naming the layer that cannot."""
    smallest = smallest_side(graph.model)
    side = torch.export.Dim.DYNAMIC(min=smallest)
    free = {0: torch.export.Dim.DYNAMIC(min=1), 2: side, 3: side}
    # Odd sides: nothing may depend on a side that divides.
    example = torch.zeros(2, 3, smallest + 33, smallest + 67, dtype=torch.uint8)
    last = LastLayer(graph)
    try:
        with torch.no_grad():
            return torch.export.export(graph, (example,), dynamic_shapes=(free,), strict=False)
    except Exception as error:
        raise _not_exportable(error, last.name) from error
    finally:
        last.remove()


class LastLayer:
    """Remembers which layer of a module ran last: where an export stopped."""

    def __init__(self, module: nn.Module) -> None:
        self.name = ""
        self.hooks = [
            each.register_forward_pre_hook(lambda *_, name=name: setattr(self, "name", name))
            for name, each in module.named_modules()
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def write_program(path: Path, graph: SegmentationGraph, about: dict[str, Any]) -> None:
    """Write a torch.export program (.pt2); `about` goes along as protoseg.json (see `read_about`)."""
    if isinstance(graph.model.backbone.net, Swin):
        # Its program guards against a batch of one, which the same graph takes in ONNX.
        raise UserError("export: a Swin cannot be made a torch program for single images; use --format onnx")
    program = exported_program(graph)
    with whole_file(path) as part, open(part, "wb") as file:
        torch.export.save(program, file, extra_files={"protoseg.json": json.dumps(about)})


def write_onnx(path: Path, graph: SegmentationGraph, about: dict[str, Any]) -> None:
    """Write an ONNX model whose metadata hold `about`, one JSON value per key.

    Errors: UserError if the extra `export` is not installed, or naming what ONNX has no operator for.
    """
    onnx, _ = (import_extra(name, EXTRA) for name in ("onnx", "onnxscript"))
    program = exported_program(graph)
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(graph.names),
            verbose=False,
        )
    except Exception as error:
        raise _not_exportable(error, "") from error
    assert made is not None
    proto = made.model_proto
    for name, value in {**about, "torch": torch.__version__}.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
    with whole_file(path) as part:
        onnx.save(proto, str(part))


def about_model(content: dict[str, Any]) -> dict[str, Any]:
    """What goes into a file beside the graph: class names, palette, versions."""
    return {"classes": content["classes"], "palette": content["palette"], "protoseg": version("protoseg")}


def _not_exportable(error: Exception, layer: str) -> UserError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    where = f"layer {layer.removeprefix('model.')}" if layer else "the graph"
    return UserError(f"export: {where} cannot be exported ({reason:.200}); use another backbone or format")
