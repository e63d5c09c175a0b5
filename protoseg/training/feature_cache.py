"""A frozen backbone's maps of whole images on disk: computed once, read in every step and evaluation.

One file per image, half precision, under a name made of the backbone's weights and of the image; so runs that
share a backbone and images share the files, and whatever changes gets new ones. A file is there whole or not
at all: an interrupted run goes on where it was.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.config import Config
from protoseg.data.file_dataset import Dataset, DatasetView
from protoseg.models.segmenter import Segmenter, autocast
from protoseg.runtime import distributed
from protoseg.runtime.console import with_bar
from protoseg.runtime.errors import UserError
from protoseg.runtime.files import make_folder, whole_file

DEFAULT_FOLDER = Path("runs/features")


class FeatureCache(DatasetView):
    """A dataset whose images are their own numbers; `maps` gives what the backbone makes of them.

    dataset: what is read; its labels are handed on. size: (height, width) to which images and labels are
    padded, as training does; None leaves them as they are. Errors: UserError for an image larger than `size`.
    """

    def __init__(self, dataset: Dataset, folder: Path, size: tuple[int, int] | None) -> None:
        super().__init__(dataset)
        self.size = size
        padded = "" if size is None else f" in {size}"
        names = [hashlib.sha256(f"{dataset.stamp(i)}{padded}".encode()).hexdigest() for i in range(len(self))]
        self.files = [folder / f"{name[:32]}.pt" for name in names]

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The number of the sample, for `maps`, and its label."""
        return torch.tensor(index), self.label(index)

    def label(self, index: int) -> Tensor:
        label = self.dataset.label(index)
        return label if self.size is None else padded(label, self.size, self.ignore_index)

    def maps(self, indices: Tensor, device: torch.device) -> list[Tensor]:
        """The backbone's maps of these samples (B, c_i, h_i, w_i), half precision."""
        read = [torch.load(self.files[i], weights_only=True) for i in indices.flatten().tolist()]
        return [torch.stack(each).to(device, non_blocking=True) for each in zip(*read)]

    def fill(self, model: Segmenter, config: Config, device: torch.device) -> int:
        """Compute what is missing, every rank its share; returns how many images that were on all ranks.

        It waits for the other ranks: then everything is there. Errors: UserError where the maps would take
        more than data.cache_gb, or more than the disk has.
        """
        # By the image's number: ranks look at different times, and may find different files missing.
        missing = [i for i, file in enumerate(self.files) if not file.is_file()]
        mine = [i for i in missing if i % distributed.world_size() == distributed.rank()]
        for i in with_bar(mine, "features", len(mine), shown=distributed.is_main()):
            image, _ = self.dataset.read(i)
            if self.size is not None:
                if image.shape[1] > self.size[0] or image.shape[2] > self.size[1]:
                    shapes = [self.dataset.label(each).shape for each in range(len(self))]
                    enough = [max(sizes) for sizes in zip(*shapes)]
                    raise UserError(
                        f"data.cache_features: {self.name(i)} has {image.shape[1]} × {image.shape[2]} pixels,"
                        f" data.crop {self.size[0]} × {self.size[1]}; whole images are kept: set data.crop to"
                        f" {enough}, which holds all {len(self)}, or to more"
                    )
                image = torch.stack([padded(x, self.size, c) for x, c in zip(image, model.mean_colour)])
            with torch.inference_mode(), autocast(config, device):
                maps = [x[0].half().cpu() for x in model.maps(image[None].to(device))]
            if i == mine[0]:
                self.require_room(sum(x.nbytes for x in maps), len(missing), config.data.cache_gb)
            with whole_file(self.files[i]) as part:
                torch.save([x.clone() for x in maps], part)
        return int(distributed.all_reduce(torch.tensor(len(mine), device=device)))

    def require_room(self, size: int, count: int, most_gb: float) -> None:
        folder = self.files[0].parent
        make_folder(folder)
        total, free = size * len(self), shutil.disk_usage(folder).free
        if total > most_gb * 1e9:
            raise UserError(
                f"data.cache_features: the maps of {len(self)} images would take {total / 1e9:.1f} GB,"
                f" data.cache_gb allows {most_gb:g}; raise it or set cache_features to false"
            )
        if size * count > free:
            raise UserError(
                f"{folder}: the maps of {count} images need {size * count / 1e9:.1f} GB,"
                f" {free / 1e9:.1f} are free; name another folder in data.cache_features"
            )


def padded(values: Tensor, size: tuple[int, int], fill: int) -> Tensor:
    """(H, W) → (*size) with `fill` at the bottom and right."""
    return F.pad(values, (0, size[1] - values.shape[1], 0, size[0] - values.shape[0]), value=fill)


def cache_folder(model: Segmenter, config: Config) -> Path:
    """Where the maps of this backbone, with these weights, lie."""
    chosen = config.data.cache_features
    root = DEFAULT_FOLDER if isinstance(chosen, bool) else chosen
    about = [
        config.backbone.name,
        config.backbone.output_stride,
        model.backbone.strides,
        config.train.precision,
    ]
    digest = hashlib.sha256(json.dumps(about).encode())
    for tensor in [model.mean, model.std, *model.backbone.state_dict().values()]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return root / digest.hexdigest()[:32]
