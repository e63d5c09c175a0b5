"""The model that a configuration describes."""

from dataclasses import asdict
from typing import cast

from torch import nn

from protoseg.config import Config
from protoseg.core.prototypes import PrototypeHead
from protoseg.core.ranks import AllReduce
from protoseg.data.datasets import dataset_spec
from protoseg.data.specs import DATASETS
from protoseg.models.backbones import Backbone, build_backbone
from protoseg.models.decode_heads import build_decode_head
from protoseg.models.official import OfficialPrototypeHead
from protoseg.models.segmenter import CosineClassifier, LinearClassifier, Segmenter


def build_model(
    config: Config,
    num_classes: int | None = None,
    all_reduce: AllReduce | None = None,
) -> Segmenter:
    """The model that a configuration describes; `num_classes` defaults to the dataset's."""
    spec = DATASETS.get(config.data.name) or dataset_spec(config.data)  # the latter says what is known
    num_classes = num_classes or len(config.data.classes or spec.classes)
    ignore_index = spec.ignore_index if config.data.ignore_index is None else config.data.ignore_index
    backbone = build_backbone(
        config.backbone.name,
        drop_path=config.backbone.drop_path,
        output_stride=config.backbone.output_stride,
        finest_stride=config.decode_head.stride,
        frozen=config.backbone.frozen,
    )
    backbone.set_grad_checkpointing(config.backbone.grad_checkpointing)
    if config.decode_head.name == "official":
        backbone.net.align_corners = True  # read by HRNet
    head = build_decode_head(
        config.decode_head.name,
        backbone.channels,
        backbone.strides,
        num_classes,
        dim=config.decode_head.dim,
        dropout=config.decode_head.dropout,
        projection=config.decode_head.projection,
    )
    head.every_map &= config.decode_head.stride is None
    dim = cast(int, head.dim)
    classifier: nn.Module
    if config.classifier == "linear":
        classifier = LinearClassifier(dim, num_classes)
    elif config.classifier == "cosine":
        classifier = CosineClassifier(dim, num_classes, config.prototypes.logit_scale)
    else:
        settings = asdict(config.prototypes)
        head_class = OfficialPrototypeHead if config.preset == "official" else PrototypeHead
        classifier = head_class(
            dim,
            num_classes,
            settings.pop("num_per_class"),
            ignore_index=ignore_index,
            iterations=config.train.iterations,
            all_reduce=all_reduce,
            **settings,
        )
    return Segmenter(
        backbone,
        head,
        classifier,
        ignore_index=ignore_index,
        contrast_input=contrast_input(config.backbone.name, backbone, head),
    )


def contrast_input(name: str, backbone: Backbone, head: nn.Module) -> str:
    """What pixel contrast sees: as in the paper all of HRNet's maps, or a dilated ResNet's last stage.

    The embedding for the others, whose last map is too coarse.
    """
    if name.startswith("hrnet"):
        return "maps"
    return "last" if name.startswith("resnet") and backbone.strides[-1] == head.stride else "embedding"
