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
        read = [kept_maps(self.files[i]) for i in indices.flatten().tolist()]
        return [torch.stack(each).to(device, non_blocking=True) for each in zip(*read)]

    def missing(self) -> list[int]:
        """Numbers of the images whose maps are not there."""
        return [i for i, file in enumerate(self.files) if not file.is_file()]

    def fill(self, model: Segmenter, config: Config, device: torch.device, to_come: int = 0) -> int:
        """Compute what is missing, every rank its share; returns how many images that were on all ranks.

        to_come: images that other caches will add to the folder, thought as large. It waits for the other
        ranks: then everything is there. Errors: UserError where all maps in the folder of caches would take
        more than data.cache_gb, or more than the disk has, or where half precision does not hold them.
        """
        # By the image's number: ranks look at different times, and may find different files missing.
        missing = self.missing()
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
                require_room(
                    self.files[i].parent,
                    sum(x.nbytes for x in maps) * (len(missing) + to_come),
                    config.data.cache_gb,
                )
            if not all(x.isfinite().all() for x in maps):
                raise UserError(
                    f"data.cache_features: half precision does not hold the maps of {self.name(i)};"
                    " set cache_features to false"
                )
            with whole_file(self.files[i]) as part:
                torch.save([x.clone() for x in maps], part)
        return int(distributed.all_reduce(torch.tensor(len(mine), device=device)))


def require_room(folder: Path, needed: int, most_gb: float) -> None:
    """Errors: UserError if so many bytes more are too many for data.cache_gb, or for the disk.

    The limit is for the folder above, where the maps of all backbones lie.
    """
    make_folder(folder)
    root, free = folder.parent, shutil.disk_usage(folder).free
    there = sum(file.stat().st_size for file in root.glob("*/*.pt"))
    if there + needed > most_gb * 1e9:
        raise UserError(
            f"{root}: {needed / 1e9:.3g} GB of maps would come to {there / 1e9:.3g} that are there,"
            f" data.cache_gb allows {most_gb:g}; raise it, delete the folder, or turn data.cache_features off"
        )
    if needed > free:
        raise UserError(
            f"{folder}: the maps need {needed / 1e9:.3g} GB, {free / 1e9:.3g} are free;"
            " name another folder in data.cache_features"
        )


def kept_maps(file: Path) -> list[Tensor]:
    """The maps in a file. Errors: UserError if it is damaged or gone."""
    try:
        return torch.load(file, weights_only=True)
    except Exception:  # damaged bytes can end in any error of the unpickler
        raise UserError(
            f"{file}: the maps in it cannot be read; delete this file, and the next start computes them again"
        ) from None


def padded(values: Tensor, size: tuple[int, int], fill: int) -> Tensor:
    """(H, W) → (*size) with `fill` at the bottom and right."""
    return F.pad(values, (0, size[1] - values.shape[1], 0, size[0] - values.shape[0]), value=fill)


def cache_folder(model: Segmenter, config: Config) -> Path:
    """Where the maps of this backbone, with these weights, lie."""
    chosen = config.data.cache_features
    root = DEFAULT_FOLDER if isinstance(chosen, bool) else chosen
    about = [
        str(model.backbone),  # with what is no tensor, such as a norm's epsilon
        getattr(model.backbone.net, "align_corners", None),
        config.backbone.name,
        config.backbone.output_stride,
        model.backbone.strides,
        config.train.precision,
    ]
    digest = hashlib.sha256(json.dumps(about).encode())
    for tensor in [model.mean, model.std, *model.backbone.state_dict().values()]:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return root / digest.hexdigest()[:32]
