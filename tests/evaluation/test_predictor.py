"""`protoseg.load`: one line to use a model, from wherever it lies."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, PALETTE, tiny_config, write_checkpoint, write_folder

import protoseg
from protoseg.commands.cli import execute
from protoseg.evaluation.inference import InferenceSettings, segment
from protoseg.evaluation.nearest_patches import save_patches
from protoseg.evaluation.predictor import Predictor, Segmentation
from protoseg.runtime.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint, and data/ with three images of three sizes."""
    root = tmp_path_factory.mktemp("run")
    write_folder(root / "data")
    write_checkpoint(root / "last.pt", tiny_config(root / "data"))
    return root


@pytest.fixture(scope="module")
def seg(run: Path) -> Predictor:
    return protoseg.load(run, device="cpu")


def test_every_kind_of_image_gives_the_same(run: Path, seg: Predictor) -> None:
    path = run / "data/images/val/0.png"
    tensor = protoseg.read_image(path)
    expected = segment(seg.model, tensor, confidence=True, prototypes=True)
    array = tensor.permute(1, 2, 0).numpy()
    for image in (path, str(path), Image.open(path), array, tensor):
        out = seg.predict(image)
        assert np.array_equal(out.labels, expected.classes.numpy())
        assert np.array_equal(out.prototypes, expected.prototypes.numpy())
        assert np.allclose(out.confidence, expected.confidence.numpy())
        assert out.labels.shape == out.distance.shape == out.image.shape[:2] == (40, 56)
    grey = seg.predict(array[..., 0])
    assert np.array_equal(grey.labels, seg.predict(array[..., :1].repeat(3, 2)).labels)


def test_a_list_is_batched_and_keeps_its_order(run: Path, seg: Predictor) -> None:
    paths = [run / f"data/images/val/{i}.png" for i in (2, 0, 1, 0)]
    seen: list[tuple[int, ...]] = []
    hook = seg.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    together = seg.predict(paths)
    hook.remove()
    assert (2, 3, 40, 56) in seen, "two images of one size go through together"
    for path, out in zip(paths, together):
        alone = seg.predict(path)
        assert (out.labels == alone.labels).mean() > 0.999
        assert np.allclose(out.distance, alone.distance, atol=1e-5)


def test_distance_is_that_of_the_nearest_prototype(seg: Predictor) -> None:
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    out = seg.predict(image)
    with torch.inference_mode():
        _, distance = seg.model.prototypes(seg.model.embed(image[None]), return_distance=True)
        expected = torch.nn.functional.interpolate(distance[None], (64, 64), mode="bilinear")[0, 0]
    assert np.allclose(out.distance, expected.numpy(), atol=1e-5)


def test_the_protocol_is_that_of_the_command(seg: Predictor) -> None:
    image = torch.randint(0, 256, (3, 96, 80), dtype=torch.uint8)
    protocol = InferenceSettings(window=(64, 64), scales=(1.0, 0.5), flip=True)
    expected = segment(seg.model, image, protocol=protocol)
    assert np.array_equal(seg.predict(image, protocol).labels, expected.classes.numpy())


def test_a_result_shows_itself(seg: Predictor) -> None:
    labels = np.array([[0, 0, 1, 0]])
    image = np.full((1, 4, 3), 100, np.uint8)
    out = Segmentation(image, labels, np.ones((1, 4), np.float32), None, None, CLASSES, PALETTE)
    assert repr(out) == "Segmentation(4×1: road 75.0%, car 25.0%)"
    assert np.asarray(out.overlay())[0, 2].tolist() == [50, 50, 121]  # half (100, 100, 100), half (0, 0, 142)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(out._repr_png_()))), np.asarray(out.overlay()))
    assert repr(seg) == "Predictor(timm:test_efficientnet, 3 prototypes per class, 3 classes)"


