"""Windows, scales, mirroring and banded upsampling against the plain computation."""

import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.config import config_from
from protoseg.core.prototypes import PrototypeHead
from protoseg.evaluation import inference
from protoseg.evaluation.inference import (
    WHOLE,
    InferenceSettings,
    blending_weights,
    most_likely,
    protocol_for,
    rescale,
    segment,
    starts,
    windowed_logits,
)
from protoseg.models.build import build_model
from protoseg.models.official import OfficialPrototypeHead
from protoseg.models.segmenter import Segmenter
from protoseg.runtime.errors import UserError


class Cells(nn.Module):
    """A backbone that sees one cell of 4 × 4 pixels at a time."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.pad(x, (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4))
        return [F.avg_pool2d(x, 4)]


class Project(nn.Module):
    stride = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.conv(maps[0]), []


@pytest.fixture
def local_model() -> Segmenter:
    """Every cell's logits depend on that cell alone, so windows must change nothing."""
    torch.manual_seed(0)
    return Segmenter(Cells(), Project(), PrototypeHead(6, 5, 4, start="random")).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Segmenter:
    torch.manual_seed(0)
    values = {"decode_head": {"dim": 8}, "prototypes": {"num_per_class": 2, "start": "random"}}
    return build_model(config_from(values, "test"), 5).eval()


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(40, 56), (41, 55), (16, 90), (7, 9)])
@pytest.mark.parametrize(
    ("window", "step", "batch"),
    [((16, 16), None, 1), ((16, 20), (8, 4), 3), ((13, 9), (3, 9), 2), ((64, 24), (20, 24), 4)],
)
@torch.inference_mode()
def test_windows_meet_without_a_trace(local_model, size, window, step, batch) -> None:  # type: ignore[no-untyped-def]
    image = picture(*size)
    whole, best = windowed_logits(local_model, image, nearest=True)
    parts, best_of_parts = windowed_logits(
        local_model, image, InferenceSettings(window, step, batch=batch), nearest=True
    )
    assert whole.shape == (5, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert best is not None
    assert best_of_parts is not None
    assert torch.equal(best_of_parts, best)


@pytest.mark.parametrize("window", [(48, 64), (48, 61), (500, 700)])
def test_a_window_that_covers_the_image_is_the_whole_image(model: Segmenter, window: tuple[int, int]) -> None:
    image = picture(48, 61)
    with torch.inference_mode():
        whole, _ = windowed_logits(model, image)
        covered, _ = windowed_logits(model, image, InferenceSettings(window))
    assert torch.equal(covered, whole)
    at_once = segment(model, image).classes
    assert torch.equal(segment(model, image, protocol=InferenceSettings(window)).classes, at_once)


def test_large_images_go_through_in_windows(local_model: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.zeros(3, 100, 100), torch.zeros(3, 3000, 5000)
    assert protocol_for(small, WHOLE) == WHOLE
    assert protocol_for(large, WHOLE).window == inference.LARGE_IMAGE_WINDOW
    assert protocol_for(large, InferenceSettings((512, 512))).window == (512, 512)
    assert protocol_for(torch.zeros(3, 1000, 1000), InferenceSettings(scales=(2.0,))).window is not None
    image = torch.zeros(3, 1100, 1200, dtype=torch.uint8)
    assert protocol_for(image, WHOLE) == WHOLE
    monkeypatch.setattr(inference, "free_bytes", lambda device: 1e9)
    assert protocol_for(image, WHOLE).window == inference.LARGE_IMAGE_WINDOW
    sizes = []
    local_model.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[2:]))
    segment(local_model, image)
    assert set(sizes) == {(1024, 1024)}


