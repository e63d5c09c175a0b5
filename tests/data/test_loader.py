import multiprocessing
import os
import signal

import pytest
import torch

from protoseg.config import DataConfig
from protoseg.data.digits import Digits
from protoseg.data.in_memory import InMemoryDataset, in_memory
from protoseg.data.loader import EvalLoader, train_loader
from protoseg.data.transforms import TrainTransform
from protoseg.runtime.errors import UserError

LENGTH = 10


class Numbers:
    """Sample i is an image full of i; the samples in `bad` cannot be read."""

    classes, palette, ignore_index = ("a", "b"), ((0, 0, 0), (1, 1, 1)), 255

    def __init__(self, length=LENGTH, bad=()):
        self.length, self.bad = length, bad

    def __len__(self):
        return self.length

    def name(self, index):
        return f"n{index}"

    def read(self, index):
        if index in self.bad:
            raise UserError(f"dir/n{index}.png: cannot read this image (truncated); replace or remove it")
        image = torch.full((3, 8 + index, 8), index, dtype=torch.uint8)
        return image, torch.zeros(8 + index, 8, dtype=torch.uint8)


def noisy(image, label):
    """A transform whose result shows the random numbers it drew."""
    image = image[:, :8].clone()
    image[0] = torch.randint(256, (8, 8), dtype=torch.uint8)
    return image, label[:8]


def batches(dataset=None, transform=noisy, **given):
    data = {"batch_size": 4, "workers": 0}
    data |= {key: given.pop(key) for key in set(given) & set(DataConfig.model_fields)}
    run = {"iterations": 8, "seed": 5} | given
    return list(train_loader(dataset or Numbers(), transform, DataConfig(**data), **run))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        for x, y in zip(a, b):
            assert torch.equal(x, y)


def test_stream_is_one_permutation_per_epoch_end_to_end():
    stream = torch.cat([batch.index for batch in batches(iterations=10)]).tolist()
    epochs = [stream[i : i + LENGTH] for i in range(0, 40, LENGTH)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(LENGTH))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = torch.cat([batch.index for batch in batches(iterations=10, seed=6)]).tolist()
    assert other != stream


def test_batch_shapes_and_dtypes():
    batch = batches(iterations=1)[0]
    assert batch.image.shape == (4, 3, 8, 8)
    assert batch.label.shape == (4, 8, 8)
    assert (batch.image.dtype, batch.label.dtype, batch.index.dtype) == (
        torch.uint8,
        torch.uint8,
        torch.int64,
    )
    assert batch.image[:, 1, 0, 0].tolist() == batch.index.tolist()


@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_workers_changes_nothing(workers):
    assert_same(batches(), batches(workers=workers))


def test_real_augmentation_is_the_same_with_workers():
    scenes = Digits("train", length=6)
    transform = TrainTransform(DataConfig(crop=(40, 40)), ignore_index=255)
    assert_same(batches(scenes, transform), batches(scenes, transform, workers=2))


@pytest.mark.parametrize("start", [1, 3, 7, 8])
def test_resumed_run_goes_on_with_the_same_batches(start):
    assert_same(batches(workers=2)[start:], batches(start=start, workers=2))


def test_ranks_share_each_batch_in_order():
    whole = batches()
    for world_size in (2, 4):
        ranks = [batches(rank=r, world_size=world_size) for r in range(world_size)]
        for i, batch in enumerate(whole):
            for whole_part, parts in zip(batch, zip(*(rank[i] for rank in ranks))):
                assert torch.equal(whole_part, torch.cat(parts))


def test_augmentation_changes_from_epoch_to_epoch():
    seen = {}
    for batch in batches(iterations=10):
        for image, index in zip(batch.image, batch.index.tolist()):
            assert not any(torch.equal(image, before) for before in seen.get(index, []))
            seen.setdefault(index, []).append(image)


def test_global_rng_is_left_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    batches()
    batches(workers=1)
    list(EvalLoader(Numbers(), workers=0))
    assert torch.equal(state, torch.get_rng_state())


def test_batch_larger_than_the_dataset():
    assert sorted(batches(Numbers(3), batch_size=6, iterations=1)[0].index.tolist()) == [0, 0, 1, 1, 2, 2]


