"""A dataset of a few small pictures and an untrained model for it, for the tests of commands."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from protoseg.config import Config, config_from
from protoseg.models.build import build_model
from protoseg.models.checkpoint import save_segmenter
from protoseg.models.segmenter import Segmenter
from protoseg.training.step import Run, build_run

CLASSES = ["road", "car", "tree"]
PALETTE = [(128, 64, 128), (0, 0, 142), (107, 142, 35)]
SIZES = [(40, 56), (33, 47), (64, 64)]  # height, width


def tiny_config(root: Path, **changes: Any) -> dict[str, Any]:
    """Plain configuration of a small prototype model on the folder dataset at `root`."""
    data = {"name": "folder", "root": str(root), "classes": CLASSES, "palette": PALETTE, "workers": 0}
    values = {
        "data": data,
        "backbone": {"name": "timm:test_efficientnet"},  # 82,300 parameters
        "decode_head": {"dim": 8},
        "prototypes": {"num_per_class": 3, "start": "random"},
    }
    return values | changes


def small(**changes: Any) -> dict[str, Any]:
    """Plain configuration of a small model for the digits."""
    values = {
        "data": {"name": "digits"},
        "backbone": {"name": "resnet18"},
        "decode_head": {"dim": 16, "dropout": 0},
        "prototypes": {"num_per_class": 3, "start": "random"},
    }
    return values | changes


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "val")) -> None:
    """Images and labels of every class, with some ignored pixels."""
    rng = np.random.default_rng(0)
    for split in splits:
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i, (height, width) in enumerate(SIZES):
            label = rng.integers(0, len(CLASSES), (4, 4)).repeat(-(-height // 4), 0).repeat(-(-width // 4), 1)
            label = label[:height, :width].astype(np.uint8)
            image = np.array(PALETTE, np.uint8)[label] // 2 + rng.integers(
                0, 90, (height, width, 3), np.uint8
            )
            label[:3] = 255
            Image.fromarray(image).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")


def write_checkpoint(path: Path, values: dict[str, Any], seed: int = 0) -> Segmenter:
    """An untrained model of this configuration as a checkpoint; returns it in eval mode."""
    config = config_from(values, "test")
    torch.manual_seed(seed)
    model = build_model(config, len(CLASSES)).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_segmenter(path, model, config, CLASSES, PALETTE)
    return model


def five_class_run(config: Config, images: int, dtype: torch.dtype = torch.float32) -> Run:
    """A run whose BatchNorm stays in evaluation: SyncBatchNorm does not exist on the CPU."""
    run = build_run(config, tuple("abcde"), ((0, 0, 0),) * 5, images, torch.device("cpu"), dtype)
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, m=module: m  # type: ignore[method-assign]
    return run
