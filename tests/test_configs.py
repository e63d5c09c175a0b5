"""Every shipped config parses, builds the model it names, and the small ones take a step."""

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from protoseg.config import config_from, load_config, to_plain
from protoseg.data.datasets import dataset_spec
from protoseg.data.loader import Batch
from protoseg.models.build import build_model
from protoseg.runtime.config_keys import differing_keys
from protoseg.runtime.errors import UserError
from protoseg.training.step import build_run, train_step

ALL = sorted(path for path in Path("configs").rglob("*.yaml") if "sweeps" not in path.parts)
RUNS = [path for path in ALL if not path.stem.endswith("_fit")]
SMALL = [path for path in RUNS if path.stem.startswith(("digits", "camvid"))]


class Known(NamedTuple):
    """Learnable numbers of a model with prototypes: `shared` + `per_class` · C (the auxiliary classifier)."""

    shared: int
    dim: int  # with a linear classifier (dim + 1) · C more
    per_class: int = 0


LITE0 = 4_652_008 - (320 + 2) * 1280 - 1281 * 1000

# From the table of the papers' models, counted there with 150 classes.
KNOWN = {
    ("resnet101c", "fcn"): Known(68_513_782 - 150 * 257, 512, 257),
    ("resnet101c", "aspp"): Known(87_206_028 - 150 * (513 + 257), 512, 257),
    ("resnet101c", "ocr"): Known(55_617_164 - 150 * (513 + 257), 512, 257),
    ("hrnet_w48", "hrnet"): Known(65_844_960, 720),
    ("hrnet_w48", "ocr"): Known(70_533_100 - 150 * (513 + 721), 512, 721),
    ("swin_b", "mlp"): Known(90_583_480, 768),
    ("mit_b4", "mlp"): Known(63_993_024, 768),
    ("mit_b0", "mlp"): Known(3_752_694 - 150 * 257, 256),
    # 960 channels to the head's, four biases, four times as many to as many, a norm: with 256 and with 128.
    ("resnet18", "mlp"): Known(11_365_696 + 966 * (256 - 128) + 4 * (256**2 - 128**2), 256),
    ("resnet18", "mlp", 128): Known(11_365_696, 128),
    # EfficientNet-Lite0 without its last convolution and classifier, and 472 channels to 256 with a norm.
    ("timm:tf_efficientnet_lite0", "hrnet"): Known(LITE0 + 472 * 256 + 2 * 256, 256),
    # HRNet without its head, a 3×3 convolution and norm, the projection, a norm, LayerNorm over classes.
    ("hrnet_w48", "official"): Known(
        (65_844_960 - 720 * 722) + 720 * (9 * 720 + 3) + 2 * 720 * 721 + 2 * 720, 720, 2
    ),
}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_config_builds_the_model_of_the_table(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(config)
    linear = config.classifier == "linear"
    assert linear == ("_linear" in path.stem) == (model.prototypes is None)
    names = (config.backbone.name, config.decode_head.name)
    known = KNOWN.get((*names, config.decode_head.dim)) or KNOWN[names]
    classes = len(dataset_spec(config.data).classes)
    expected = known.shared + classes * known.per_class + linear * classes * (known.dim + 1)
    assert model.num_parameters == expected - config.backbone.frozen * LITE0


def test_linear_and_k10_configs_differ_in_the_classifier_alone() -> None:
    pairs = [(path, path.with_stem(path.stem[:-3] + "linear")) for path in RUNS if path.stem.endswith("_k10")]
    assert len(pairs) == 16
    for pair in pairs:
        values = [yaml.safe_load(path.read_text()) for path in pair]
        for each in values:
            each.pop("prototypes", None), each.pop("classifier", None)
            each.get("loss", {}).pop("ppd", None)  # of prototypes alone
            each["loss"] = each.get("loss") or {}
        assert values[0] == values[1], pair


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_small_config_takes_a_step(path: Path) -> None:
    config = load_config(path, ["data.batch_size=2", "train.precision=fp32", "contrast.cap_mb=8"])
    spec = dataset_spec(config.data)
    run = build_run(config, spec.classes, spec.palette, 4, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    label = torch.arange(4).repeat_interleave(16).repeat(2, 64, 1)
    values = train_step(run, Batch(image, label, torch.arange(2)))
    assert math.isfinite(values["loss"])
    assert values["loss"] > 0
    still = {name for name, p in run.model.named_parameters() if torch.equal(p, before[name])}
    # ResNets start with blocks that change nothing: some of their norms see no gradient yet.
    frozen = config.backbone.frozen
    assert all("bn" in name or (frozen and name.startswith("backbone.")) for name in still), still
    if run.model.prototypes is not None:
        assert run.model.prototypes.initialized.tolist() == [c < 4 for c in range(len(spec.classes))]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_config_is_short_and_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "the first lines say how to run it, how long it takes, what to expect"
    assert f"python tools/train.py {path}" in text or f"python tools/fit.py {path}" in text
    assert sum(not line.startswith("#") for line in text.splitlines()) <= 30
    values = yaml.safe_load(text)
    defaults = to_plain(config_from({"preset": values.get("preset", "default")}, "defaults"))
    differing = differing_keys(defaults, to_plain(config_from(values, str(path))))
    given = {f"{section}.{key}" for section, keys in values.items() if isinstance(keys, dict) for key in keys}
    assert given - set(differing) == set(), "the same as the default: leave it out"


def test_half_types_reach_what_they_are_for() -> None:
    names = {
        "digits_resnet18_k4": ["prototypes.score_dtype=bfloat16"],
        "digits_resnet18_linear_contrast": ["contrast.storage=float16", "contrast.cap_mb=8"],
    }
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    label = torch.arange(4).repeat_interleave(16).repeat(2, 64, 1)
    for name, half in names.items():
        losses = []
        for overrides in ([], half):
            config = load_config(name, ["data.batch_size=2", *overrides])
            run = build_run(config, tuple("abcdefghijk"), ((0, 0, 0),) * 11, 4, torch.device("cpu"))
            for _ in range(2):  # the second one meets prototypes and memory as the first one left them
                loss = train_step(run, Batch(image, label, torch.arange(2)))["loss"]
            losses.append(loss)
        assert losses[0] != losses[1]
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert run.contrast is not None
    assert run.contrast.memory is not None
    assert run.contrast.memory.rows_SD.dtype == torch.float16


def test_micro_batches_must_be_whole_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protoseg.runtime.distributed.world_size", lambda: 2)
    config = config_from({"data": {"batch_size": 9}, "train": {"accumulation": 3}}, "test")
    message = (
        r"data\.batch_size: 9 does not divide by 2 processes × train\.accumulation 3; use a multiple of 6"
    )
    with pytest.raises(UserError, match=message):
        build_run(config, ("a", "b"), ((0, 0, 0), (9, 9, 9)), 4, torch.device("cpu"))
