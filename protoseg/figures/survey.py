"""What the figures and the explorer need, collected in one pass over the training images and the samples.

N pixels of one image at embedding resolution (h, w), C classes, K prototypes per class, D channels.
A prototype's number is c·K + k. It "wins" the pixels that the model gives to its class and that are nearer to
it than to its siblings. It then is the nearest of all where scores are cosines and no class prior is added.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from protoseg.core.losses import downsample_labels, nearest_cells
from protoseg.core.prototypes import PrototypeHead
from protoseg.core.similarity import class_scores, own_similarities, unit_rows
from protoseg.data.file_dataset import Dataset
from protoseg.evaluation.inference import WHOLE_PIXELS, segment
from protoseg.models.segmenter import Segmenter

RUNNERS_UP = 5  # classes with their scores, for each pixel of a sample


class Patch(NamedTuple):
    """A crop of a training image around one of a prototype's nearest pixels, one per image."""

    cosine: float
    image: int  # number in the dataset
    name: str
    label: int  # of the nearest pixel
    picture: NDArray[np.uint8]  # (s, s, 3)
    matched: NDArray[np.bool_]  # (s, s) pixels that the prototype won


@dataclass(frozen=True)
class Survey:
    """Every prototype on the training images. Shares and cosines are of the class's own labelled pixels."""

    share_CK: NDArray[np.float64]  # of the class's pixels nearer to this prototype than to its siblings
    precision_CK: NDArray[np.float64]  # of the labelled pixels it won, those of its class; NaN if none
    cosine_CK: NDArray[np.float64]  # mean over the pixels of the share; NaN if none
    won_CK: NDArray[np.int64]  # labelled pixels
    patches: list[list[Patch]]  # C·K lists, nearest first


@dataclass(frozen=True)
class Pixels:
    """Random pixels, the same number of each class where there are enough."""

    emb_ND: NDArray[np.float32]  # unit length
    label_N: NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One image with all that can be asked about its pixels."""

    name: str
    image: NDArray[np.uint8]  # (H, W, 3)
    label: NDArray[np.int64]  # (H, W)
    prediction: NDArray[np.int64]  # (H, W)
    nearest: NDArray[np.int64]  # (h, w) number of the prototype that wins the cell; −1 for a linear model
    classes: NDArray[np.int64]  # (h, w, 5) the classes with the highest logits, best first
    scores: NDArray[np.float32]  # (h, w, 5) their cosines, or logits where these are something else
    emb_hwD: NDArray[np.float32]  # unit length


def survey(
    model: Segmenter, dataset: Dataset, indices: Iterable[int], *, patches: int = 6, per_class: int = 100
) -> tuple[Survey | None, Pixels]:
    """One pass over images → the prototypes' deeds (None for a linear model) and class-balanced pixels."""
    head = model.prototypes
    num_classes = len(dataset.classes)
    keeper = _PixelKeeper(num_classes, per_class)
    deeds = _Deeds(num_classes, head.num_prototypes, patches) if head is not None else None
    for index in indices:
        image, label = _read(dataset, index)
        emb_ND, logits_NC, size = seen_pixels(model, image)
        label_N = downsample_labels(label.long()[None], size).flatten().to(emb_ND.device)
        label_N = torch.where((label_N < num_classes) & (label_N != dataset.ignore_index), label_N, -1)
        keeper.add(emb_ND, label_N, index)
        if head is not None and deeds is not None:
            near = nearest(emb_ND, head.prototypes, logits_NC.argmax(1), label_N)
            deeds.add(near, label_N, size, image, index, dataset.name(index))
    return (deeds.result() if deeds else None), keeper.result()


def read_samples(model: Segmenter, dataset: Dataset, indices: Sequence[int]) -> list[Sample]:
    """Images with their predictions, nearest prototypes and runner-up classes."""
    head = model.prototypes
    samples = []
    for index in indices:
        image, label = _read(dataset, index)
        emb_ND, logits_NC, size = seen_pixels(model, image)
        winner_N = torch.full((len(emb_ND),), -1)
        scores_NC = logits_NC
        if head is not None:
            winner_N = nearest(emb_ND, head.prototypes, logits_NC.argmax(1)).winner_N
            if head.settings.score_norm == "scale":
                scores_NC = class_scores(emb_ND, head.prototypes.to(emb_ND.dtype), head.initialized)
        best = logits_NC.topk(min(RUNNERS_UP, logits_NC.shape[1]), dim=1).indices
        prediction = segment(model, image.to(model.mean.device), (label.shape[0], label.shape[1])).classes
        samples.append(
            Sample(
                name=dataset.name(index),
                image=rearrange(image.numpy(), "c h w -> h w c"),
                label=label.long().numpy(),
                prediction=prediction.cpu().numpy(),
                nearest=winner_N.view(size).cpu().numpy(),
                classes=best.view(*size, -1).cpu().numpy(),
                scores=scores_NC.gather(1, best).view(*size, -1).cpu().numpy(),
                emb_hwD=emb_ND.view(*size, -1).cpu().numpy(),
            )
        )
    return samples


