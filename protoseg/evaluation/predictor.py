"""A trained model in one line: `protoseg.load(…).predict(image)`."""

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from einops import rearrange
from huggingface_hub import ModelHubMixin
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from protoseg.config import Config
from protoseg.data.classes.palette import overlay
from protoseg.data.datasets import image_reader, model_tree
from protoseg.data.tree import LabelTree
from protoseg.evaluation.inference import (
    WHOLE,
    InferenceSettings,
    Prediction,
    has_distances,
    protocol_for,
    segment,
    segment_together,
)
from protoseg.evaluation.nearest_patches import FILE, NearPatch, load_patches
from protoseg.models.checkpoint import find_checkpoint, load_segmenter, segmenter_content
from protoseg.models.segmenter import Segmenter, autocast
from protoseg.runtime.errors import UserError
from protoseg.weights.pretrained import download, save_model_folder

ImageLike: TypeAlias = str | Path | Image.Image | NDArray[np.uint8] | Tensor
TOGETHER = 8  # images of one forward pass
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load(name: str | Path, device: str | torch.device | None = None) -> "Predictor":
    """A trained model from a run folder, a checkpoint, a folder saved by it, or the hub (owner/model).

    device: by default the first GPU if there is one. Errors: UserError naming what was looked for.
    """
    path = Path(name)
    if not path.exists():
        if not HUB_NAME.fullmatch(str(name)):
            raise UserError(
                f"{name}: no run folder, checkpoint or saved model of this name, and no name on the hub"
                " (owner/model); check the path"
            )
        path = download(str(name))
    model, config, content = load_segmenter(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    palette = [(int(r), int(g), int(b)) for r, g, b in content["palette"]]
    folder = find_checkpoint(path).parent
    return Predictor(model.to(device), config, content["classes"], palette, content.get("step", 0), folder)


@dataclass(frozen=True, repr=False)
class Segmentation:
    """One image and what the model says about its pixels; maps are (H, W), of the image's size."""

    image: NDArray[np.uint8]  # (H, W, 3)
    labels: NDArray[np.int64]  # class ids
    confidence: NDArray[np.float32]  # probability of the class
    prototypes: NDArray[np.int64] | None  # nearest prototype of the class, 0 … K−1; None for linear models
    distance: NDArray[np.float32] | None  # 1 − cosine of the nearest prototype; None without cosines
    classes: list[str]
    palette: list[tuple[int, int, int]]
    tree: LabelTree | None = None  # data.tree, where the model was trained with one

    def at_level(self, level: int) -> NDArray[np.int64]:
        """Node ids of `tree` at one of its levels, 1 at the top: (H, W). Errors: UserError."""
        tree = self._known_tree()
        if not 1 <= level <= tree.height:
            raise UserError(f"at_level: the label tree has levels 1-{tree.height}, got {level}")
        return tree.level_of_classes(level).numpy()[self.labels]

    def path(self, y: int, x: int) -> list[str]:
        """Names on the best path of `tree` at a pixel, from the top down to the class. Errors: UserError."""
        tree = self._known_tree()
        return [tree.names[v] for v in tree.path(int(self.labels[y, x]))]

    def _known_tree(self) -> LabelTree:
        if self.tree is None:
            raise UserError("this model has no label tree (data.tree), or not one of its present classes")
        return self.tree

    def overlay(self) -> Image.Image:
        """The image under its classes' colours, half and half."""
        return Image.fromarray(overlay(self.image, self.labels, self.palette))

    def shares(self) -> dict[str, float]:
        """Share of the pixels of each class that occurs, the largest first."""
        ids, counts = np.unique(self.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {self.classes[ids[i]]: float(counts[i] / self.labels.size) for i in order}

    def __repr__(self) -> str:
        height, width = self.labels.shape
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares().items())
        return f"Segmentation({width}×{height}: {shares})"

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        buffer = io.BytesIO()
        self.overlay().save(buffer, "PNG")
        return buffer.getvalue()


class Candidate(NamedTuple):
    """A class that a pixel could get."""

    class_name: str
    prototype: int  # the nearest one of the class, 0 … K−1
    cosine: float  # of the pixel's cell with it
    logit: float  # with the class prior: what decides


@dataclass(frozen=True)
class Explanation:
    """Why a pixel got its class."""

    class_name: str
    prototype: int  # of the class, 0 … K−1
    cosine: float  # of the pixel's cell with it
    logit: float  # with the class prior: what decides
    others: list[Candidate]  # the other classes, the largest logit first
    patches: list[NearPatch] = field(repr=False)  # of training images; where `vis_prototypes` has kept them


class Predictor(ModelHubMixin):
    """A trained model with its classes; made by `load`.

    `model`, `classes` and `palette` may be edited (`model.prototypes.add_class(…)`, then a name and a colour
    each) before `save_pretrained(folder)` or `push_to_hub(name)`, which `load` reads again.
    """

    def __init__(
        self,
        model: Segmenter,
        settings: Config,
        classes: list[str],
        palette: list[tuple[int, int, int]],
        step: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.classes = classes
        self.palette = palette
        self.step = step
        self.folder = folder  # of the run, or of the saved model

    def __repr__(self) -> str:
        head = self.model.prototypes
        kind = f"{head.num_prototypes} prototypes per class" if head else self.settings.classifier
        return f"Predictor({self.settings.backbone.name}, {kind}, {len(self.classes)} classes)"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.mean.device

    @overload
    def predict(self, image: ImageLike, protocol: InferenceSettings = WHOLE) -> Segmentation: ...
    @overload
    def predict(self, image: list[ImageLike], protocol: InferenceSettings = WHOLE) -> list[Segmentation]: ...
    def predict(
        self, image: ImageLike | list[ImageLike], protocol: InferenceSettings = WHOLE
    ) -> Segmentation | list[Segmentation]:
        """Label an image of any size, or several: a path, PIL image, (H, W, 3) array or (3, H, W) tensor.

        Arrays and tensors are RGB uint8. Images of one size go through together; a large one in windows, as
        in the `predict` command. Errors: UserError for a file that cannot be read or what is no image.
        """
        if isinstance(image, list):
            return self._predict_all([self._as_tensor(each) for each in image], protocol)
        return self._predict_all([self._as_tensor(image)], protocol)[0]

    def explain(self, image: ImageLike, y: int, x: int) -> Explanation:
        """The prototype that decided the pixel in row y and column x, and training patches near to it.

        Errors: UserError for a place outside the image and for a model without prototypes.
        """
        head = self.model.require_prototypes("explain: this model")
        seen = self._as_tensor(image)
        height, width = seen.shape[-2:]
        if not (0 <= y < height and 0 <= x < width):
            raise UserError(f"explain: pixel ({y}, {x}) is outside the image, {height} × {width}")
        result = self._predict_all([seen], WHOLE)[0]
        assert result.prototypes is not None
        c, k = int(result.labels[y, x]), int(result.prototypes[y, x])
        # Around the pixel only, where the image is too large to go through at once.
        cell = self.model.stride
        tall, wide = protocol_for(seen, WHOLE).window or (height, width)
        top = max(min(y - tall // 2, height - tall), 0) // cell * cell
        left = max(min(x - wide // 2, width - wide), 0) // cell * cell
        piece = seen[:, top : top + tall, left : left + wide]
        with torch.inference_mode(), autocast(self.settings, self.device):
            embedding = self.model.embed(piece[None].to(self.device))
        with torch.inference_mode():
            here = embedding[:, :, (y - top) // cell, (x - left) // cell, None, None]
            emb_D = head.unit_rows(here)[0]
            cosine_CK = (head.prototypes.to(emb_D.dtype) @ emb_D).masked_fill(~head.initialized[:, None], -1)
            logit_C = head(here)[0, :, 0, 0].tolist()
        best_C, nearest_C = (part.tolist() for part in cosine_CK.max(1))
        each = [Candidate(*values) for values in zip(self.classes, nearest_C, best_C, logit_C)]
        return Explanation(
            self.classes[c],
            k,
            float(cosine_CK[c, k]),
            logit_C[c],
            sorted(each[:c] + each[c + 1 :], key=lambda other: -other.logit),
            load_patches(self.folder / FILE, c * head.num_prototypes + k) if self.folder else [],
        )

    def _predict_all(self, images: list[Tensor], protocol: InferenceSettings) -> list[Segmentation]:
        wanted: dict[str, Any] = {
            "prototypes": self.model.prototypes is not None,
            "distance": has_distances(self.model),
        }
        found: dict[int, Prediction] = {}
        groups: dict[tuple[int, ...], list[int]] = {}
        self.model.eval()
        with autocast(self.settings, self.device):
            for i, image in enumerate(images):
                used = protocol_for(image, protocol)
                if used == WHOLE:
                    groups.setdefault(tuple(image.shape), []).append(i)
                else:
                    found[i] = segment(
                        self.model, image.to(self.device), None, used, confidence=True, **wanted
                    )
            for group in groups.values():
                for start in range(0, len(group), TOGETHER):
                    part = group[start : start + TOGETHER]
                    together = torch.stack([images[i] for i in part]).to(self.device)
                    found |= zip(part, segment_together(self.model, together, confidence=True, **wanted))
        return [self._segmentation(image, found[i]) for i, image in enumerate(images)]

    def _as_tensor(self, image: ImageLike) -> Tensor:
        """(3, H, W) uint8 RGB; files are read as in training."""
        if isinstance(image, str | Path):
            return image_reader(self.settings.data)(Path(image))
        if isinstance(image, Image.Image):
            image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        if isinstance(image, np.ndarray):
            array = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image
            if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
                raise UserError(
                    f"predict: an array must be (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype};"
                    " values between 0 and 1 are to be multiplied by 255 first"
                )
            return rearrange(torch.from_numpy(np.ascontiguousarray(array)), "h w c -> c h w")
        if isinstance(image, Tensor):
            if image.ndim != 3 or len(image) != 3 or image.dtype != torch.uint8 or not image.numel():
                raise UserError(
                    f"predict: a tensor must be (3, H, W) uint8, got {tuple(image.shape)} {image.dtype};"
                    " values between 0 and 1 are to be multiplied by 255 first; several images are a list"
                )
            return image
        raise UserError(
            f"predict: expected a path, a PIL image, an array or a tensor, got {type(image).__name__}"
        )

    def _segmentation(self, image: Tensor, prediction: Prediction) -> Segmentation:
        labels, confidence, prototypes, distance = (
            None if each is None else each.cpu().numpy() for each in prediction
        )
        assert labels is not None
        assert confidence is not None
        picture = rearrange(image.cpu().numpy(), "c h w -> h w c")
        about = list(self.classes), list(self.palette), model_tree(self.settings.data, self.classes)
        return Segmentation(picture, labels, confidence, prototypes, distance, *about)

    def _save_pretrained(self, save_directory: Path) -> None:
        content = segmenter_content(self.model, self.settings, self.classes, self.palette, self.step)
        save_model_folder(save_directory, content, self.folder)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **_: Any) -> "Predictor":
        return load(model_id)
