"""The training patches nearest to each prototype, kept beside a run for whoever asks a model to explain."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from protoseg.runtime.files import whole_file

FILE = "prototypes/patches.npz"  # in a run folder
SIDE = 96  # pixels


class NearPatch(NamedTuple):
    """A piece of a training image around a pixel near a prototype."""

    image: str  # its name in the dataset
    cosine: float
    picture: Image.Image


def save_patches(path: Path, patches: Mapping[int, Iterable[tuple[str, float, NDArray[np.uint8]]]]) -> None:
    """Write patches (image name, cosine, (s, s, 3) picture) by prototype number c·K + k, nearest first."""
    arrays: dict[str, NDArray] = {}
    for number, rows in patches.items():
        for i, (name, cosine, picture) in enumerate(rows):
            jpeg = io.BytesIO()
            Image.fromarray(picture).resize((SIDE, SIDE)).save(jpeg, "JPEG", quality=90)
            arrays[f"{number}/{i}/picture"] = np.frombuffer(jpeg.getvalue(), np.uint8)
            arrays[f"{number}/{i}/image"] = np.array(name)
            arrays[f"{number}/{i}/cosine"] = np.array(cosine)
    with whole_file(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_patches(path: Path, number: int) -> list[NearPatch]:
    """The patches of one prototype, nearest first; none if there is no such file."""
    if not path.is_file():
        return []
    patches: list[NearPatch] = []
    with np.load(path, allow_pickle=False) as kept:
        while f"{number}/{len(patches)}/picture" in kept:
            key = f"{number}/{len(patches)}"
            picture = Image.open(io.BytesIO(kept[f"{key}/picture"].tobytes()))
            patches.append(NearPatch(str(kept[f"{key}/image"]), float(kept[f"{key}/cosine"]), picture))
    return patches
