"""Prototypes put on the pixels of labelled images, without a gradient: centre, whiten, cluster.

Pixels of one class differ most along directions that say nothing about classes. Whitening by the covariance
within classes makes all directions equal, so that cosines count those that do (as in linear discriminant
analysis). C classes, D channels, K prototypes per class, N pixels.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from protoseg.core.clustering import cluster_means
from protoseg.core.losses import downsample_labels
from protoseg.core.similarity import own_similarities
from protoseg.core.start import start_prototypes
from protoseg.core.update import momentum_update
from protoseg.data.file_dataset import Dataset
from protoseg.models.decode_heads import WhitenHead
from protoseg.models.maps import concatenate
from protoseg.models.segmenter import Segmenter
from protoseg.runtime.errors import UserError

KEPT_PIXELS = 20_000  # of a class, about, for the clustering; the covariance takes all
ROUNDS = 10


def shrinkage_for(images: int) -> float:
    """How far the covariance of so many images is drawn towards a multiple of the identity.

    Directions in which few images do not vary would count most. On CamVid 1 is best for up to 10 images (by 4
    to 12 points against 0.01), 0.1 for 50; with all 367, 0.01 and 0.1 are alike.
    """
    return min(max(10 / images, 0.01), 1.0)


class Moments:
    """Sums over pixels from which class means and the covariance within classes follow, in double."""

    def __init__(self, num_classes: int, dim: int) -> None:
        self.counts_C = torch.zeros(num_classes, dtype=torch.double)
        self.sums_CD = torch.zeros(num_classes, dim, dtype=torch.double)
        self.squares_DD = torch.zeros(dim, dim, dtype=torch.double)

    def add_(self, rows_ND: Tensor, labels_N: Tensor) -> None:
        """Labels in 0 … C − 1."""
        self.counts_C += torch.bincount(labels_N, minlength=len(self.counts_C))
        rows_ND = rows_ND.double()
        self.sums_CD.index_add_(0, labels_N, rows_ND)
        self.squares_DD += rows_ND.T @ rows_ND

    def centre_and_whitening(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Mean (D,) of all pixels and Σ^(−1/2) (D, D), Σ the covariance within classes, shrunk."""
        total = self.counts_C.sum()
        means_CD = self.sums_CD / self.counts_C.clamp(min=1)[:, None]
        within_DD = (self.squares_DD - means_CD.T @ self.sums_CD) / total
        dim = len(within_DD)
        within_DD += shrinkage * within_DD.trace() / dim * torch.eye(dim, dtype=torch.double)
        values_D, vectors_DD = torch.linalg.eigh(within_DD)
        whitening_DD = vectors_DD * values_D.clamp(min=1e-12).rsqrt() @ vectors_DD.T
        return self.sums_CD.sum(0) / total, whitening_DD


@torch.no_grad()
def place_prototypes_(
    model: Segmenter,
    dataset: Dataset,
    indices: Sequence[int],
    shrinkage: float,
    seed: int,
    device: torch.device,
) -> None:
    """Set the `whiten` head's buffers and the prototypes from these images, seen whole.

    Each class's pixels are clustered by the nearest prototype, from a balanced start; the prior is that of
    all labelled pixels. Classes that the images do not show keep no prototypes.
    Errors: UserError where no pixel is labelled.
    """
    head, classifier = model.decode_head, model.require_prototypes("fit: this model")
    assert isinstance(head, WhitenHead)
    moments = Moments(classifier.num_classes, head.dim)
    generator = torch.Generator().manual_seed(seed)
    most = max(KEPT_PIXELS // len(indices), 16)
    kept: list[tuple[Tensor, Tensor]] = []
    for index in indices:
        image, label = dataset.read(index)
        map_BDhw = concatenate(model.maps(image[None].to(device))).cpu()
        labels_N = downsample_labels(label[None].long(), map_BDhw.shape[2:]).flatten()
        known_N = (labels_N < classifier.num_classes) & (labels_N != dataset.ignore_index)
        rows_ND, labels_N = rearrange(map_BDhw[0], "d h w -> (h w) d")[known_N], labels_N[known_N]
        moments.add_(rows_ND, labels_N)
        order_N = torch.randperm(len(labels_N), generator=generator)
        for c in labels_N.unique():
            chosen = order_N[labels_N[order_N] == c][:most]
            kept.append((rows_ND[chosen].half(), labels_N[chosen]))
    if not kept:
        raise UserError(
            f"fit: no pixel is labelled in the {len(indices)} training images that were drawn; take more by"
            " --images, or others by train.seed"
        )
    centre_D, whitening_DD = moments.centre_and_whitening(shrinkage)
    head.centre.copy_(centre_D)
    head.whitening.copy_(whitening_DD)
    rows_ND, labels_N = (torch.cat(each).to(device) for each in zip(*kept))
    emb_ND = classifier.unit_rows(((rows_ND.float() - head.centre) @ head.whitening).T[None, :, :, None])
    size = (classifier.num_classes, classifier.num_prototypes)
    protos_CKD, placed_CK = start_prototypes(
        emb_ND, labels_N, classifier.prototypes, torch.ones(size, dtype=torch.bool, device=device)
    )
    for _ in range(ROUNDS):
        nearest_N = own_similarities(emb_ND, protos_CKD, labels_N).argmax(1)
        means_CKD, counts_CK = cluster_means(emb_ND, labels_N, nearest_N, *size)
        protos_CKD = momentum_update(protos_CKD, means_CKD, counts_CK, 0.0)
    classifier.prototypes.copy_(protos_CKD)
    classifier.initialized.copy_(placed_CK.any(1))
    classifier.pixel_counts.copy_(moments.counts_C)
    classifier.usage.copy_(counts_CK)
    classifier.nearest_usage.copy_(counts_CK)
    classifier.agreeing.copy_(counts_CK.sum(1))