def _read(dataset: Dataset, index: int) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) and label (H, W); of an image that is too large for one pass the middle."""
    image, label = dataset.read(index)
    height, width = label.shape
    shrink = min(1.0, (WHOLE_PIXELS / (height * width)) ** 0.5)
    tall, wide = max(1, int(height * shrink)), max(1, int(width * shrink))
    top, left = (height - tall) // 2, (width - wide) // 2
    middle = (slice(top, top + tall), slice(left, left + wide))
    return image[(slice(None), *middle)], label[middle]


def seen_pixels(model: Segmenter, image: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Of one image (3, H, W): unit vectors (N, D) as the classifier sees them, logits (N, C), and (h, w)."""
    with torch.inference_mode():
        embedding = model.embed(image[None].to(model.mean.device))
        logits_NC = rearrange(model.classifier(embedding)[0], "c h w -> (h w) c").float()
        with torch.autocast(embedding.device.type, enabled=False):  # as in the head
            unit_ND = (
                unit_rows(embedding) if model.prototypes is None else model.prototypes.unit_rows(embedding)
            )
        return unit_ND, logits_NC, (embedding.shape[2], embedding.shape[3])


class Nearest(NamedTuple):
    """For each pixel: the nearest prototype of its predicted class, and the nearest of its own class."""

    winner_N: Tensor  # number c·K + k
    winner_cosine_N: Tensor
    own_N: Tensor  # k; of class 0 where the label is −1
    own_cosine_N: Tensor


def nearest(emb_ND: Tensor, protos_CKD: Tensor, class_N: Tensor, label_N: Tensor | None = None) -> Nearest:
    """Nearest prototypes of pixels (N, D): of the class that the model gives them, and of `label_N`."""
    protos_CKD = protos_CKD.to(emb_ND.dtype)
    winner = own_similarities(emb_ND, protos_CKD, class_N).max(1)
    own = winner if label_N is None else own_similarities(emb_ND, protos_CKD, label_N).max(1)
    return Nearest(class_N * protos_CKD.shape[1] + winner.indices, winner.values, own.indices, own.values)


def similarity_maps(emb_hwD: NDArray, protos_KD: NDArray, size: tuple[int, int] | None = None) -> NDArray:
    """Cosine maps (K, h, w) of some prototypes; with `size`, of the mean embeddings of that many cells."""
    if size is not None and size != emb_hwD.shape[:2]:
        emb_DHW = rearrange(torch.from_numpy(emb_hwD), "h w d -> d h w")
        mean_hwD = rearrange(F.adaptive_avg_pool2d(emb_DHW, size), "d h w -> h w d")
        emb_hwD = F.normalize(mean_hwD, dim=-1).numpy()
    return np.einsum("hwd,kd->khw", emb_hwD, protos_KD)


def prior_in_cosines(head: PrototypeHead) -> NDArray | None:
    """Log prior of each class (C,) ÷ logit scale: what decides is cosine + this; None where there is none."""
    if head.settings.prior == "none" or head.settings.score_norm != "scale":
        return None
    return (head.log_prior() / head.settings.logit_scale).float().cpu().numpy()


