"""Semantic segmentation with prototypes that are clustered, not learned."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protoseg.config import Config, load_config
    from protoseg.core.losses import downsample_labels
    from protoseg.core.prototypes import PrototypeHead
    from protoseg.data.datasets import build_dataset
    from protoseg.data.reading.decode import read_image
    from protoseg.evaluation.predictor import load
    from protoseg.models.build import build_model
    from protoseg.models.checkpoint import load_segmenter
    from protoseg.models.segmenter import Segmenter

_HOMES = {
    "Config": "config",
    "PrototypeHead": "core.prototypes",
    "Segmenter": "models.segmenter",
    "build_dataset": "data.datasets",
    "build_model": "models.build",
    "downsample_labels": "core.losses",
    "load": "evaluation.predictor",
    "load_config": "config",
    "load_segmenter": "models.checkpoint",
    "read_image": "data.reading.decode",
}

__all__ = [
    "Config",
    "PrototypeHead",
    "Segmenter",
    "build_dataset",
    "build_model",
    "downsample_labels",
    "load",
    "load_config",
    "load_segmenter",
    "read_image",
]


def __getattr__(name: str) -> Any:
    # When asked for: PrototypeHead needs torch alone, the model needs timm and more.
    if name not in _HOMES:
        raise AttributeError(f"module 'protoseg' has no attribute {name!r}")
    return getattr(import_module(f"protoseg.{_HOMES[name]}"), name)
