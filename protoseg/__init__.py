"""Semantic segmentation with prototypes that are clustered, not learned."""

from protoseg.config import Config, load_config
from protoseg.model import Segmenter, build_model
from protoseg.prototypes import PrototypeHead

__all__ = ["Config", "PrototypeHead", "Segmenter", "build_model", "load_config"]
