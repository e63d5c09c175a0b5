"""Prediction for images of any size: whole or in windows, at several scales, mirrored.

C classes, K prototypes per class; (H, W) image pixels; (h, w) cells, the pixels of the embedding map, each of
them `model.stride` image pixels wide.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2 import functional as image_functions

from protoseg.core.losses import Lerp, Widening, nearest_cells, upsampled_rows
from protoseg.core.prototypes import PrototypeHead
from protoseg.models.segmenter import Segmenter
from protoseg.runtime.errors import UserError
from protoseg.runtime.memory import free_bytes

# Class values of full-resolution pixels at a time, by device: bounds the memory of large vocabularies.
BAND_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
OnBand = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class InferenceSettings:
    """How an image goes through the model. The default: whole, once, as it is.

    window: (height, width) in pixels of the scaled image, rounded up to whole cells; a window that covers the
    image is the whole image; None: the whole image, or windows where it is large (`protocol_for`). step: from
    one window to the next, by default two thirds of the window. scales: the image is seen at each of them.
    flip: and mirrored. Class probabilities are averaged over these views. batch: windows of one forward pass.
    Errors: UserError for values that make no sense.
    """

    window: tuple[int, int] | None = None
    step: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale <= 10 for scale in self.scales):
            raise UserError(f"scales: wants numbers above 0 and up to 10, got {list(self.scales)}")
        for name, value in (("window", self.window), ("step", self.step), ("batch", (self.batch,))):
            if value is not None and min(value) < 1:
                raise UserError(f"{name}: wants whole numbers above 0, got {list(value)}")
        if self.step is not None:
            if self.window is None:
                raise UserError("step: says how far windows are apart; give the window too")
            if any(step > side for step, side in zip(self.step, self.window)):
                raise UserError(
                    f"step: {list(self.step)} would leave gaps between windows of {list(self.window)};"
                    " choose a smaller step"
                )

    def to_plain(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "batch"}


WHOLE = InferenceSettings()
# Beyond this many pixels an image goes through in windows, unless the protocol names them.
WHOLE_PIXELS = 2048 * 1024
LARGE_IMAGE_WINDOW = (1024, 1024)
PIXEL_BYTES = 1100  # of a forward pass, measured: hrnet_w48 with ocr; 270 with resnet18 and mlp


def protocol_for(image: Tensor, protocol: InferenceSettings) -> InferenceSettings:
    """The protocol, with windows if it names none and the image at its largest scale is too large for one.

    That is beyond 2048 × 1024 pixels, or where memory is short: training, scores and predictions ask here.
    """
    pixels = image.shape[-2] * image.shape[-1] * max(protocol.scales) ** 2
    if protocol.window is not None or pixels <= LARGE_IMAGE_WINDOW[0] * LARGE_IMAGE_WINDOW[1]:
        return protocol
    if pixels > WHOLE_PIXELS or pixels * PIXEL_BYTES > free_bytes(image.device):
        return replace(protocol, window=LARGE_IMAGE_WINDOW)
    return protocol


class Prediction(NamedTuple):
    """What `segment` returns, all (H, W)."""

    classes: Tensor  # int64
    confidence: Tensor | None  # float32, probability of the predicted class
    prototypes: Tensor | None  # int64, the nearest prototype of the predicted class, 0 … K−1
    distance: Tensor | None = None  # float32, 1 − cosine of the nearest prototype of all


def segment(
    model: Segmenter,
    image: Tensor,
    size: tuple[int, int] | None = None,
    protocol: InferenceSettings = WHOLE,
    *,
    confidence: bool = False,
    prototypes: bool = False,
    distance: bool = False,
    on_band: OnBand | None = None,
) -> Prediction:
    """Classes, and on demand their probability and nearest prototype: (3, H, W) image → maps of `size`.

    Logits are upsampled bilinearly, then made probabilities and averaged. Memory: C·h·w logits per view, and
    a fixed band of full-resolution rows. The nearest prototype is that of the cell, in the view whose scale
    is nearest to 1; so is the distance, whose map is then upsampled bilinearly. on_band: see `most_likely`.
    Errors: UserError if a model without prototypes is asked for them, or one whose logits are not cosines for
    the distance.
    """
    _check_wishes(model, prototypes, distance)
    size = size or (image.shape[-2], image.shape[-1])
    protocol = protocol_for(image, protocol)
    nearest_Chw = None
    closest = min(protocol.scales, key=lambda scale: abs(scale - 1))
    views = []
    with torch.inference_mode():
        for scale in protocol.scales:
            seen = rescale(image, scale)
            wanted = prototypes and scale == closest
            logits_Chw, found_Chw = windowed_logits(model, seen, protocol, nearest=wanted)
            nearest_Chw = found_Chw if wanted else nearest_Chw
            views.append(logits_Chw)
            if protocol.flip:
                views.append(windowed_logits(model, seen.flip(-1), protocol)[0].flip(-1))
        best = protocol.scales.index(closest) * (2 if protocol.flip else 1)
        cosines_Chw = views[best] if distance else None
        return _prediction(model, views, size, nearest_Chw, cosines_Chw, confidence, on_band)


def segment_together(
    model: Segmenter,
    images: Tensor,
    *,
    confidence: bool = False,
    prototypes: bool = False,
    distance: bool = False,
) -> list[Prediction]:
    """`segment` of images of one size (B, 3, H, W) in one forward pass, each whole and as it is."""
    _check_wishes(model, prototypes, distance)
    size = (images.shape[-2], images.shape[-1])
    with torch.inference_mode():
        logits_BChw, nearest_BChw = _forward(model, images, prototypes)
        return [
            _prediction(model, [logits_Chw], size, nearest_Chw, logits_Chw if distance else None, confidence)
            for logits_Chw, nearest_Chw in zip(
                logits_BChw, [None] * len(images) if nearest_BChw is None else nearest_BChw
            )
        ]


def has_distances(model: Segmenter) -> bool:
    """Whether the model's logits are scaled cosines, from which a distance can be told."""
    return model.prototypes is not None and model.prototypes.settings.score_norm == "scale"


