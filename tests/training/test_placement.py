"""Prototypes put on pixels without a gradient, and the command that writes a run of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import CLASSES, PALETTE, write_folder

from protoseg.commands.cli import execute as command
from protoseg.config import config_from, load_config
from protoseg.models.build import build_model
from protoseg.models.checkpoint import load_segmenter
from protoseg.models.decode_heads import build_decode_head
from protoseg.runtime import distributed
from protoseg.runtime.errors import UserError
from protoseg.training.placement import Moments, place_prototypes_, shrinkage_for


def values(root: Path) -> dict[str, Any]:
    return {
        "data": {"name": "folder", "root": str(root), "classes": CLASSES, "palette": PALETTE, "workers": 0},
        "backbone": {"name": "timm:test_efficientnet", "frozen": True},
        "decode_head": {"name": "whiten", "stride": 8},
        "prototypes": {"num_per_class": 2, "logit_scale": 40},
        "train": {"precision": "bf16"},
        "eval": {"window": [32, 32]},
    }


def test_whitening_is_by_the_covariance_within_classes() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4))
    labels = rng.integers(0, 3, 200)
    rows = rng.normal(size=(200, 4)) @ mixing + 5 * rng.normal(size=(3, 4))[labels]
    moments = Moments(5, 4)  # two classes without a pixel
    for part in np.array_split(np.arange(200), 3):
        moments.add_(torch.tensor(rows[part]), torch.tensor(labels[part]))
    within = sum(np.outer(d, d) for x, c in zip(rows, labels) for d in [x - rows[labels == c].mean(0)]) / len(
        rows
    )
    centre, whitening = moments.centre_and_whitening(shrinkage=0)
    torch.testing.assert_close(centre, torch.tensor(rows.mean(0)))
    torch.testing.assert_close(whitening, whitening.T)
    torch.testing.assert_close(whitening @ torch.tensor(within) @ whitening, torch.eye(4).double())
    shrunk = within + 0.3 * np.trace(within) / 4 * np.eye(4)
    _, whitening = moments.centre_and_whitening(shrinkage=0.3)
    torch.testing.assert_close(torch.linalg.inv(whitening @ whitening), torch.tensor(shrunk))


def test_whiten_head_equals_its_equation() -> None:
    torch.manual_seed(0)
    head = build_decode_head("whiten", [2, 3], [4, 8], 3).double()
    head.centre.normal_()
    head.whitening.normal_()
    head.whitening += head.whitening.clone().T
    maps = [torch.randn(2, 2, 4, 6).double(), torch.randn(2, 3, 2, 3).double()]
    side_by_side = torch.cat([maps[0], torch.nn.functional.interpolate(maps[1], (4, 6), mode="bilinear")], 1)
    got = head(maps)[0]
    for i in range(4):
        for j in range(6):
            expected = head.whitening @ (side_by_side[1, :, i, j] - head.centre)
            torch.testing.assert_close(got[1, :, i, j], expected)


def test_few_images_are_trusted_less() -> None:
    assert [shrinkage_for(n) for n in (1, 10, 50, 10_000)] == [1, 1, 0.2, 0.01]


class Pixels:
    """Classes told apart by the first of three channels, which vary much more in the other two."""

    ignore_index = 255

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.labels = torch.tensor(rng.integers(0, 2, (4, 16, 16)))
        channels = np.stack([2 * self.labels.numpy() - 1 + 0.2 * rng.normal(size=(4, 16, 16))], 1)
        noise = rng.normal(size=(4, 2, 16, 16)) * [[[[30]], [[9]]]] + 4
        self.images = torch.tensor(np.concatenate([channels, noise], 1)).float()
        self.labels[:, :2] = 255

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    model: Any = build_model(config_from(values(Path()), "t"), 3).eval()
    model.decode_head = build_decode_head("whiten", [3], [1], 3)
    head = type(model.classifier)
    model.classifier = head(3, 3, 2, logit_scale=40)
    monkeypatch.setattr(model, "maps", lambda images: [images.float()])
    return model


def test_images_without_a_labelled_pixel_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = Pixels(), planted(monkeypatch)
    data.labels[0] = 255
    with pytest.raises(UserError, match=r"no pixel is labelled in the 1 training images .* more by --images"):
        place_prototypes_(model, data, [0], 0.01, 0, torch.device("cpu"))


def test_what_varies_within_classes_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = Pixels(), planted(monkeypatch)
    place_prototypes_(model, data, range(3), 0.01, 0, torch.device("cpu"))
    assert model.classifier.initialized.tolist() == [True, True, False]
    counts = torch.bincount(data.labels[:3].flatten(), minlength=256)[:3]
    assert torch.equal(model.classifier.pixel_counts, counts.float())
    torch.testing.assert_close(model.classifier.prototypes.norm(dim=2)[:2], torch.ones(2, 2))
    image, label = data.read(3)
    with torch.no_grad():
        right = (model(image[None]).argmax(1)[0] == label)[label != 255].float().mean()
        model.decode_head.whitening.copy_(torch.eye(3))
        blind = (model(image[None]).argmax(1)[0] == label)[label != 255].float().mean()
    assert right > 0.95
    assert blind < 0.8


def test_the_command_writes_a_run_that_the_others_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "data")
    config, run = tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(values(tmp_path / "data")))
    assert command("fit", [str(config), "--out", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert (results["images"], results["parameters"]) == (3, 0)
    assert len(results["prototype_health"]["effective_k"]) == 3
    assert results["prototype_health"]["agreement"] == [1, 1, 1]
    assert all(0 < cosine <= 1 for cosine in results["prototype_health"]["own_cosine"])
    model, _, content = load_segmenter(run)
    assert content["classes"] == CLASSES
    assert not torch.equal(model.decode_head.whitening, torch.eye(model.decode_head.dim))
    assert "note: backbone.weights is none: the frozen backbone stays as random" in capsys.readouterr().out
    assert command("evaluate", [str(run), "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["mIoU"] == pytest.approx(results["mIoU"])
    images = str(tmp_path / "data/images/val")
    assert command("predict", [str(run), images, "--out", str(tmp_path / "out")]) == 0
    assert command("vis_prototypes", [str(run), "--images", "3"]) == 0

    assert command("fit", [str(config), "--images", "1", "--out", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one/results.json").read_text())["images"] == 1
    for options, message in (
        (["--out", str(run)], "already holds a run; choose another by --out"),
        (["--images", "4", "--out", str(tmp_path / "x")], "--images: 4 is not possible, there are 3"),
        (
            [
                "data={cache_features: true, scale: [1, 1], flip: 0, photometric: false}",
                "eval.window=null",
                "--out",
                str(tmp_path / "x"),
            ],
            "goes through the images once; leave",
        ),
        (["decode_head.name=mlp", "--out", str(tmp_path / "x")], "fit needs decode_head.name: whiten"),
        (["decode_head.dim=7", "--out", str(tmp_path / "x")], "decode_head.dim 7 is not possible: whiten"),
    ):
        assert command("fit", [str(config), *options]) == 2
        assert message in capsys.readouterr().err
    assert command("train", [str(config), "--out", str(tmp_path / "x")]) == 2
    assert "nothing in this model learns; use the command fit" in capsys.readouterr().err


def test_other_ranks_neither_print_nor_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "data")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values(tmp_path / "data")))
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert command("fit", [str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_the_shipped_config_learns_nothing() -> None:
    config = load_config("configs/camvid_lite0_fit.yaml")
    with torch.device("meta"):
        model = build_model(config)
    assert (model.num_parameters, model.stride, model.decode_head.dim) == (0, 8, 40 + 112 + 320)
