"""Semantic segmentation with prototypes that are clustered, not learned."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protoseg.config import Config, load_config
    from protoseg.model import Segmenter, build_model
    from protoseg.prototypes import PrototypeHead

__all__ = ["Config", "PrototypeHead", "Segmenter", "build_model", "load_config"]

_HOMES = {
    "Config": "config",
    "load_config": "config",
    "Segmenter": "model",
    "build_model": "model",
    "PrototypeHead": "prototypes",
}


def __getattr__(name: str) -> Any:
    # When asked for: PrototypeHead needs torch alone, the model needs timm and more.
    if name not in _HOMES:
        raise AttributeError(f"module 'protoseg' has no attribute {name!r}")
    return getattr(import_module(f"protoseg.{_HOMES[name]}"), name)
