"""The settings of the method, with their defaults. The configuration checks the types of what a file says.

Errors: ValueError naming the setting.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class PrototypeSettings:
    """The settings of a `PrototypeHead`, with their defaults. Errors: ValueError naming the setting."""

    num_per_class: int = 10  # K
    momentum: float | Literal["auto"] = "auto"  # μ; auto: from the number of steps, see `auto_momentum`
    kappa: float = 0.05  # entropy of the clustering
    sinkhorn_iterations: int = 3
    temperature: float = 0.1  # τ of PPC
    logit_scale: float = 20.0
    prior: Literal["frequency", "none"] = "frequency"  # log share of the class, added to its logit
    start: Literal["data", "random"] = "data"  # data: `prepare_` places a class when it is seen first
    update_pixels: Literal["correct", "all"] = "correct"  # which pixels move prototypes
    score_norm: Literal["scale", "layer_norm"] = "scale"  # layer_norm: 2·C learnable numbers, no logit_scale
    score_dtype: Literal["float32", "bfloat16"] = "float32"  # of the N × CK product; double features: double
    revive_after: int = 100  # steps between looks for dead prototypes, which get a new place; 0: never

    def __post_init__(self) -> None:
        _check(self, at_least_one=("num_per_class", "sinkhorn_iterations"))
        _check(self, above_zero=("kappa", "temperature", "logit_scale"))
        if self.momentum != "auto" and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum!r} must be auto or between 0 and 1")
        if self.revive_after < 0:
            raise ValueError(f"revive_after={self.revive_after} must be at least 0")


@dataclass(frozen=True)
class ContrastSettings:
    """Cross-image pixel contrast (ICCV 2021); counts and τ are the paper's."""

    mode: Literal["none", "intra_image", "batch", "memory"] = "none"
    memory: Literal["pixel", "region", "both"] = "both"
    dim: int = 256  # channels of the projection
    anchors_per_class: int = 50  # in the whole batch
    anchor_sampler: Literal["random", "seg_hard"] = "seg_hard"
    pair_sampler: Literal["random", "hardest", "semi_hard"] = "semi_hard"
    positives: int = 1024  # per anchor
    negatives: int = 2048
    pool_size: int | Literal["full"] = 4096  # candidates of a step, shared by its anchors
    temperature: float = 0.1
    warmup_iterations: int = 0  # steps in which the memory fills and the loss is 0
    pixels_per_image: int = 10  # V: pixels of a class that enter the memory
    memory_size: int | None = None  # T: pixels per class; None: ten per training image
    cap_mb: float = 256  # of the memory, 10**6 bytes
    storage: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        counts = ("dim", "anchors_per_class", "positives", "negatives", "pixels_per_image")
        optional = tuple(
            name for name in ("memory_size", "pool_size") if getattr(self, name) not in (None, "full")
        )
        _check(self, at_least_one=counts + optional, above_zero=("temperature", "cap_mb"))
        if self.warmup_iterations < 0:
            raise ValueError(f"warmup_iterations={self.warmup_iterations} must be at least 0")


def _check(settings: object, at_least_one: tuple[str, ...] = (), above_zero: tuple[str, ...] = ()) -> None:
    """Types, words and bounds."""
    for name, hint in get_type_hints(type(settings)).items():
        value, kinds = getattr(settings, name), _kinds(hint)
        if not any(value == kind if isinstance(kind, str) else isinstance(value, kind) for kind in kinds):
            raise ValueError(
                f"{name}={value!r} must be {' or '.join(CALLED.get(kind, kind) for kind in kinds)}"
            )
    for name in at_least_one:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least 1")
    for name in above_zero:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name}={getattr(settings, name)} must be above 0")


CALLED: dict[Any, str] = {Real: "a number", Integral: "a whole number", type(None): "None"}


def _kinds(hint: Any) -> list[Any]:
    """What a field may be: kinds of numbers, None, and words."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    inner = [kind for each in get_args(hint) for kind in _kinds(each)]
    return inner or [{float: Real, int: Integral}.get(hint, hint)]
