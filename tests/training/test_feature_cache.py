"""Maps of a frozen backbone, kept on disk: the same training without the backbone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import CLASSES, PALETTE, SIZES, write_folder

from protoseg.commands.cli import execute as command
from protoseg.config import config_from, to_plain
from protoseg.data.datasets import open_dataset
from protoseg.models.build import build_model
from protoseg.runtime.errors import UserError
from protoseg.training import feature_cache
from protoseg.training.feature_cache import FeatureCache, cache_folder
from protoseg.training.loop import train
from protoseg.training.resume import require_same_config

STILL = {"crop": [64, 64], "scale": [1, 1], "flip": 0, "photometric": False, "batch_size": 2, "workers": 0}


def frozen(root: Path, **data: Any) -> dict[str, Any]:
    return {
        "data": {
            "name": "folder",
            "root": str(root),
            "classes": CLASSES,
            "palette": PALETTE,
            **STILL,
            **data,
        },
        "backbone": {"name": "timm:test_efficientnet", "frozen": True},
        "decode_head": {"name": "hrnet", "dim": 8, "stride": 8, "dropout": 0},
        "prototypes": {"num_per_class": 2},
        "optim": {"name": "sgd", "lr": 0.05},
        "train": {"iterations": 4},
        "eval": {"interval": 2},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "data")
    return tmp_path / "data"


def test_training_from_kept_maps_is_training_from_images(root: Path, tmp_path: Path) -> None:
    kept = frozen(root, cache_features=str(tmp_path / "kept"))
    results = [
        train(config_from(values, "t"), tmp_path / name)
        for name, values in (("images", frozen(root)), ("maps", kept), ("again", kept))
    ]
    assert len(list((tmp_path / "kept").rglob("*.pt"))) == 2 * len(SIZES)
    states = [
        torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        for name in ("images", "maps", "again")
    ]
    torch.manual_seed(0)
    start = build_model(config_from(kept, "t")).state_dict()
    for name, expected in states[0].items():
        assert torch.equal(states[1][name], states[2][name]), name
        if name.startswith("backbone."):
            assert torch.equal(expected, start[name]), f"{name} has moved"
        torch.testing.assert_close(states[1][name], expected, rtol=2e-2, atol=5e-3, msg=name)
    assert results[1]["mIoU"] == pytest.approx(results[0]["mIoU"], abs=0.03)
    assert results[1]["parameters"] == sum(states[0][f"decode_head.fuse.{n}"].numel() for n in FUSE)
    assert len(list((tmp_path / "maps" / "samples").glob("*.png"))) > 0
    lines = [json.loads(line) for line in (tmp_path / "maps" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if line["kind"] == "eval"} == {2, 4}


FUSE = ("0.weight", "1.weight", "1.bias")


def test_maps_are_those_of_the_padded_image(root: Path, tmp_path: Path) -> None:
    config = config_from(frozen(root), "t")
    model, dataset = build_model(config).eval(), open_dataset(config, "train")
    cache = FeatureCache(dataset, tmp_path / "kept", (64, 72))
    assert cache.fill(model, config, torch.device("cpu")) == len(SIZES)
    assert cache.fill(model, config, torch.device("cpu")) == 0
    number, label = cache.read(1)
    image, plain = dataset.read(1)
    rows, columns = plain.shape
    canvas = torch.tensor(model.mean_colour, dtype=torch.uint8).view(3, 1, 1).repeat(1, 64, 72)
    canvas[:, :rows, :columns] = image
    with torch.no_grad():
        expected = model.maps(canvas[None])
    got = cache.maps(number, torch.device("cpu"))
    assert [x.shape[2:] for x in got] == [(8, 9), (4, 5), (2, 3)]
    for a, b in zip(got, expected):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-3)
    assert torch.equal(label[:rows, :columns], plain)
    assert (label[rows:] == 255).all()
    assert (label[:, columns:] == 255).all()


def test_a_run_goes_on_with_maps_if_it_began_with_them(root: Path) -> None:
    began = to_plain(config_from(frozen(root, cache_features=True), "t"))
    elsewhere = config_from(frozen(root, cache_features="/elsewhere", cache_gb=1), "t")
    require_same_config(began, elsewhere, Path("last.pt"))
    with pytest.raises(UserError, match=r"^last\.pt: .* configuration \(data\.cache_features differ\)"):
        require_same_config(began, config_from(frozen(root), "t"), Path("last.pt"))


def test_other_weights_and_other_images_get_other_files(root: Path, tmp_path: Path) -> None:
    config = config_from(frozen(root), "t")
    model, dataset = build_model(config), open_dataset(config, "train")
    other = copy.deepcopy(model)
    next(other.backbone.buffers()).add_(1)
    assert cache_folder(model, config) == cache_folder(copy.deepcopy(model), config)
    assert cache_folder(model, config) != cache_folder(other, config)
    other = copy.deepcopy(model)
    next(m for m in other.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)).eps = 1e-2
    assert cache_folder(model, config) != cache_folder(other, config)
    hrnets = [
        config_from(frozen(root) | {"backbone": {"name": "hrnet_w18"}, "decode_head": {"name": name}}, "t")
        for name in ("hrnet", "official")
    ]
    with torch.device("meta"):
        folders = {name: build_model(each) for name, each in zip("ab", hrnets)}
    for each in folders.values():
        each.to_empty(device="cpu")
        for tensor in each.state_dict().values():
            tensor.zero_()
    assert len({cache_folder(model, hrnets[0]) for model in folders.values()}) == 2, "align_corners"
    before = FeatureCache(dataset, tmp_path, (64, 64)).files
    assert len(set(before) | set(FeatureCache(dataset, tmp_path, None).files)) == 2 * len(SIZES)
    file = next((root / "images/train").iterdir())
    file.write_bytes(file.read_bytes() + b"\0")
    after = FeatureCache(dataset, tmp_path, (64, 64)).files
    assert len(set(before) & set(after)) == len(SIZES) - 1


def as_rank(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """One of two ranks, the other having done nothing."""
    for name, value in (("rank", lambda: number), ("world_size", lambda: 2), ("all_reduce", lambda x: x)):
        monkeypatch.setattr(feature_cache.distributed, name, value)


def test_ranks_that_look_at_different_times_leave_no_image_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, device = config_from(frozen(root), "t"), torch.device("cpu")
    model, dataset = build_model(config).eval(), open_dataset(config, "train")
    cache = FeatureCache(dataset, tmp_path / "kept", None)
    as_rank(monkeypatch, 0)
    assert cache.fill(model, config, device) == 2
    as_rank(monkeypatch, 1)
    assert cache.fill(model, config, device) == 1
    assert all(file.is_file() for file in cache.files)
    usage = feature_cache.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the maps need .* GB, 1e-06 are free; name another folder"):
        FeatureCache(dataset, tmp_path / "other", None).fill(model, config, device)


def test_a_folder_that_cannot_be_made_is_said(root: Path, tmp_path: Path) -> None:
    config = config_from(frozen(root), "t")
    model, dataset = build_model(config).eval(), open_dataset(config, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/kept: no folder can be made there \(.*\); choose another"):
        FeatureCache(dataset, tmp_path / "file/kept", None).fill(model, config, torch.device("cpu"))


def test_the_bound_is_for_all_that_lies_in_the_folder(root: Path, tmp_path: Path) -> None:
    model, device = build_model(config_from(frozen(root), "t")).eval(), torch.device("cpu")
    dataset = open_dataset(config_from(frozen(root), "t"), "train")
    first = FeatureCache(dataset, tmp_path / "kept/a", None)
    first.fill(model, config_from(frozen(root), "t"), device)
    there = sum(file.stat().st_size for file in first.files)
    config = config_from(frozen(root, cache_gb=1.5 * there / 1e9), "t")
    for folder, to_come in (("kept/b", 0), ("other/a", len(SIZES))):  # of another backbone; of another split
        with pytest.raises(UserError, match=r"GB of maps would come to .* data.cache_gb allows"):
            FeatureCache(dataset, tmp_path / folder, (64, 64)).fill(model, config, device, to_come)
    assert FeatureCache(dataset, tmp_path / "other/a", None).fill(model, config, device) == len(SIZES)


def test_what_half_precision_does_not_hold_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_from(frozen(root), "t")
    model = build_model(config).eval()
    monkeypatch.setattr(model, "maps", lambda images: [torch.full((1, 2, 3, 3), 1e5)])
    with pytest.raises(UserError, match=r"half precision does not hold the maps of .*; set cache_features"):
        FeatureCache(open_dataset(config, "train"), tmp_path, None).fill(model, config, torch.device("cpu"))


def test_a_damaged_file_is_said(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = frozen(root, cache_features=str(tmp_path / "kept"))
    train(config_from(values, "t"), tmp_path / "run")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    capsys.readouterr()
    for content in (b"", b"half", next((tmp_path / "kept").rglob("*.pt")).read_bytes()[:300]):
        for file in (tmp_path / "kept").rglob("*.pt"):
            file.write_bytes(content)
        assert command("train", [str(tmp_path / "c.yaml"), "--out", str(tmp_path / "again")]) == 2
        error = capsys.readouterr().err
        assert ".pt: the maps in it cannot be read; delete this file, and the next start" in error
        assert error.count("\n") == 1


def test_an_interrupted_fill_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from(frozen(root), "t")
    model, dataset = build_model(config).eval(), open_dataset(config, "train")
    cache = FeatureCache(dataset, tmp_path / "kept", None)
    save, calls = torch.save, []

    def torn(content: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(content, path)

    monkeypatch.setattr(feature_cache.torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(model, config, torch.device("cpu"))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [cache.files[0].name]
    assert cache.fill(model, config, torch.device("cpu")) == len(SIZES) - 1
    assert all(len(torch.load(file, weights_only=True)) == 3 for file in cache.files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"name": "timm:test_efficientnet"}}, "cache_features needs backbone.frozen: true"),
        ({"data": {"flip": 0.5}}, "keeps whole images as they are: set data.scale: [1, 1], flip: 0"),
        (
            {"data": {"crop": [48, 64]}},
            "crop 48 × 64; whole images are kept: set data.crop to [64, 64], which holds all 3",
        ),
        (
            {"data": {"cache_gb": 1e-6}},
            "that are there, data.cache_gb allows 1e-06; raise it, delete the folder",
        ),
        (
            {"eval": {"interval": 2, "window": [32, 32]}},
            "eval.window: with data.cache_features images are eval",
        ),
        ({"data": {"cache_mb": 9}}, "data.cache_mb: with data.cache_features no image is read; leave one of"),
        ({"decode_head": {"stride": 5}}, "decode_head.stride 5 is not possible: the backbone has maps at"),
    ],
)
def test_what_cannot_be_kept_is_said(
    changes: dict[str, Any],
    message: str,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = frozen(root, cache_features=str(tmp_path / "kept"))
    values["data"] |= changes.pop("data", {})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values | changes))
    assert command("train", [str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_full_disk_is_said_before_the_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_from(frozen(root), "t")
    model, dataset = build_model(config).eval(), open_dataset(config, "train")
    usage = feature_cache.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage)
    cache = FeatureCache(dataset, tmp_path / "kept", None)
    with pytest.raises(Exception, match=r"the maps need .* GB, 1e-06 are free; name another"):
        cache.fill(model, config, torch.device("cpu"))
