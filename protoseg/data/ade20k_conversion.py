"""Conversion of the one dataset whose published protocol is not its raw form: the full ADE20K.

The others are read as they are released (.mat files, colour codes, ids); see DATASETS.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from protoseg.config import DataConfig
from protoseg.data.datasets import data_root, dataset_spec, find_split, label_ids
from protoseg.data.file_dataset import check_sizes
from protoseg.data.reading.decode import ImageReader, read_ade20k_ids
from protoseg.data.reading.label_ids import LabelIds
from protoseg.data.reading.pairing import check_pairing, pair_files
from protoseg.data.specs import DATASETS
from protoseg.runtime.files import whole_file

SHORTER_SIDE = 512
RAW, CONVERTED = "ade20k_full_847", "ade20k_full_847_tif"
READ = ImageReader()


def prepare_ade20k_full(
    root: Path, *, threads: int = 4, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Writes images_detectron2/ and annotations_detectron2/ beside the release, for `ade20k_full_*_tif`.

    The shorter side becomes 512 at most (images bilinear, labels nearest), labels 16-bit TIFF of class ids
    with 65535 as void: the form on which MaskFormer and its successors report 847 classes. Files that are
    there already stay, so an interrupted run goes on. Returns how many images were written. Raises UserError
    for missing folders and unreadable files.
    """
    data = DataConfig(name=RAW, root=root)
    spec, root = dataset_spec(data), data_root(data)
    ids = label_ids(spec)
    jobs: list[tuple[Path, Path, Path, Path]] = []
    for split in spec.splits:
        pairing = pair_files(root, find_split(data, split), spec.homepage)
        check_pairing(pairing, split)
        target = DATASETS[CONVERTED].splits[split]
        jobs += [
            (image, label, root / target.images / image.name, root / target.labels / f"{image.stem}.tif")
            for image, label in pairing.pairs.values()
        ]
    written = 0
    with ThreadPoolExecutor(threads) as pool:
        for done, wrote in enumerate(pool.map(lambda job: _convert(ids, *job), jobs), 1):
            written += wrote
            if on_progress is not None:
                on_progress(done, len(jobs))
    return written


def _convert(ids: LabelIds, image_file: Path, label_file: Path, new_image: Path, new_label: Path) -> bool:
    if new_image.exists() and new_label.exists():
        return False
    image = Image.fromarray(rearrange(READ(image_file).numpy(), "c h w -> h w c"))
    label = ids.to_classes(read_ade20k_ids(label_file), label_file)
    check_sizes((image.height, image.width), label.shape, image_file, label_file, READ)
    scale = SHORTER_SIDE / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
        label = np.asarray(Image.fromarray(label.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    _write(image, new_image, quality=95)
    _write(Image.fromarray(label.astype(np.uint16)), new_label)
    return True


def _write(image: Image.Image, path: Path, **options: int) -> None:
    with whole_file(path) as part:
        image.save(part, format="TIFF" if path.suffix == ".tif" else "JPEG", **options)