def _check_wishes(model: Segmenter, prototypes: bool, distance: bool) -> None:
    if prototypes or distance:
        model.require_prototypes("nearest prototypes and distances: this model")
    if distance and not has_distances(model):
        raise UserError("this model's scores are normalised over the classes; do not ask for distances")


def _prediction(
    model: Segmenter,
    views: list[Tensor],
    size: tuple[int, int],
    nearest_Chw: Tensor | None,
    cosines_Chw: Tensor | None,
    confidence: bool,
    on_band: OnBand | None = None,
) -> Prediction:
    """The maps of one image; `cosines_Chw`: the logits to tell the distance by, None if nobody asked."""
    classes, probability = most_likely(views, size, confidence, on_band)
    index = None if nearest_Chw is None else at_pixels(nearest_Chw, classes)
    distance = None
    if cosines_Chw is not None and model.prototypes is not None:
        # A class without prototypes has a logit far below any cosine.
        scaled_Chw = cosines_Chw - model.prototypes.log_prior()[:, None, None]
        scale = model.prototypes.settings.logit_scale
        distance_1hw = 1 - (scaled_Chw.amax(0, keepdim=True) / scale).clamp(min=-1)
        distance = F.interpolate(distance_1hw[None], size, mode="bilinear", align_corners=False)[0, 0]
    return Prediction(classes, probability, index, distance)


def rescale(image: Tensor, scale: float) -> Tensor:
    """The image (3, H, W) at another scale, resized as in training (bilinear, antialiased)."""
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return image_functions.resize(image, size, antialias=True)