@torch.inference_mode()
def test_overlapping_windows_are_weighted_by_the_distance_to_their_rim(model: Segmenter) -> None:
    image = picture(32, 48)
    left, right = (model(image[None, :, :, at])[0] for at in (slice(0, 32), slice(16, 48)))
    ramp = [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 4, 2 / 4, 1 / 4]
    got, _ = windowed_logits(model, image, InferenceSettings((32, 32), (16, 16)))
    for x in range(12):
        shares = [(left[..., x], ramp[x])] if x < 8 else []
        shares += [(right[..., x - 4], ramp[x - 4])] if x >= 4 else []
        expected = sum(logits * weight for logits, weight in shares) / sum(weight for _, weight in shares)
        torch.testing.assert_close(
            got[..., x], expected, rtol=0, atol=1e-5, msg=lambda m, x=x: f"column {x}: {m}"
        )


def test_window_starts_leave_no_gap() -> None:
    for length, window in product(range(1, 30), repeat=2):
        for step in range(1, window + 1):
            places = starts(length, min(window, length), step)
            seen = {cell for start in places for cell in range(start, start + min(window, length))}
            assert seen == set(range(length)), (length, window, step)
            assert len(set(places)) == len(places), (length, window, step)


def test_blending_weights_are_symmetric_and_positive() -> None:
    weights = blending_weights((5, 8))
    assert weights.min() > 0
    assert weights.max() == 1
    assert torch.equal(weights, weights.flip(0))
    assert torch.equal(weights, weights.flip(1))


