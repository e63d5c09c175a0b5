"""Pixel contrast in the trainer: configs, ranks, resuming, warm-up, and that nothing of it is left."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import one_and_two_processes
from tiny import CLASSES, five_class_run, write_folder

from protoseg.config import Config, config_from, load_config
from protoseg.data.loader import Batch
from protoseg.models.build import build_model
from protoseg.models.checkpoint import load_checkpoint, load_segmenter
from protoseg.runtime.errors import UserError
from protoseg.training import loop as trainer
from protoseg.training import resume
from protoseg.training.step import Run, build_run, train_step

CONTRAST = {"mode": "memory", "anchors_per_class": 8, "pool_size": 128, "positives": 16, "negatives": 32}
CONFIGS = sorted(
    [*Path("configs").glob("*_contrast.yaml"), *Path("configs/contrast").glob("*_contrast.yaml")]
)


def tiny(
    classifier: str = "prototypes", contrast: dict[str, Any] = CONTRAST, data: dict[str, Any] | None = None
) -> Config:
    return config_from(
        {
            "classifier": classifier,
            "data": {"name": "digits", "batch_size": 4, "workers": 0, **(data or {})},
            "backbone": {"name": "timm:test_efficientnet"},  # 82,300 parameters
            "decode_head": {"dim": 16, "dropout": 0},
            "prototypes": {"num_per_class": 2},
            "contrast": contrast,
            "optim": {"name": "sgd", "lr": 0.01},
            "train": {"iterations": 6, "log_interval": 1},
            "eval": {"interval": 6, "samples": 0},
            "checkpoint": {"interval": 3},
        },
        "test",
    )


@pytest.fixture
def folder(tmp_path: Path) -> dict[str, Any]:
    """Three small images; the digits' validation split takes a while."""
    write_folder(tmp_path / "data")
    return {"name": "folder", "root": str(tmp_path / "data"), "classes": CLASSES, "crop": [48, 48]}


def batch(step: int, part: slice = slice(None), classes: int = 5) -> Batch:
    """Four images of blocks of classes, one of them mostly ignored."""
    g = torch.Generator().manual_seed(step)
    label = torch.randint(0, classes, (4, 8, 8), generator=g).repeat_interleave(6, 1).repeat_interleave(6, 2)
    image = (label[:, None] * 40 + torch.randint(0, 50, (4, 3, 48, 48), generator=g)).to(torch.uint8)
    label[3, 8:] = 255
    return Batch(image[part], label[part], torch.arange(4)[part] + 4 * (step % 3))


make_run = partial(five_class_run, images=12)


def contrast_state(run: Run) -> dict[str, torch.Tensor]:
    assert run.contrast is not None
    return run.contrast.state_dict()


CLASSIFIERS = ("prototypes", "linear")