def windowed_logits(
    model: Segmenter, image: Tensor, protocol: InferenceSettings = WHOLE, *, nearest: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits (C, h, w) in float32; with `nearest` also the nearest prototype per class (C, h, w), int16.

    Windows lie on the grid of cells, so their logits meet cell by cell: they are averaged there, weighted by
    the distance to the window's rim, and no map of C·H·W numbers is made. Where windows overlap, the nearest
    prototype is that of the window with the largest weight.
    """
    height, width = image.shape[-2:]
    cell = model.stride
    rows, columns = -(-height // cell), -(-width // cell)
    window, step = _in_cells(protocol, rows, columns, cell)
    places = [(y, x) for y in starts(rows, window[0], step[0]) for x in starts(columns, window[1], step[1])]
    if len(places) == 1:
        logits_BChw, nearest_BChw = _forward(model, image[None], nearest)
        return logits_BChw[0], None if nearest_BChw is None else nearest_BChw[0]
    weight_hw = blending_weights(window).to(image.device)
    total_hw = image.new_zeros(rows, columns, dtype=torch.float32)
    heaviest_hw = torch.zeros_like(total_hw)
    sum_Chw: Tensor | None = None
    best_Chw: Tensor | None = None
    for batch in _same_size_batches(places, protocol.batch, window, cell, (height, width)):
        crops = [
            image[:, y * cell : (y + window[0]) * cell, x * cell : (x + window[1]) * cell] for y, x in batch
        ]
        logits_BChw, nearest_BChw = _forward(model, torch.stack(crops), nearest)
        if sum_Chw is None:
            sum_Chw = logits_BChw.new_zeros(logits_BChw.shape[1], rows, columns)
        if best_Chw is None and nearest_BChw is not None:
            best_Chw = torch.zeros_like(sum_Chw, dtype=nearest_BChw.dtype)
        for i, (y, x) in enumerate(batch):
            at = (slice(y, y + window[0]), slice(x, x + window[1]))
            all_classes = (slice(None), *at)
            sum_Chw[all_classes] += logits_BChw[i] * weight_hw
            total_hw[at] += weight_hw
            if best_Chw is not None and nearest_BChw is not None:
                heavier_hw = weight_hw > heaviest_hw[at]
                best_Chw[all_classes] = torch.where(heavier_hw, nearest_BChw[i], best_Chw[all_classes])
                heaviest_hw[at] = torch.maximum(weight_hw, heaviest_hw[at])
    assert sum_Chw is not None, "there is at least one window"
    return sum_Chw.div_(total_hw), best_Chw


def starts(length: int, window: int, step: int) -> list[int]:
    """First cells of the windows along one axis; the last window ends where the image ends."""
    return [*range(0, length - window, step), length - window]


def blending_weights(window: tuple[int, int]) -> Tensor:
    """Weights (h, w) of a window's cells: 1 in the middle, falling linearly towards the rim, never 0."""

    def ramp(count: int) -> Tensor:
        up = torch.arange(1, count + 1, dtype=torch.float32)
        return torch.minimum(up, up.flip(0)) / ((count + 1) // 2)

    return ramp(window[0])[:, None] * ramp(window[1])


def most_likely(
    views: list[Tensor], size: tuple[int, int], confidence: bool = False, on_band: OnBand | None = None
) -> tuple[Tensor, Tensor | None]:
    """argmax over C (and its probability) of upsampled logits (C, h, w), a band of rows at a time.

    Several views: of their mean softmax. Returns int64 and float32 maps of `size`. on_band: sees
    probabilities (C, r, W) and classes (r, W) of every band.
    """
    device = views[0].device
    classes = torch.empty(size, dtype=torch.long, device=device)
    probability = torch.empty(size, device=device) if confidence else None
    band = max(1, BAND_ELEMENTS.get(device.type, 2**24) // (len(views[0]) * size[1]))
    rows = [Lerp.between(view.shape[1], size[0], view) for view in views]
    columns = [Widening(view.shape[2], size[1], view) for view in views]
    for top in range(0, size[0], band):
        at = slice(top, min(top + band, size[0]))
        values = upsampled_rows(views[0], columns[0], rows[0].part(at))
        if len(views) == 1:
            best, classes[at] = values.max(0)
            if probability is not None:
                probability[at] = (best - values.logsumexp(0)).exp()
            if on_band is not None:
                on_band(values.softmax(0), classes[at])
        else:
            mean = values.softmax(0)
            for view, its_columns, its_rows in zip(views[1:], columns[1:], rows[1:]):
                mean += upsampled_rows(view, its_columns, its_rows.part(at)).softmax(0)
            best, classes[at] = mean.max(0)
            if probability is not None:
                probability[at] = best / len(views)
            if on_band is not None:
                on_band(mean / len(views), classes[at])
    return classes, probability


def nearest_prototypes(head: PrototypeHead, embedding: Tensor) -> Tensor:
    """Index of each class's prototype nearest to each cell: (B, D, h, w) → (B, C, h, w) int16."""
    batch, _, height, _ = embedding.shape
    with torch.autocast(embedding.device.type, enabled=False):  # as in the head, which decided
        emb_ND, protos_CKD = head.unit_rows(embedding), head.prototypes
        rows_MD = protos_CKD.flatten(0, 1).to(emb_ND.dtype)
        chunk = max(1, BAND_ELEMENTS.get(embedding.device.type, 2**24) // len(rows_MD))
        parts = [
            rearrange(rows_MD @ part_nD.t(), "(c k) n -> c k n", k=head.num_prototypes)
            .argmax(1)
            .to(torch.int16)
            for part_nD in emb_ND.split(chunk)
        ]
    return rearrange(torch.cat(parts, 1), "c (b h w) -> b c h w", b=batch, h=height)


def at_pixels(map_Chw: Tensor, classes: Tensor) -> Tensor:
    """For every pixel (H, W) the entry of its class in its cell."""
    rows, columns = (
        nearest_cells(side, cells, classes.device) for side, cells in zip(classes.shape, map_Chw.shape[1:])
    )
    return map_Chw[classes, rows[:, None], columns].long()


def _in_cells(
    protocol: InferenceSettings, rows: int, columns: int, cell: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Window and step in cells."""
    if protocol.window is None:
        return (rows, columns), (rows, columns)
    tall, wide = (-(-side // cell) for side in protocol.window)
    down, along = (
        (side // cell for side in protocol.step) if protocol.step else (tall * 2 // 3, wide * 2 // 3)
    )
    return (min(tall, rows), min(wide, columns)), (max(down, 1), max(along, 1))


def _same_size_batches(
    places: list[tuple[int, int]], count: int, window: tuple[int, int], cell: int, size: tuple[int, int]
) -> Iterator[list[tuple[int, int]]]:
    """Windows in batches; those at the far rims may end within a cell and have fewer pixels."""
    groups: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
    for y, x in places:
        cut = ((y + window[0]) * cell > size[0], (x + window[1]) * cell > size[1])
        groups.setdefault(cut, []).append((y, x))
    for group in groups.values():
        yield from (group[i : i + count] for i in range(0, len(group), count))


def _forward(model: Segmenter, images: Tensor, nearest: bool) -> tuple[Tensor, Tensor | None]:
    if not nearest:
        return model(images).float(), None
    head, embedding = model.require_prototypes("nearest prototypes: this model"), model.embed(images)
    return head(embedding).float(), nearest_prototypes(head, embedding)