def test_explain_names_the_prototype_and_its_patches(run: Path, seg: Predictor) -> None:
    image = protoseg.read_image(run / "data/images/val/0.png")
    seg = copy.deepcopy(seg)
    seg.model.prototypes.pixel_counts.copy_(torch.tensor([9.0, 99, 999]))  # the cosine alone does not decide
    out = seg.predict(image)
    y, x = 21, 33
    c, k = int(out.labels[y, x]), int(out.prototypes[y, x])
    with torch.inference_mode():
        cell = seg.model.embed(image[None])[0, :, y // seg.model.stride, x // seg.model.stride]
    cosine_CK = seg.model.prototypes.prototypes @ (cell / cell.norm())
    blue = np.zeros((9, 9, 3), np.uint8) + np.array([0, 0, 200], np.uint8)
    save_patches(run / "prototypes/patches.npz", {c * 3 + k: [("a/b", 0.9, blue), ("c", 0.8, blue)]})
    why = seg.explain(image, y, x)
    assert (why.class_name, why.prototype) == (CLASSES[c], k)
    assert why.cosine == pytest.approx(cosine_CK[c, k].item(), abs=1e-5)
    logit_C = seg.model.prototypes.settings.logit_scale * cosine_CK.amax(1)
    logit_C += (torch.tensor([10, 100, 1000]) / 1110).log()
    assert why.logit == pytest.approx(logit_C[c].item(), abs=1e-4)
    assert [name for name, *_ in why.others] == [
        CLASSES[i] for i in logit_C.argsort(descending=True).tolist() if i != c
    ]
    assert [other.logit for other in why.others] == pytest.approx(
        sorted((logit_C[i].item() for i in range(3) if i != c), reverse=True), abs=1e-4
    )
    assert [(patch.image, patch.cosine) for patch in why.patches] == [("a/b", 0.9), ("c", 0.8)]
    red, green, level = np.asarray(why.patches[0].picture).reshape(-1, 3).mean(0)
    assert (red < 5, green < 5, abs(level - 200) < 5) == (True, True, True)
    (run / "prototypes/patches.npz").unlink()
    assert seg.explain(image, y, x).patches == []


def test_vis_prototypes_keeps_the_patches(run: Path, seg: Predictor) -> None:
    assert execute("vis_prototypes", [str(run), "--samples", "1"]) == 0
    image = protoseg.read_image(run / "data/images/train/0.png")
    patches = seg.explain(image, 20, 20).patches
    assert patches
    assert {patch.image for patch in patches} <= {"0", "1", "2"}
    assert [p.cosine for p in patches] == sorted((p.cosine for p in patches), reverse=True)


def test_a_learned_classifier_has_no_prototypes_to_explain(run: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "cosine.pt", tiny_config(run / "data", classifier="cosine"))
    seg = protoseg.load(tmp_path / "cosine.pt", device="cpu")
    out = seg.predict(run / "data/images/val/1.png")
    assert out.labels.shape == (33, 47)
    assert out.prototypes is None
    assert out.distance is None
    with pytest.raises(UserError, match=r"^explain: this model has a learned classifier and no proto"):
        seg.explain(run / "data/images/val/1.png", 0, 0)


def test_save_and_load_again(run: Path, seg: Predictor, tmp_path: Path) -> None:
    (run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(run / "samples/x_000020.png")
    results = {"mIoU": 0.4567, "IoU": {"road": 0.5, "car": 0.25, "tree": None}}
    (run / "results.json").write_text(json.dumps(results))
    seg.save_pretrained(tmp_path / "shared")
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
        "samples",
    }
    image = run / "data/images/val/0.png"
    for again in (protoseg.load(tmp_path / "shared", "cpu"), Predictor.from_pretrained(tmp_path / "shared")):
        assert again.classes == CLASSES
        assert np.array_equal(again.predict(image).labels, seg.predict(image).labels)
    card = (tmp_path / "shared/README.md").read_text()
    for part in (
        "| mIoU | 45.7 |",
        "| car | 25.0 |",
        "| tree | – |",
        "3 prototypes per class",
        "started at random",
    ):
        assert part in card, card
    assert "![x_000020.png](samples/x_000020.png)" in card
    # The commands take such a folder in place of a run.
    out = tmp_path / "out"
    assert execute("predict", [str(tmp_path / "shared"), str(image), "--out", str(out)]) == 0
    assert np.array_equal(np.asarray(Image.open(out / "labels/0.png")), seg.predict(image).labels)


def test_an_edited_model_is_saved_with_its_classes(run: Path, tmp_path: Path) -> None:
    seg = protoseg.load(run, device="cpu")
    seg.model.prototypes.remove_class(1)
    del seg.classes[1], seg.palette[1]
    nothing_known = {"mIoU": None, "IoU": dict.fromkeys(CLASSES)}  # labels that are ignored everywhere
    (run / "results.json").write_text(json.dumps(nothing_known))
    seg.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "as the run measured. Classes have been edited since." in card
    assert "| mIoU | – |" in card
    again = protoseg.load(tmp_path, device="cpu")
    assert again.classes == ["road", "tree"]
    image = run / "data/images/val/0.png"
    assert np.array_equal(again.predict(image).labels, seg.predict(image).labels)


def test_what_is_wrong_with_an_image_is_said(seg: Predictor) -> None:
    for image, message in (
        (np.zeros((4, 4, 3)), r"array must be \(H, W, 3\).*got \(4, 4, 3\) float64; values between 0 and 1"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\) uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"got \(4, 4, 4\) uint8"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"tensor must be .*several images are a list"),
        (5, "expected a path, a PIL image, an array or a tensor, got int"),
    ):
        with pytest.raises(UserError, match=message):
            seg.predict(image)
    with pytest.raises(UserError, match=r"^explain: pixel \(9, 2\) is outside the image, 8 × 8$"):
        seg.explain(np.zeros((8, 8, 3), np.uint8), 9, 2)


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no-such-run: no run folder, checkpoint or saved model"):
        protoseg.load("no-such-run")
    with pytest.raises(UserError, match=r"neither last\.pt nor model\.safetensors in this folder"):
        protoseg.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(UserError, match=r"config\.json: no such checkpoint"):
        protoseg.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.safetensors: the checkpoint is truncated or damaged"):
        protoseg.load(tmp_path)
