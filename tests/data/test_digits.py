import hashlib

import numpy as np
import pytest
import torch

from protoseg.config import DataConfig
from protoseg.data import digits
from protoseg.data.datasets import build_dataset, dataset_spec
from protoseg.data.digits import BACKGROUND, IGNORE_INDEX, Digits
from protoseg.runtime.errors import UserError


def test_scene_is_a_function_of_seed_split_and_index():
    first, again = Digits("train").read(7), Digits("train").read(7)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in (Digits("train").read(8), Digits("val").read(7), Digits("train", seed=1).read(7)):
        assert not torch.equal(first[0], other[0])


def test_reading_in_another_order_changes_nothing_and_leaves_the_global_rng_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    scenes = Digits("val", length=4)
    forward = [scenes.read(i)[0] for i in range(4)]
    backward = [scenes.read(i)[0] for i in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward))
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("size", [(72, 72), (72, 110), (44, 50), (500, 700)])
def test_scene_has_the_promised_shapes_and_ids(size):
    image, label = Digits("train", size=size, length=3).read(2)
    assert image.shape == (3, *size)
    assert label.shape == size
    assert image.dtype == label.dtype == torch.uint8
    found = set(label.unique().tolist())
    assert found <= {*range(10), BACKGROUND, IGNORE_INDEX}
    assert {BACKGROUND, IGNORE_INDEX} < found  # and at least one digit


def test_every_class_is_common_and_digits_are_bright():
    scenes = Digits("val", length=100)
    read = [scenes.read(i) for i in range(len(scenes))]
    labels = torch.stack([label for _, label in read])
    images = torch.stack([image for image, _ in read]).float().amax(1)  # value of HSV
    share = torch.bincount(labels.flatten(), minlength=256) / labels.numel()
    assert (share[:10] > 0.01).all()
    assert 0.01 < share[IGNORE_INDEX] < 0.12
    assert images[labels < 10].mean() > images[labels == BACKGROUND].mean() + 100


def test_no_handwriting_is_in_both_splits():
    def prints(split: str) -> list[str]:
        return [hashlib.sha1(glyph.tobytes()).hexdigest() for glyph in digits._glyphs(split)[0]]

    train, val = prints("train"), prints("val")
    assert not set(train) & set(val)
    assert len(train) + len(val) == 1797
    assert np.bincount(digits._glyphs("val")[1]).min() >= 34  # every digit, every fifth sample


def test_rim_lies_between_digit_and_background():
    _, label = Digits("train", length=5).read(0)
    digit, ground = label < 10, label == BACKGROUND
    right = (digit[:, :-1] & ground[:, 1:]).sum() + (ground[:, :-1] & digit[:, 1:]).sum()
    edges = (digit[:, :-1] & (label[:, 1:] == IGNORE_INDEX)).sum() + (
        (label[:, :-1] == IGNORE_INDEX) & digit[:, 1:]
    ).sum()
    assert edges > 5 * right


def test_wrong_split_size_and_index():
    with pytest.raises(UserError, match=r"no split 'test'.*train, val"):
        Digits("test")
    with pytest.raises(UserError, match="too small"):
        Digits("train", size=(40, 72))
    with pytest.raises(IndexError):
        Digits("val", length=3).read(3)


def test_some_digits_alone_with_ids_in_the_order_given():
    chosen = ("background", "7", "3")
    scenes = Digits("train", classes=chosen, length=6)
    labels = torch.stack([scenes.read(i)[1] for i in range(6)])
    assert set(labels.unique().tolist()) == {0, 1, 2, IGNORE_INDEX}
    assert scenes.palette == tuple(digits.PALETTE[i] for i in (10, 7, 3))
    swapped = Digits("train", classes=("background", "3", "7"), length=6)
    expected = torch.tensor([0, 2, 1, *[IGNORE_INDEX] * 253], dtype=torch.uint8)[labels.long()]
    assert torch.equal(torch.stack([swapped.read(i)[1] for i in range(6)]), expected)
    spec = dataset_spec(DataConfig(name="digits", classes=chosen))
    assert (spec.classes, spec.colours) == (chosen, scenes.palette)
    assert build_dataset("digits", root=None, split="val", classes=chosen).classes == chosen


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["0", "ten", "background"], r"data.classes: digits has 0, 1.*got 0, ten, background"),
        (["0", "0", "background"], "each once"),
        (["0", "1"], "needs 'background' and at least one digit"),
        (["background"], "needs 'background' and at least one digit"),
    ],
)
def test_wrong_digits_are_named(classes, message):
    with pytest.raises(UserError, match=message):
        dataset_spec(DataConfig(name="digits", classes=classes))
