"""The memories against a replay with Python lists, dicts and integers, slot by slot."""

import random

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor

from protoseg.core.contrast_memory import PixelMemory, memory_slots, region_means
from protoseg.core.draws import class_map, pixel_keys, sort_groups
from protoseg.core.settings import ContrastSettings

SEED, IGNORE = 7, 255
WORD = (1 << 64) - 1


def mix(x: int) -> int:
    """splitmix64's finaliser on Python integers, which do not wrap by themselves."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def key_of(seed: int, step: int, salt: int, index: int, class_id: int, position: int) -> int:
    """The key of one pixel, as documented in pixel_keys: the upper 40 bits of the hash."""
    state = seed
    for value in (salt, step, index, (class_id << 32) + position):
        state = mix((state + (value + 1) * 0x9E3779B97F4A7C15) & WORD)
    return state >> 24


class Oracle:
    """The two memories as lists and dicts, filled pixel by pixel."""

    def __init__(self, num_classes: int, drawn: int, slots: int, regions: int, table: bool) -> None:
        self.drawn, self.slots, self.regions, self.table = drawn, slots, regions, table
        self.pixel: list[dict[int, Tensor]] = [{} for _ in range(num_classes)]
        self.region: list[dict[int, Tensor]] = [{} for _ in range(num_classes)]
        self.written, self.visited = [0] * num_classes, [0] * num_classes

    def enqueue(self, emb: Tensor, labels: Tensor, indices: Tensor, step: int) -> None:
        for image, index in enumerate(indices.tolist()):
            flat, columns = labels[image].flatten().tolist(), emb[image].flatten(1)
            for c in range(len(self.pixel)):
                own = [position for position, label in enumerate(flat) if label == c]
                if not own:
                    continue
                for position in sorted(own, key=lambda p: key_of(SEED, step, 0, index, c, p))[: self.drawn]:
                    if self.slots:
                        self.pixel[c][self.written[c] % self.slots] = columns[:, position]
                        self.written[c] += 1
                mean = torch.stack([columns[:, position] for position in own]).mean(0)
                if self.regions and mean.norm() > 1e-6:
                    slot = index if self.table else self.visited[c] % self.regions
                    self.region[c][slot] = mean / mean.norm()
                    self.visited[c] += 1


def assert_equal(memory: PixelMemory, oracle: Oracle, tolerance: float) -> None:
    for c, (pixel, region) in enumerate(zip(oracle.pixel, oracle.region)):
        assert int(memory.pixel_fill_C[c]) == len(pixel), f"class {c}: filled pixel slots"
        for slot, expected in pixel.items():
            got = memory.pixel_CTD[c, slot].float()
            assert torch.allclose(got, expected, atol=tolerance), f"class {c}, pixel slot {slot}"
        if memory.pixel_slots:
            assert int(memory.pixel_head_C[c]) == oracle.written[c] % memory.pixel_slots, f"class {c}: head"
        assert memory.region_valid_CR[c].nonzero().flatten().tolist() == sorted(region), f"class {c}: regions"
        for slot, expected in region.items():
            got = memory.region_CRD[c, slot].float()
            assert torch.allclose(got, expected, atol=max(tolerance, 1e-6)), f"class {c}, region slot {slot}"


def memory_of(dim: int, num_classes: int, num_images: int, **settings) -> PixelMemory:
    return PixelMemory(dim, num_classes, num_images, ContrastSettings(**settings))


def batch_of(
    images: int, num_classes: int, num_images: int, dim: int, ask: random.Random
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(ask.randrange(1 << 30))
    emb = F.normalize(torch.randn(images, dim, 4, 5, generator=generator), dim=1)
    labels = torch.randint(0, num_classes, (images, 4, 5), generator=generator)
    labels[labels == ask.randrange(num_classes)] = ask.randrange(num_classes)  # a class may be absent
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    if ask.random() < 0.3:
        labels[ask.randrange(images)] = IGNORE  # an image without a label
    return emb, labels, torch.randint(0, num_images, (images,), generator=generator)


def enqueue_(
    memory: PixelMemory, emb: Tensor, labels: Tensor, indices: Tensor, step: int, gather=None
) -> None:
    class_BP = class_map(labels, memory.num_classes, IGNORE)
    key_BP = pixel_keys(class_BP, indices, SEED, step, 0)
    memory.enqueue_(emb.flatten(2).transpose(1, 2), class_BP, key_BP, indices, gather)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "drawn", "slots", "cap_slots", "dtype", "expected_slots"),
    [
        ("both", 3, 7, None, torch.float32, (7, 8)),  # the ring wraps, the regions are a table
        ("both", 2, 50, 9, torch.float32, (5, 4)),  # under a cap: both are rings
        ("pixel", 5, 4, None, torch.float32, (4, 0)),  # one step brings more than the ring holds
        ("region", 3, None, None, torch.float16, (0, 8)),
        ("region", 3, None, 3, torch.float32, (0, 3)),
    ],
)
def test_replay_slot_by_slot(
    world: int, kind: str, drawn: int, slots, cap_slots, dtype, expected_slots
) -> None:
    num_classes, dim, num_images, per_rank = 4, 6, 8, 2
    size = torch.empty(0, dtype=dtype).element_size()
    cap = 256 if cap_slots is None else cap_slots * num_classes * dim * size / 1e6 + 1e-9

    def build() -> PixelMemory:
        return memory_of(
            dim, num_classes, num_images, memory=kind, pixels_per_image=drawn, memory_size=slots, cap_mb=cap,
            storage=str(dtype).removeprefix("torch."),
        )  # fmt: skip

    ranks, memories = Ranks(world), [build() for _ in range(world)]
    first = memories[0]
    assert (first.message is None) == (cap_slots is None)
    assert (first.pixel_slots, first.region_slots) == expected_slots
    oracle = Oracle(num_classes, drawn, first.pixel_slots, first.region_slots, first.region_is_table)
    ask = random.Random(world)
    for step in range(7):
        emb, labels, indices = batch_of(world * per_rank, num_classes, num_images, dim, ask)
        if step == 3:
            indices[-1] = indices[0]  # one image twice in a batch

        def work(rank: int, gather, reduce, batch=(emb, labels, indices), step: int = step) -> None:
            part = slice(rank * per_rank, (rank + 1) * per_rank)
            enqueue_(memories[rank], *(each[part] for each in batch), step, gather if world > 1 else None)

        ranks.run(work)
        oracle.enqueue(emb, labels, indices, step)
        for memory in memories:
            assert_equal(memory, oracle, 0 if dtype == torch.float32 else 1e-3)
            assert (memory.rows_SD[-1] == 0).all(), "the spare row"
            for (name, buffer), (_, same) in zip(memory.named_buffers(), first.named_buffers()):
                assert torch.equal(buffer, same), name
    assert first.pixel_slots == 0 or min(oracle.written) > first.pixel_slots  # every ring has wrapped
    assert first.region_is_table or first.region_slots == 0 or min(oracle.visited) > first.region_slots
    assert len(oracle.pixel[0]) or len(oracle.region[0]), "class 0 is stored"


def test_only_pixels_of_the_class_enter_and_class_0_does() -> None:
    # each pixel carries its class as a one-hot vector
    labels = torch.randint(0, 4, (3, 6, 6), generator=torch.Generator().manual_seed(0))
    labels[0, 0, 0], labels[1, :2] = IGNORE, IGNORE
    emb = F.one_hot(labels.clamp(max=4), 5).permute(0, 3, 1, 2).float()
    memory = memory_of(5, 4, 3, pixels_per_image=6)
    enqueue_(memory, emb, labels, torch.arange(3), 0)
    for c in range(4):
        rows_CSD, valid_CS = memory.everything()
        rows = rows_CSD[c][valid_CS[c]]
        assert len(rows) == sum(min(6, int((labels[b] == c).sum())) for b in range(3)) + 3
        assert (rows.argmax(1) == c).all(), f"class {c} holds pixels of another class"
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)))


def test_draw_is_uniform_and_without_replacement() -> None:
    labels, counts = torch.zeros(1, 5, 8, dtype=torch.int64), torch.zeros(40)
    class_BP = class_map(labels, 2, IGNORE)
    for step in range(3000):
        key_BP = pixel_keys(class_BP, torch.tensor([5]), SEED, step, 0)
        position_GK, valid_GK = sort_groups(key_BP.flatten(), class_BP.flatten(), 2).first(10)
        assert valid_GK.tolist() == [[True] * 10, [False] * 10]
        assert position_GK[0].unique().numel() == 10
        counts[position_GK[0]] += 1
    chi_square = ((counts - 750) ** 2 / 750).sum() / (1 - 10 / 40)  # 10 of 40 without replacement
    assert chi_square < 72.1, float(chi_square)  # 39 degrees of freedom, p = 0.001


def test_keys_depend_on_every_part_and_match_plain_integers() -> None:
    class_BP, indices = torch.tensor([[0, 1, 1], [2, 0, 1]]), torch.tensor([4, 9])
    key_BP = pixel_keys(class_BP, indices, SEED, 11, 0)
    expected = [
        [key_of(SEED, 11, 0, int(indices[b]), int(class_BP[b, p]), p) for p in range(3)] for b in range(2)
    ]
    assert key_BP.tolist() == expected
    assert torch.equal(pixel_keys(class_BP, indices, SEED, torch.tensor(11), 0), key_BP)
    for other in (
        pixel_keys(class_BP, indices, SEED + 1, 11, 0), pixel_keys(class_BP, indices, SEED, 12, 0),
        pixel_keys(class_BP, indices, SEED, 11, 1), pixel_keys(class_BP, indices + 1, SEED, 11, 0),
        pixel_keys(class_BP + 1, indices, SEED, 11, 0),
    ):  # fmt: skip
        assert (other != key_BP).all()


@pytest.mark.parametrize("kind", ["pixel", "region", "both"])
def test_memory_draw_takes_filled_slots_only_evenly_and_once(kind: str) -> None:
    memory = memory_of(4, 3, 12, memory=kind, memory_size=9)
    memory.pixel_fill_C.copy_(torch.tensor([9, 4, 0]) if memory.pixel_slots else torch.zeros(3))
    if memory.region_slots:
        memory.region_valid_CR[0, [1, 5, 11]] = True
        memory.region_valid_CR[1, [0, 2]] = True
    # each slot holds the number of its row, as seen through the two views
    memory.rows_SD.copy_(torch.arange(len(memory.rows_SD))[:, None].expand_as(memory.rows_SD))
    rows_CSD, filled_CS = memory.everything()
    row_CS = rows_CSD[:, :, 0].long()
    most, hits = torch.tensor([5, 3, 2]), torch.zeros(len(memory.rows_SD))
    for step in range(3000):
        drawn_CQ, want = memory.draw(most, 6, SEED, step)
        assert torch.equal(want, torch.minimum(most, filled_CS.sum(1)))
        for c in range(3):
            drawn = drawn_CQ[c, : int(want[c])]
            assert torch.isin(drawn, row_CS[c][filled_CS[c]]).all()
            assert drawn.unique().numel() == len(drawn)
            hits[drawn] += 1
    for c in range(2):
        expected = 3000 * float(want[c]) / int(filled_CS[c].sum())
        got = hits[row_CS[c][filled_CS[c]]]
        assert ((got - expected).abs() < 0.12 * expected).all(), (c, got)


def test_region_mean_that_cancels_is_left_out() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])  # class 0: two opposite vectors
    mean, valid = region_means(rows, sort_groups(torch.tensor([4, 5, 6]), torch.tensor([0, 1, 0]), 3))
    assert valid.tolist() == [False, True, False]
    assert torch.allclose(mean[1], torch.tensor([0.6, 0.8]))


def test_all_ignored_batch_changes_nothing() -> None:
    memory = memory_of(5, 3, 4, memory_size=6)
    ask = random.Random(0)
    enqueue_(memory, *batch_of(2, 3, 4, 5, ask), 0)
    before = {name: buffer.clone() for name, buffer in memory.named_buffers()}
    emb, labels, indices = batch_of(2, 3, 4, 5, ask)
    enqueue_(memory, emb, torch.full_like(labels, IGNORE), indices, 1)
    for name, buffer in memory.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_resume_continues_exactly() -> None:
    batches = [batch_of(2, 3, 6, 5, random.Random(i)) for i in range(6)]
    whole, second = memory_of(5, 3, 6, memory_size=5), memory_of(5, 3, 6, memory_size=5)
    for step, batch in enumerate(batches):
        enqueue_(whole, *batch, step)
        if step == 2:
            second.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
        if step > 2:
            enqueue_(second, *batch, step)
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, second.get_buffer(name)), name


def test_cap() -> None:
    # the paper's sizes: Cityscapes in float32, 2975 images, 19 classes, 256 channels
    pixels, regions, text = memory_slots(19, 256, 2975, ContrastSettings(cap_mb=256))
    assert (pixels, regions) == (13157 - 2975, 2975)
    assert "10182 pixels per class instead of 29750" in text
    assert memory_slots(19, 256, 2975, ContrastSettings(cap_mb=700)) == (29750, 2975, None)
    assert memory_slots(19, 256, 2975, ContrastSettings(cap_mb=256, storage="float16"))[0] > 2 * pixels
    pixels, regions, text = memory_slots(
        150, 256, 20210, ContrastSettings(cap_mb=256)
    )  # ADE20K: a ring of regions
    assert (pixels, regions) == (833, 833)
    assert "the last 833 regions per class instead of one for each of 20210 images" in text
    assert memory_slots(150, 256, 20210, ContrastSettings(memory="region", memory_size=None, cap_mb=256))[
        :2
    ] == (0, 1666)
    assert memory_slots(150, 256, 20210, ContrastSettings(memory="both", memory_size=40, cap_mb=256))[:2] == (
        40,
        1626,
    )
    with pytest.raises(ValueError, match=r"cap_mb=0\.001 is too small"):
        memory_slots(150, 256, 20210, ContrastSettings(cap_mb=0.001))
    with pytest.raises(ValueError, match="pool_size='big' must be a whole number or full"):
        ContrastSettings(pool_size="big")
    with pytest.raises(ValueError, match=r"memory_size=2\.5 must be a whole number or None"):
        ContrastSettings(memory_size=2.5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"memory": "pixels"}, "memory='pixels'"),
        ({"storage": "int8"}, "storage='int8'"),
        ({"pixels_per_image": 0}, "pixels_per_image=0"), ({"memory_size": 0}, "memory_size=0"),
        ({"num_images": 0}, "num_images=0"),
    ],
)  # fmt: skip
def test_bad_values_name_themselves(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        memory_of(**{"dim": 4, "num_classes": 2, "num_images": 3, **change})


def test_index_beyond_the_table_is_an_error() -> None:
    memory = memory_of(5, 3, 4, memory="region")
    emb, labels, _ = batch_of(1, 3, 4, 5, random.Random(0))
    for index in (4, -1):  # the next class's first slot, the one before's last
        with pytest.raises(IndexError):
            enqueue_(memory, emb, torch.ones_like(labels), torch.tensor([index]), 0)
