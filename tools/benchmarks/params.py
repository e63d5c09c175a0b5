"""Learnable parameters of the papers' models, linear classifier and prototypes, beside the papers' figures.

The models are built on the meta device: python tools/benchmark.py params
"""

import argparse
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from protoseg.models.backbones import build_backbone
from protoseg.models.decode_heads import build_decode_head


class Row(NamedTuple):
    label: str
    backbone: str
    head: str
    classes: int = 150
    output_stride: int = 32
    dim: int | None = None
    paper: tuple[float | None, float | None] = (None, None)  # millions: linear, prototypes


ROWS = (
    Row("FCN R101", "resnet101c", "fcn", output_stride=8, paper=(68.6, 68.5)),
    Row("HRNetV2-W48", "hrnet_w48", "hrnet", paper=(65.9, 65.8)),
    Row("Swin-B", "swin_b", "mlp", dim=768, paper=(90.6, 90.5)),
    Row("SegFormer-B4", "mit_b4", "mlp", dim=768, paper=(64.1, 64.0)),
    Row("OCR HRNetV2-W48", "hrnet_w48", "ocr"),
    Row("OCR HRNetV2-W48, 19 classes", "hrnet_w48", "ocr", classes=19, paper=(70.3, None)),
    Row("OCR R101", "resnet101c", "ocr", output_stride=8),
    Row("DeepLabV3 R101", "resnet101c", "aspp", output_stride=8),
    *(Row(f"SegFormer-B{i}", f"mit_b{i}", "mlp", dim=256 if i < 2 else 768) for i in (0, 1, 2, 3, 5)),
)


def count(row: Row) -> tuple[int, int]:
    """Learnable parameters (with the linear classifier, without it)."""
    with torch.device("meta"):
        backbone = build_backbone(row.backbone, output_stride=row.output_stride)
        head = build_decode_head(row.head, backbone.channels, backbone.strides, row.classes, dim=row.dim)
    shared = sum(p.numel() for module in (backbone, head) for p in module.parameters())
    return shared + (head.dim + 1) * row.classes, shared


def main(argv: list[str]) -> None:
    argparse.ArgumentParser(prog="benchmark.py params", description=__doc__).parse_args(argv)
    table = Table("model", "classes", "linear", "paper (M)", "prototypes", "paper (M)")
    for row in ROWS:
        ours = count(row)
        paper = ["" if number is None else f"{number}" for number in row.paper]
        table.add_row(row.label, str(row.classes), f"{ours[0]:,}", paper[0], f"{ours[1]:,}", paper[1])
    Console().print(table)
