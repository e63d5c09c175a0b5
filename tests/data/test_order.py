import numpy as np
import pytest
import torch

from protoseg.config import DataConfig
from protoseg.data.digits import Digits
from protoseg.data.loader import train_loader
from protoseg.data.order import count_classes, rare_class_order, uniform_order
from protoseg.runtime.errors import UserError

# 6 samples, 3 classes: class 2 is rare and in sample 5 alone, class 3 is nowhere
COUNTS = np.array([[80, 20, 0, 0]] * 4 + [[100, 0, 0, 0], [60, 30, 10, 0]])


def test_uniform_order_is_a_permutation_that_changes():
    order = uniform_order(50, seed=3)
    assert sorted(order(0)) == sorted(order(1)) == list(range(50))
    assert order(0).tolist() != order(1).tolist()
    assert order(0).tolist() == uniform_order(50, seed=3)(0).tolist() != uniform_order(50, seed=4)(0).tolist()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 5.0])
def test_rare_class_order_follows_the_equation(temperature):
    counts = np.tile(COUNTS, (500, 1))
    share = COUNTS.sum(0) / COUNTS.sum()
    weight = np.array([np.exp((1 - share[c]) / temperature) if share[c] else 0.0 for c in range(4)])
    chance = weight / weight.sum()
    expected = np.zeros(6)
    for c in range(3):
        holders = np.flatnonzero(COUNTS[:, c])
        expected[holders] += chance[c] / len(holders)
    drawn = np.concatenate([rare_class_order(counts, temperature, seed=1)(epoch) for epoch in range(8)]) % 6
    got = np.bincount(drawn, minlength=6) / len(drawn)
    assert len(drawn) == 8 * 3000
    assert np.abs(got - expected).max() < 4 * 0.5 / np.sqrt(len(drawn))


def test_small_temperature_draws_the_rarest_class_alone():
    assert set(rare_class_order(COUNTS, 0.001, seed=0)(0)) == {5}


def test_count_classes_against_a_loop():
    scenes = Digits("val", length=5)
    counts = count_classes(scenes)
    for i in range(5):
        label = scenes.read(i)[1]
        assert counts[i].tolist() == [int((label == c).sum()) for c in range(11)]


class Broken(Digits):
    def label(self, index):
        if index == 1:
            raise UserError("a.png: cannot read this label")
        return super().label(index)


def test_unreadable_labels_are_raised_or_never_drawn():
    with pytest.raises(UserError, match=r"a.png"):
        count_classes(Broken("val", length=3))
    counts = count_classes(Broken("val", length=3), skip_unreadable=True)
    assert counts[1].sum() == 0
    assert 1 not in set(rare_class_order(counts, 0.5, seed=0)(0))


def draw(image, label):
    image = image.clone()
    image[0] = torch.randint(256, image.shape[1:], dtype=torch.uint8)
    return image, label


@pytest.mark.parametrize("start", [0, 3])
def test_rare_class_batches_are_the_same_for_any_workers_and_ranks(start):
    scenes = Digits("train", length=7)
    options = {"batch_size": 4, "rare_class_temperature": 0.05}
    here, apart = DataConfig(workers=0, **options), DataConfig(workers=2, **options)
    run = {"iterations": 6, "seed": 2}
    whole = list(train_loader(scenes, draw, here, **run))[start:]
    for rank in (0, 1):
        part = list(train_loader(scenes, draw, apart, rank=rank, world_size=2, start=start, **run))
        for batch, share in zip(whole, part):
            assert torch.equal(batch.image[2 * rank : 2 * rank + 2], share.image)


def test_a_sample_drawn_twice_in_an_epoch_is_augmented_anew():
    scenes = Digits("train", length=8)
    data = DataConfig(batch_size=8, workers=0, rare_class_temperature=0.002)
    batch = next(train_loader(scenes, draw, data, iterations=1))
    index = batch.index.tolist()
    twice = [i for i in set(index) if index.count(i) > 1]
    assert twice
    for i in twice:
        same = batch.image[batch.index == i]
        assert not torch.equal(same[0], same[1])
        assert torch.equal(same[0][1:], same[1][1:])