def richest_class(sample: Sample, num_prototypes: int, tired: Sequence[int]) -> int:
    """The class with the most prototypes at work in an image (3 cells and more), one not in `tired` first."""
    numbers, counts = np.unique(sample.nearest, return_counts=True)
    cells = np.bincount(numbers // num_prototypes, counts)
    working = np.bincount(numbers // num_prototypes, counts >= 3, minlength=len(cells))
    present = np.flatnonzero(cells).tolist()
    return max(present, key=lambda c: (c not in tired, working[c], cells[c]))


def spread_indices(length: int, count: int) -> list[int]:
    """`count` numbers spread evenly over 0 … length − 1."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


class _PixelKeeper:
    """A uniform draw of each class's pixels: those with the smallest random keys stay."""

    def __init__(self, num_classes: int, per_class: int) -> None:
        self.num_classes, self.per_class = num_classes, per_class
        self.kept: list[list[tuple[float, NDArray]]] = [[] for _ in range(num_classes)]

    def add(self, emb_ND: Tensor, label_N: Tensor, index: int) -> None:
        keys_N = np.random.default_rng((0, index)).random(len(label_N))
        labels = label_N.cpu().numpy()
        for c in np.unique(labels[labels >= 0]).tolist():
            mine = np.flatnonzero(labels == c)
            first = mine[np.argsort(keys_N[mine])[: self.per_class]]
            entries = zip(keys_N[first], emb_ND[first].float().cpu().numpy())
            self.kept[c] = heapq.nsmallest(self.per_class, [*self.kept[c], *entries], lambda entry: entry[0])

    def result(self) -> Pixels:
        kept = [(c, emb) for c, entries in enumerate(self.kept) for _, emb in entries]
        if not kept:
            return Pixels(np.zeros((0, 1), np.float32), np.zeros(0, np.int64))
        return Pixels(np.stack([emb for _, emb in kept]), np.array([c for c, _ in kept]))


class _Deeds:
    """Counts and nearest patches of every prototype."""

    def __init__(self, num_classes: int, num_prototypes: int, patches: int) -> None:
        self.shape = (num_classes, num_prototypes)
        self.patches = patches
        self.sums = np.zeros((4, num_classes * num_prototypes))  # won, right, own, cosine of own
        self.heaps: list[list[Patch]] = [[] for _ in range(num_classes * num_prototypes)]

    def add(
        self, near: Nearest, label_N: Tensor, size: tuple[int, int], image: Tensor, index: int, name: str
    ) -> None:
        winner, cosine, own, own_cosine = (part.cpu().numpy() for part in near)
        label = label_N.cpu().numpy()
        known = label >= 0
        number = self.shape[0] * self.shape[1]
        right = known & (winner // self.shape[1] == label)
        own_number = label * self.shape[1] + own
        self.sums += np.stack(
            [
                np.bincount(winner[known], minlength=number),
                np.bincount(winner[right], minlength=number),
                np.bincount(own_number[known], minlength=number),
                np.bincount(own_number[known], own_cosine[known], minlength=number),
            ]
        )
        order = np.flatnonzero(known)[np.argsort(-cosine[known], kind="stable")]
        numbers, first = np.unique(winner[order], return_index=True)
        for m, n in zip(numbers.tolist(), order[first].tolist()):
            heap = self.heaps[m]
            if len(heap) == self.patches and cosine[n] <= heap[0].cosine:
                continue
            picture, matched = crop_around(image, (winner == m).reshape(size), divmod(n, size[1]))
            push = heapq.heappush if len(heap) < self.patches else heapq.heapreplace
            push(heap, Patch(float(cosine[n]), index, name, int(label[n]), picture, matched))

    def result(self) -> Survey:
        won, right, own, cosine = (part.reshape(self.shape) for part in self.sums)
        with np.errstate(invalid="ignore"):
            share = own / np.maximum(own.sum(1, keepdims=True), 1)
            patches = [sorted(heap, key=lambda patch: -patch.cosine) for heap in self.heaps]
            return Survey(share, right / won, cosine / own, won.astype(np.int64), patches)


def crop_around(
    image: Tensor, won: NDArray[np.bool_], cell: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A square of the image (3, H, W) around one embedding cell, and where in it `won` (h, w) holds.

    Side: ten cells or a third of the image, whichever is more, so that the pixel is seen in its surroundings.
    """
    height, width = image.shape[1:]
    rows, columns = won.shape
    stride = max(height / rows, width / columns)
    side = min(max(round(10 * stride), min(height, width) // 3), height, width)
    top, left = (
        min(max(round((at + 0.5) * length / cells - side / 2), 0), length - side)
        for at, length, cells in zip(cell, (height, width), (rows, columns))
    )
    y = nearest_cells(height, rows)[top : top + side].numpy()
    x = nearest_cells(width, columns)[left : left + side].numpy()
    picture = rearrange(image[:, top : top + side, left : left + side].numpy(), "c h w -> h w c")
    return picture, won[np.ix_(y, x)]
