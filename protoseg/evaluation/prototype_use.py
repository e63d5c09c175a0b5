"""How the prototypes stand to the pixels of a labelled split.

C classes, K prototypes per class, N pixels of one image at the embedding's resolution.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from protoseg.config import Config
from protoseg.core.clustering import cluster_counts
from protoseg.core.health import perplexity
from protoseg.core.losses import downsample_labels
from protoseg.core.prototypes import PrototypeHead
from protoseg.core.similarity import own_similarities
from protoseg.data.loader import EvalLoader
from protoseg.evaluation.inference import WHOLE_PIXELS
from protoseg.models.segmenter import Segmenter, autocast
from protoseg.runtime.distributed import all_reduce
from protoseg.runtime.files import none_if_nan


def embeddings(
    model: Segmenter,
    config: Config,
    loader: EvalLoader,
    device: torch.device,
    maps: Callable[[Tensor, torch.device], list[Tensor]] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Embedding maps (1, D, h, w) of whole images and labels (1, h, w); too large images are left out.

    maps: gives the backbone's maps of the images whose numbers the loader gives in place of images.
    """
    model.eval()
    for image, label, _, _ in loader:
        if maps is None and image.shape[-2] * image.shape[-1] > WHOLE_PIXELS:
            continue
        with torch.inference_mode(), autocast(config, device):
            embedding = model.embed(image[None].to(device) if maps is None else maps(image, device))
        yield embedding, downsample_labels(label[None].to(device), embedding.shape[-2:])


@torch.inference_mode()  # as the embeddings of an evaluation are made in
def prototype_use(
    head: PrototypeHead, samples: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, list[float | None]]:
    """`in_use` and `own_cosine` of every class, summed over ranks; None for classes without a pixel.

    samples: embedding maps (1, D, h, w) with labels (1, h, w). in_use: perplexity of the shares in which a
    class's pixels are nearest to each of its prototypes, 1 to K. own_cosine: mean cosine with the nearest.
    """
    counts_CK, cosine_C = torch.zeros_like(head.usage), torch.zeros_like(head.pixel_counts)
    for embedding, labels in samples:
        with torch.autocast(embedding.device.type, enabled=False):
            emb_ND = head.unit_rows(embedding)
        labels_N = head.valid_labels(embedding, labels)
        own = own_similarities(emb_ND, head.prototypes.to(emb_ND.dtype), labels_N).max(1)
        counts_CK += cluster_counts(
            labels_N, own.indices, head.num_classes, head.num_prototypes, counts_CK.dtype
        )
        kept_N = labels_N >= 0
        cosine_C.index_add_(0, labels_N[kept_N], own.values[kept_N].to(cosine_C.dtype))
    counts_CK, cosine_C = all_reduce(counts_CK), all_reduce(cosine_C)
    values = {"in_use": perplexity(counts_CK), "own_cosine": cosine_C / counts_CK.sum(1)}
    return {name: [none_if_nan(x) for x in each.tolist()] for name, each in values.items()}
