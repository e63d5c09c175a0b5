"""Images per second and core: what decoding and augmentation cost, at CamVid's size and at 2048 x 1024.

python tools/benchmark.py data [--camvid data/camvid] [--seconds 3] [--workers 2]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from protoseg.config import DataConfig
from protoseg.data.datasets import build_dataset
from protoseg.data.file_dataset import Dataset, FileDataset
from protoseg.data.in_memory import InMemoryDataset
from protoseg.data.loader import train_loader
from protoseg.data.reading.decode import read_image, read_label_ids
from protoseg.data.transforms import TrainTransform

COUNT = 8  # different files of 2048 x 1024


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py data", description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, default=Path("data/camvid"))
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--workers", type=int, default=2, help="of the loader, in the last two columns")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{'':22}{'images/s and core':^37}{'share of':>10}{f'loader, {options.workers} workers':>26}")
    print(
        f"{'':22}{'image':>9}{'label':>9}{'augment':>10}{'all':>9}{'decoding':>10}{'files':>13}{'memory':>13}"
    )
    if options.camvid.is_dir():
        camvid = build_dataset("camvid", root=options.camvid, split="train")
        measure("camvid 480 x 360", camvid, (360, 480), options)
    else:
        print(f"no CamVid at {options.camvid}: --camvid FOLDER")
    for ending in (".jpg", ".png"):
        with tempfile.TemporaryDirectory() as folder:
            large = street(Path(folder), ending)
            measure(f"2048 x 1024 {ending[1:]}", large, (512, 1024), options)


def measure(name: str, dataset: Dataset, crop: tuple[int, int], options: argparse.Namespace) -> None:
    """One line of the table: rates of the parts on one core, then of the loader."""
    assert isinstance(dataset, FileDataset)
    transform = TrainTransform(DataConfig(crop=crop), dataset.ignore_index)
    samples = [dataset.read(i) for i in range(min(len(dataset), COUNT))]
    files = dataset.files
    image = rate(lambda i: read_image(files[i % len(files)][0]), options.seconds)
    label = rate(lambda i: read_label_ids(files[i % len(files)][1]), options.seconds)
    augment = rate(lambda i: transform(*samples[i % len(samples)]), options.seconds)
    whole = rate(lambda i: transform(*dataset.read(i % len(files))), options.seconds)
    share = whole * (1 / image + 1 / label)
    loaded = loader_rate(dataset, transform, options)
    kept = loader_rate(InMemoryDataset(dataset), transform, options)
    print(
        f"{name:22}{image:9.1f}{label:9.1f}{augment:10.1f}{whole:9.1f}{share:10.0%}{loaded:13.1f}{kept:13.1f}",
        flush=True,
    )


def rate(
    call: Callable[[int], object], seconds: float, clock: Callable[[], float] = time.thread_time
) -> float:
    """Calls per second after one to warm up; by default by the time this thread has the core."""
    call(0)
    count, start = 0, clock()
    while clock() - start < seconds:
        call(count)
        count += 1
    return count / (clock() - start)


def loader_rate(dataset: Dataset, transform: TrainTransform, options: argparse.Namespace) -> float:
    """Images per second out of the training loader, without the start of its workers."""
    batches = train_loader(
        dataset, transform, DataConfig(batch_size=4, workers=options.workers), iterations=1 << 30
    )
    for _ in range(4 * options.workers + 1):  # what was fetched ahead during the start
        next(batches)
    return 4 * rate(lambda _: next(batches), 2 * options.seconds, time.perf_counter)


def street(folder: Path, ending: str) -> Dataset:
    """Photographs of 2048 x 1024 as JPEG (quality 90) or PNG, with PNG labels of 19 classes in blocks."""
    photos = load_sample_images().images
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part / "train").mkdir(parents=True)
    for i in range(COUNT):
        photo = Image.fromarray(photos[i % 2]).resize((2048, 1366), Image.Resampling.BICUBIC)
        top = int(rng.integers(1366 - 1024))
        grain = rng.normal(0, 4, (1024, 2048, 3))  # enlarged photographs would compress too well
        pixels = np.asarray(photo.crop((0, top, 2048, top + 1024))) + grain
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"images/train/{i}{ending}", quality=90)  # PNG has no use for it
        label = rng.integers(0, 19, (16, 32)).repeat(64, 0).repeat(64, 1).astype(np.uint8)
        Image.fromarray(label).save(folder / f"labels/train/{i}.png")
    names = [f"class {i}" for i in range(19)]
    return build_dataset("folder", root=folder, split="train", classes=names)