@pytest.mark.parametrize("views", [1, 3])
def test_bands_give_the_mean_softmax(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(2)
    logits = [3 * torch.randn(6, 4 + i, 5 + i, generator=g) for i in range(views)]
    mean = torch.stack(
        [F.interpolate(x[None], (17, 23), mode="bilinear", align_corners=False)[0].softmax(0) for x in logits]
    ).mean(0)
    monkeypatch.setitem(inference.BAND_ELEMENTS, "cpu", 6 * 23 * 4)  # four rows at a time
    classes, confidence = most_likely(logits, (17, 23), confidence=True)
    assert confidence is not None
    torch.testing.assert_close(confidence, mean.amax(0), rtol=0, atol=1e-6)
    assert torch.equal(classes, mean.argmax(0))
    assert most_likely(logits, (17, 23))[1] is None
    assert torch.equal(most_likely(logits, (17, 23))[0], classes)


def test_large_vocabularies_never_stand_at_full_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    plain = inference.upsampled_rows

    def recorded(*arguments: object) -> Tensor:
        values = plain(*arguments)  # type: ignore[arg-type]
        held.append(values.numel())
        return values

    monkeypatch.setattr(inference, "upsampled_rows", recorded)
    logits = torch.randn(847, 32, 64, generator=torch.Generator().manual_seed(0))
    classes, _ = most_likely([logits], (128, 256))
    assert classes.shape == (128, 256)
    assert max(held) <= inference.BAND_ELEMENTS["cpu"] < 847 * 128 * 256 / 10


def test_memory_of_a_large_vocabulary() -> None:
    """847 classes of 10 prototypes at 512 x 512: one map of logits takes 0.06 GB, at full size 0.9 GB, and
    all similarities 0.6 GB. A process of its own, since only a process has a peak.
    """
    program = """
import resource, torch
from protoseg.config import config_from
from protoseg.evaluation.inference import InferenceSettings, segment
from protoseg.models.build import build_model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
torch.set_num_threads(1)
values = {"decode_head": {"dim": 8}, "prototypes": {"start": "random"}}
model = build_model(config_from(values, "test"), 847).eval()
segment(model, torch.zeros(3, 64, 64, dtype=torch.uint8), confidence=True)
before = peak()
segment(model, torch.zeros(3, 512, 512, dtype=torch.uint8), confidence=True)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", "import sys" + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3, f"{float(done.stdout):.2f} GB"


def test_several_scales_are_averaged(model: Segmenter) -> None:
    image = picture(48, 64)
    scales = (0.5, 1.0, 1.75)
    mean = torch.zeros(5, 48, 64)
    for scale in scales:
        for flip in (False, True):
            seen = rescale(image, scale)
            assert seen.shape[1:] == (round(48 * scale), round(64 * scale))
            with torch.inference_mode():
                logits = model((seen.flip(-1) if flip else seen)[None])
            full = F.interpolate(logits, (48, 64), mode="bilinear", align_corners=False)[0].softmax(0)
            mean += (full.flip(-1) if flip else full) / 6
    got = segment(model, image, protocol=InferenceSettings(scales=scales, flip=True), confidence=True)
    assert got.confidence is not None
    torch.testing.assert_close(got.confidence, mean.amax(0), rtol=0, atol=1e-5)
    best_two = mean.topk(2, 0).values
    clear = best_two[0] - best_two[1] > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(got.classes[clear], mean.argmax(0)[clear])


@pytest.mark.parametrize("window", [None, (32, 32)])
def test_flip_averaging_does_not_know_left_from_right(
    model: Segmenter, window: tuple[int, int] | None
) -> None:
    image, protocol = picture(48, 64), InferenceSettings(window, window and (16, 16), flip=True)
    once = segment(model, image, protocol=protocol, confidence=True)
    mirrored = segment(model, image.flip(-1), protocol=protocol, confidence=True)
    assert once.confidence is not None
    assert mirrored.confidence is not None
    torch.testing.assert_close(mirrored.confidence.flip(-1), once.confidence, rtol=0, atol=1e-5)
    assert (mirrored.classes.flip(-1) == once.classes).float().mean() > 0.999
    plain = segment(model, image, protocol=InferenceSettings(window, window and (16, 16)), confidence=True)
    assert plain.confidence is not None
    assert not torch.allclose(plain.confidence, once.confidence, atol=1e-3), "the model sees mirroring"


@pytest.mark.parametrize("official", [False, True])
def test_prototype_map_is_the_nearest_of_the_predicted_class(local_model: Segmenter, official: bool) -> None:
    if official:  # its prototypes are not compared with the decode head's map but with a projection of it
        local_model.classifier = OfficialPrototypeHead(6, 5, 4, start="random")
    image = picture(22, 30)
    got = segment(local_model, image, prototypes=True)
    head = local_model.prototypes
    assert got.prototypes is not None
    assert head is not None
    with torch.inference_mode():
        features = local_model.embed(image[None])
        embedding = F.normalize(features[0], dim=0)
        if official:
            embedding = head.unit_rows(features).t().view_as(features[0])
    wrong = []
    for y, x in product(range(22), range(30)):
        cell = embedding[:, (2 * y + 1) * 6 // 44, (2 * x + 1) * 8 // 60]
        expected = int((head.prototypes[got.classes[y, x]] @ cell).argmax())
        if expected != got.prototypes[y, x]:
            wrong.append((y, x, expected, int(got.prototypes[y, x])))
    assert not wrong, f"(row, column, expected, got): {wrong[:3]}"
    assert len(got.prototypes.unique()) > 1


def test_prediction_at_the_labels_size(model: Segmenter) -> None:
    assert segment(model, picture(48, 64), (24, 30)).classes.shape == (24, 30)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"scales": (float("nan"),)}, "scales"),
        ({"window": (0, 5)}, "window"),
        ({"window": (8, 8), "step": (8, 9)}, "gaps"),
        ({"step": (8, 8)}, "give the window"),
    ],
)
def test_protocols_that_make_no_sense(values: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        InferenceSettings(**values)


def test_prototype_map_is_as_exact_under_autocast_as_the_head() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(64, 2, 10, start="random")
    head.prototypes.copy_(F.normalize(torch.ones(64) + 0.5 * torch.randn(2, 10, 64), dim=2))  # alike
    embedding = torch.ones(1, 64, 20, 20) + 0.5 * torch.randn(1, 64, 20, 20)
    expected = inference.nearest_prototypes(head, embedding)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inference.nearest_prototypes(head, embedding), expected)