def eight_steps(rank: int, world: int, out: Path) -> None:
    """Of one rank with each classifier."""
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    for classifier in CLASSIFIERS:
        run = make_run(tiny(classifier), dtype=torch.float64)
        values = [train_step(run, batch(step, share)) for step in range(8)]
        state = {"model": run.model.state_dict(), "contrast": contrast_state(run), "values": values}
        torch.save(state, out / f"{classifier}-{world}-{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `eight_steps` saves, of one process and of two."""
    return one_and_two_processes(eight_steps, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_two_ranks_equal_one(ranks: Path, classifier: str) -> None:
    single = torch.load(ranks / f"{classifier}-1-0.pt", weights_only=True)
    parts = [torch.load(ranks / f"{classifier}-2-{rank}.pt", weights_only=True) for rank in range(2)]
    assert single["contrast"]["memory.pixel_fill_C"].min() > 0
    for kind in ("model", "contrast"):
        for name, value in single[kind].items():
            assert torch.equal(parts[0][kind][name], parts[1][kind][name]), f"ranks differ in {name}"
            torch.testing.assert_close(parts[0][kind][name], value, rtol=0, atol=1e-5, msg=name)
    for ours, theirs in zip(single["values"], parts[0]["values"]):
        assert ours["contrast"] > 0
        for name in ours.keys() - {"grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_resumed_run_equals_uninterrupted(
    tmp_path: Path, folder: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("linear", data=folder)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    save = resume.save_checkpoint

    def save_and_keep(path: Path, content: dict[str, Any]) -> None:
        save(path, content)
        if path.name == "last.pt" and content["step"] == 3:
            resumed.mkdir()
            shutil.copy(path, resumed / "last.pt")

    monkeypatch.setattr(resume, "save_checkpoint", save_and_keep)
    trainer.train(config, straight)
    assert load_checkpoint(resumed / "last.pt")["step"] == 3
    trainer.train(config, resumed, resume="auto")
    a, b = (load_checkpoint(out / "last.pt") for out in (straight, resumed))
    assert {"memory.rows_SD"} <= a["contrast"].keys()
    for kind in ("model", "contrast"):
        assert a[kind].keys() == b[kind].keys()
        for name in a[kind]:
            assert torch.equal(a[kind][name], b[kind][name]), name
    for kind in ("images", "labels"):
        shutil.copy(tmp_path / f"data/{kind}/train/0.png", tmp_path / f"data/{kind}/train/9.png")
    with pytest.raises(UserError, match=r"last.pt: the training set had another number of images when this"):
        trainer.train(config, resumed, resume="auto")


def test_nothing_is_left_in_the_trained_model(tmp_path: Path, folder: dict[str, Any]) -> None:
    results = trainer.train(tiny(data=folder), tmp_path)
    plain = build_model(tiny(contrast={"mode": "none"}, data=folder))
    for name in ("last.pt", "best.pt"):
        model, _, content = load_segmenter(tmp_path / name)
        assert content["model"].keys() == plain.state_dict().keys()
        assert str(model) == str(plain)  # the same modules, so the same speed
    assert results["parameters"] == plain.num_parameters == sum(p.numel() for p in plain.parameters())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = {
        "contrast", "contrast_alignment", "contrast_uniformity", "contrast_positive_cosine",
        "contrast_hardest_negative_cosine", "contrast_hard_anchor_share", "contrast_pixel_fill",
        "contrast_region_fill", "contrast_anchors", "contrast_empty",
    }  # fmt: skip
    assert logged <= lines[0].keys()
    assert len(lines[-1]["pixel_fill"]) == len(lines[-1]["region_fill"]) == len(CLASSES)


def test_projection_learns_and_adds_to_the_total() -> None:
    run = make_run(tiny())
    assert run.contrast is not None
    before = run.contrast.projection.out.weight.clone()
    values = train_step(run, batch(0))
    parts = values["ce"] + 0.01 * values["ppc"] + 0.01 * values["ppd"] + values["contrast"]
    assert values["loss"] == pytest.approx(parts, rel=1e-5)
    assert not torch.equal(run.contrast.projection.out.weight, before)


def test_warm_up_fills_the_memory_and_counts_zero_times() -> None:
    run = make_run(tiny(contrast={**CONTRAST, "warmup_iterations": 2}))
    assert run.contrast is not None
    bias = run.contrast.projection.out.bias.clone()
    for step in range(2):
        values = train_step(run, batch(step))
        assert values["contrast"] > 0
        assert values["loss"] == pytest.approx(
            values["ce"] + 0.01 * (values["ppc"] + values["ppd"]), rel=1e-5
        )
    assert torch.equal(run.contrast.projection.out.bias, bias)  # weights decay, biases only move by gradients
    assert contrast_state(run)["memory.pixel_fill_C"].min() > 0
    values = train_step(run, batch(2))
    assert values["loss"] > values["ce"] + 0.01 * (values["ppc"] + values["ppd"])


@pytest.mark.parametrize("mode", ["intra_image", "batch", "memory"])
def test_a_batch_without_pairs_costs_nothing_and_is_counted(mode: str) -> None:
    run = make_run(tiny("linear", {**CONTRAST, "mode": mode}))
    empty = batch(0)._replace(label=torch.full((4, 48, 48), 255))
    one_class = batch(0)._replace(label=torch.zeros(4, 48, 48, dtype=torch.long))
    for each in (empty, one_class):
        values = train_step(run, each)
        assert values["contrast"] == 0
        assert values["contrast_empty"] == 1
    assert run.empty_steps == 2
    assert train_step(run, batch(1))["contrast"] > 0
    assert run.empty_steps == 2
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_accumulation_takes_the_mean_over_micro_batches() -> None:
    whole = make_run(tiny("linear", {**CONTRAST, "mode": "intra_image", "pool_size": "full"}))
    config = whole.config.model_copy(
        update={"train": whole.config.train.model_copy(update={"accumulation": 4})}
    )
    split = make_run(config)
    single = [
        train_step(make_run(whole.config), Batch(*(t[i : i + 1] for t in batch(0))))["contrast"]
        for i in range(4)
    ]
    values = train_step(split, batch(0))
    assert values["contrast"] == pytest.approx(sum(single) / 4, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "source", "channels"),
    [
        ("contrast/cityscapes_deeplabv3_r101_linear_contrast", "last", 2048),
        ("contrast/cityscapes_ocr_r101_linear_contrast", "last", 2048),
        ("contrast/cityscapes_ocr_hrnet_w48_linear_contrast", "maps", 720),
        ("cityscapes_hrnet_w48_k10_contrast", "maps", 720),
        ("ade20k_swin_b_k10_contrast", "embedding", 768),
        ("ade20k_segformer_k10_contrast", "embedding", 768),
        ("camvid_resnet18_k10", "embedding", 128),
    ],
)
def test_what_contrast_sees(name: str, source: str, channels: int) -> None:
    with torch.device("meta"):
        model = build_model(load_config(f"configs/{name}.yaml"))
    assert (model.contrast_input, model.contrast_channels) == (source, channels)


def test_every_contrast_config_is_there() -> None:
    datasets, models = ("cityscapes", "pcontext", "cocostuff"), ("deeplabv3_r101", "hrnet_w48")
    models = (*models, "ocr_r101", "ocr_hrnet_w48")
    wanted = {f"contrast/{d}_{m}_linear_contrast" for d in datasets for m in models}
    models = ("fcn_r101", "hrnet_w48", "swin_b", "segformer")
    wanted |= {f"{d}_{m}_k10_contrast" for d in ("cityscapes", "ade20k") for m in models}
    wanted.add("digits_resnet18_linear_contrast")
    assert {str(path.relative_to("configs").with_suffix("")) for path in CONFIGS} == wanted


def one_of_a_kind(paths: list[Path]) -> list[Path]:
    """The configs without those that differ from another one in data and schedule alone."""
    kinds = {}
    for path in paths:
        c = load_config(path)
        kinds[repr((c.backbone, c.decode_head, c.classifier, c.prototypes, c.contrast))] = path
    return list(kinds.values())


@pytest.mark.parametrize("path", one_of_a_kind(CONFIGS), ids=lambda path: path.stem)
def test_contrast_config_takes_a_step(path: Path) -> None:
    config = load_config(path, ["data.batch_size=2", "train.precision=fp32", "contrast.cap_mb=8"])
    run = build_run(config, tuple("abcd"), ((0, 0, 0),) * 4, 4, torch.device("cpu"))
    label = torch.arange(4).repeat_interleave(16).repeat(2, 64, 1)
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    values = train_step(run, Batch(image, label, torch.arange(2)))
    assert values["contrast"] > 0
    assert contrast_state(run)["memory.pixel_fill_C"].min() > 0


def test_settings_that_do_not_fit_are_named() -> None:
    for contrast, message in (
        (
            {"mode": "memory", "pool_size": 10},
            r"contrast\.pool_size=10 must be at least 2 per class, 22 here",
        ),
        ({"mode": "memory", "cap_mb": 0.001}, r"contrast\.cap_mb=0.001 is too small"),
    ):
        with pytest.raises(UserError, match=message):
            build_run(tiny(contrast=contrast), tuple("abcdefghijk"), (), 4, torch.device("cpu"))


def test_the_cap_is_said_once(
    tmp_path: Path, folder: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train(tiny(contrast={**CONTRAST, "dim": 8, "cap_mb": 0.001}, data=folder), tmp_path)
    assert capsys.readouterr().out.count("note: contrast memory is capped at 0.001 MB") == 1