def test_batch_size_must_divide_by_the_ranks():
    with pytest.raises(UserError, match=r"data.batch_size: 4 does not divide by 3 processes; use 3"):
        batches(iterations=1, world_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_user_error_comes_out_of_the_worker_as_one_line(workers):
    with pytest.raises(UserError) as error:
        batches(Numbers(bad=(3,)), iterations=9, workers=workers)
    assert str(error.value) == "dir/n3.png: cannot read this image (truncated); replace or remove it"
    with pytest.raises(UserError, match=r"^dir/n3.png"):
        list(EvalLoader(Numbers(bad=(3,)), workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_takes_the_next_sample_and_warns_once(workers):
    with pytest.warns(UserWarning, match=r"skipped: dir/n3.png") as caught:
        got = batches(Numbers(bad=(3, 4)), on_error="skip", iterations=10, workers=workers)
    texts = [str(w.message) for w in caught]
    assert sorted(t.split(":")[1].strip() for t in texts) == ["dir/n3.png", "dir/n4.png"]
    good = batches(iterations=10)
    for batch, before in zip(got, good):
        assert batch.index.tolist() == [5 if i in (3, 4) else i for i in before.index.tolist()]
        assert batch.image[:, 1, 0, 0].tolist() == batch.index.tolist()


def test_skip_gives_up_when_nothing_can_be_read():
    with pytest.raises(UserError, match="cannot read this image"):
        batches(Numbers(bad=range(LENGTH)), on_error="skip")
    with pytest.raises(ValueError, match=r"'raise' or 'skip'.*'pass'"):
        batches(on_error="pass")


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_gives_every_sample_once_over_ranks(workers):
    seen = []
    for rank in range(3):
        loader = EvalLoader(Numbers(), rank=rank, world_size=3, workers=workers)
        assert len(loader) == len(range(rank, LENGTH, 3))
        for _ in range(2):  # the loader can be used again
            once = [
                (index, name, tuple(image.shape), tuple(label.shape)) for image, label, index, name in loader
            ]
            assert [o[0] for o in once] == list(range(rank, LENGTH, 3))
        seen += once
    assert sorted(seen) == [(i, f"n{i}", (3, 8 + i, 8), (8 + i, 8)) for i in range(LENGTH)]


def test_workers_live_through_ctrl_c():
    stream = train_loader(Numbers(), noisy, DataConfig(batch_size=2, workers=2), iterations=400)
    next(stream), next(stream)  # one from each worker: both have started
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        os.kill(child.pid, signal.SIGINT)
    assert sum(1 for _ in stream) == 398


MB = sum(4 * (8 + i) * 8 for i in range(LENGTH)) / 1e6  # image and label


class Counted(Numbers):
    """Says how often it was asked."""

    def __init__(self, **given):
        super().__init__(**given)
        self.reads = 0

    def read(self, index):
        self.reads += 1
        return super().read(index)

    def label(self, index):
        return self.read(index)[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_and_no_file_is_read_again(workers):
    dataset = Counted()
    kept, message = in_memory(dataset, 1)
    read = dataset.reads
    assert isinstance(kept, InMemoryDataset)
    assert message == "data.cache_mb: 10 decoded images in memory, 0.0 MB"
    assert_same(batches(kept, workers=workers), batches(Numbers()))
    assert torch.equal(kept.label(3), Numbers().read(3)[1])
    assert dataset.reads == read
    assert (len(kept), kept.name(2), kept.classes, kept.ignore_index) == (LENGTH, "n2", ("a", "b"), 255)


def test_what_does_not_fit_is_read_from_files():
    dataset = Counted()
    assert in_memory(dataset, MB * 1.01)[0] is not dataset
    same, message = in_memory(dataset, MB * 0.99)
    assert same is dataset
    assert "10 decoded images would take about 0.0 MB, 0.00396 are allowed; they are read from" in message


@pytest.mark.parametrize("bad", [(3,), range(LENGTH)])
def test_the_loader_deals_with_what_cannot_be_read(bad):
    kept, _ = in_memory(Numbers(bad=bad), 1)
    with pytest.raises(UserError, match=r"n\d\.png: cannot read this image"):
        batches(kept)
    if len(bad) == 1:
        with pytest.warns(UserWarning, match="skipped: dir/n3.png"):
            skipped = batches(kept, on_error="skip")
        with pytest.warns(UserWarning, match="skipped: dir/n3.png"):
            assert_same(skipped, batches(Numbers(bad=bad), on_error="skip"))
