"""One optimiser step, which reads as the algorithm, and the state that it changes."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from protoseg.config import Config
from protoseg.core.contrast import PixelContrast
from protoseg.core.draws import draw_pixels
from protoseg.core.losses import downsample_labels
from protoseg.core.tree_losses import draw_triplets
from protoseg.data.datasets import data_tree
from protoseg.data.loader import Batch
from protoseg.data.tree import LabelTree
from protoseg.models.build import build_model
from protoseg.models.segmenter import Segmenter, autocast, frozen_running_stats
from protoseg.runtime import distributed
from protoseg.runtime.errors import UserError
from protoseg.training.feature_cache import FeatureCache
from protoseg.training.objective import Labels, Objective, StepOutput
from protoseg.training.optimizer import build_optimizer, build_schedule

TRIPLETS = 512  # of a micro-batch, for the tree-triplet loss


@dataclass
class Run:
    """Everything that changes while training; `last.pt` holds all of it."""

    config: Config
    model: Segmenter
    contrast: PixelContrast | None
    objective: Objective  # the two with their losses
    parallel: nn.Module  # the objective, wrapped for DDP and torch.compile
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    device: torch.device
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    tree: LabelTree | None = None
    step: int = 0  # optimiser steps done; also the position in the data
    best: float = -1.0
    scored: int = 0  # step of the last evaluation
    seconds: float = 0.0  # spent training, without evaluation
    unseen: set[int] = field(default_factory=set)  # classes whose prototypes do not hold data yet
    train_features: FeatureCache | None = None  # what the frozen backbone makes of the images, if kept
    val_features: FeatureCache | None = None
    empty_steps: int = 0  # steps in which contrast found no anchor with a positive and a negative


class NonFiniteLoss(UserError):
    """Training has diverged; the weights are those before the step."""


def build_run(
    config: Config,
    classes: tuple[str, ...],
    palette: tuple[tuple[int, int, int], ...],
    num_images: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """A fresh run: seeded model, optimiser and schedule, wrapped for the process group if there is one.

    num_images: of the training set; pixel contrast keeps a region for each.
    """
    ranks, parts = distributed.world_size(), config.train.accumulation
    if config.data.batch_size % (ranks * parts):
        raise UserError(
            f"data.batch_size: {config.data.batch_size} does not divide by {ranks} processes ×"
            f" train.accumulation {parts}; use a multiple of {ranks * parts}"
        )
    torch.manual_seed(config.train.seed)
    model = build_model(config, len(classes), all_reduce=distributed.all_reduce)
    contrast = build_contrast(config, model, len(classes), num_images)
    tree = data_tree(config.data, classes)
    objective = Objective(model, contrast, config.loss, parts, None if tree is None else tree.tables()).to(
        device
    )
    model.to(dtype)
    if contrast is not None:
        contrast.projection.to(dtype)
    if device.type == "cuda" and distributed.world_size() > 1:
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(objective, config.optim)
    schedule = build_schedule(optimizer, config.optim, config.train.iterations)
    parallel: nn.Module = objective
    if distributed.world_size() > 1:
        parallel = DistributedDataParallel(
            objective,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=not model.decode_head.every_map,
        )
    if config.train.compile:
        parallel = torch.compile(parallel)  # type: ignore[assignment]
    torch.manual_seed(config.train.seed + distributed.rank())  # dropout differs between ranks
    run = Run(
        config, model, contrast, objective, parallel, optimizer, schedule, device, classes, palette, tree
    )
    run.unseen = unseen_classes(model)
    return run


def build_contrast(
    config: Config, model: Segmenter, num_classes: int, num_images: int
) -> PixelContrast | None:
    """Pixel contrast as configured, joined over ranks; None where it is switched off.

    Errors: UserError where the settings do not go together with the number of classes.
    """
    if config.contrast.mode == "none":
        return None
    several = distributed.world_size() > 1
    try:
        return PixelContrast(
            model.contrast_channels,
            num_classes,
            num_images,
            seed=config.train.seed,
            all_gather=distributed.all_gather if several else None,
            all_reduce=distributed.all_reduce if several else None,
            rank=distributed.rank(),
            ignore_index=model.ignore_index,
            **asdict(config.contrast),
        )
    except ValueError as error:
        raise UserError(f"contrast.{error}") from None


def train_step(run: Run, batch: Batch, stop: bool = False) -> dict[str, float]:
    """One optimiser step, in micro-batches if configured; returns the global mean of every term.

    Errors: NonFiniteLoss, before weights, optimiser or prototypes have changed.
    """
    run.parallel.train()
    micro = [to_device(part, run) for part in split(batch, run.config)]
    start_prototypes_(run, batch.label, micro)
    labels = [known_labels(run, part) for part in micro]
    scales = run.objective.loss_scales(labels, distributed.all_reduce)
    step: int | Tensor = run.step
    if run.config.train.compile:  # a number would be part of the program; and torch.tensor would wait
        step = torch.full((), run.step, dtype=torch.int64, device=run.device)
    outputs: list[StepOutput] = []
    for part, its_labels in zip(micro, labels):
        with gradients_stay_local(run, unless=len(outputs) == len(micro) - 1):
            with autocast(run.config, run.device):
                drawn = draw_share(run, part, run.config.loss.ppc_pixels) if run.model.prototypes else None
                outputs.append(run.parallel(part.image, its_labels, scales, part.indices, step, drawn))
            outputs[-1].total.backward()
    values = finite_values(run, outputs, stop)  # the one host read, where `start_prototypes_` needs none
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    if run.model.prototypes is not None:
        run.model.prototypes.update_(*[output.prototypes for output in outputs if output.prototypes])
    if run.contrast is not None:
        rows = torch.cat([output.projected for output in outputs if output.projected is not None])
        small, indices = (
            torch.cat([each.small for each in labels]),
            torch.cat([part.indices for part in micro]),
        )
        run.contrast.enqueue_(rows, small, indices, step)
        run.empty_steps += int(values["contrast_empty"] > 0)
    run.step += 1
    return values


class MicroBatch(NamedTuple):
    """Part of a batch, where the model is."""

    image: Tensor  # (B, 3, H, W)
    labels: Labels  # before `known_labels`: `nodes` holds ids as they are in the files
    indices: Tensor  # (B,) in the dataset, int64


def draw_share(run: Run, part: MicroBatch, share: float) -> Tensor | None:
    """Which pixels PPC, or the tree's terms, are computed of (B, P); None for all."""
    if share == 1:
        return None
    pixels = part.labels.small[0].numel()
    return draw_pixels(part.indices, pixels, max(round(share * pixels), 1), run.config.train.seed, run.step)


def known_labels(run: Run, part: MicroBatch) -> Labels:
    """Labels in which classes without prototypes are ignored; those of tree nodes and triplets, if wanted."""
    labels, head = part.labels, run.model.prototypes
    if head is not None and run.unseen:
        labels = labels._replace(full=head.known(labels.full), small=head.known(labels.small))
    tree, weights = run.objective.tree, run.config.loss
    if tree is None or labels.nodes is None or not (weights.tree or weights.tree_triplet):
        return labels._replace(nodes=None)
    drawn = draw_share(run, part, weights.tree_pixels)
    nodes = labels.nodes.flatten(1) if drawn is None else labels.nodes.flatten(1).gather(1, drawn)
    known = nodes < tree.num_nodes
    if head is not None:
        known &= tree.live_nodes(head.initialized)[nodes.clamp(max=tree.num_nodes - 1)]
    nodes = torch.where(known, nodes, -1)
    triplets = None
    if weights.tree_triplet:
        seed = run.config.train.seed
        triplets = draw_triplets(nodes.flatten(), tree.num_classes, TRIPLETS, seed, run.step, part.indices)
    return labels._replace(nodes=nodes, drawn=drawn, triplets=triplets)


def to_device(batch: Batch, run: Run) -> MicroBatch:
    """A batch where the model is, labels and indices int64, labels at the embedding's size as well.

    Maps in place of images if they are cached.
    """
    image, label, index = (tensor.to(run.device, non_blocking=True) for tensor in batch)
    if run.train_features is not None:
        image = run.train_features.maps(batch.index, run.device)
    label = label.long()
    nodes = None
    if run.tree is not None:
        nodes = downsample_labels(label, run.model.feature_size(label))
        inner = (label >= len(run.classes)) & (label < len(run.tree.names))
        label = label.masked_fill(inner, run.model.ignore_index)  # of no class, for all but the tree's terms
    small = downsample_labels(label, run.model.feature_size(label))
    return MicroBatch(image, Labels(label, small, nodes), index.long())


def split(batch: Batch, config: Config) -> list[Batch]:
    """The micro-batches of one rank's batch."""
    parts = [tensor.chunk(config.train.accumulation) for tensor in batch]
    return [Batch(*part) for part in zip(*parts)]


def start_prototypes_(run: Run, label: Tensor, micro: list[MicroBatch]) -> None:
    """Give classes seen for the first time their prototypes, and revive dead ones every R steps.

    Rare, so it may cost a forward pass of its own; all ranks decide alike. `label` (B, H, W) is where the
    loader left it, in the host's memory: while a class is missing, looking for it there waits for no device.
    """
    head = run.model.prototypes
    if head is None:
        return
    every = run.config.prototypes.revive_after
    due = bool(every) and run.step > 0 and run.step % every == 0
    if not due and not (run.unseen and present_classes(run, label) & run.unseen):
        return
    for part in micro:
        with torch.no_grad(), frozen_running_stats(run.model), autocast(run.config, run.device):
            embedding = run.model.embed(part.image)
            head.prepare_(embedding, part.labels.small)
    run.unseen = unseen_classes(run.model)


def present_classes(run: Run, label: Tensor) -> set[int]:
    """The classes that occur at the embedding's size, on any rank: several ranks ask each other."""
    small = downsample_labels(label, run.model.feature_size(label))
    present = torch.bincount(small.flatten(), minlength=len(run.classes))[: len(run.classes)] > 0
    if distributed.world_size() > 1:
        present = distributed.all_reduce(present.float().to(run.device), "max")
    return set(present.nonzero().flatten().tolist())


def unseen_classes(model: Segmenter) -> set[int]:
    """The classes whose prototypes do not hold data yet."""
    if model.prototypes is None:
        return set()
    return set((~model.prototypes.initialized).nonzero().flatten().tolist())


def gradients_stay_local(run: Run, unless: bool) -> AbstractContextManager[Any]:
    """DDP averages gradients in the last micro-batch only."""
    return nullcontext() if unless or distributed.world_size() == 1 else run.parallel.no_sync()  # type: ignore


def finite_values(run: Run, outputs: list[StepOutput], stop: bool) -> dict[str, float]:
    """Global means of the terms, their sum, gradient norm, diagnostics and stop flag; clips the gradient.

    Diagnostics are the same on all ranks already. Errors: NonFiniteLoss naming the first value that is not
    finite.
    """
    names = [*outputs[0].terms, "loss"]
    sums = [sum(output.terms[name] for output in outputs) for name in names[:-1]]
    local = torch.stack([*sums, sum(output.total.detach() for output in outputs)]).float()  # type: ignore
    means = distributed.all_reduce(local) / distributed.world_size()  # local losses carry the factor W
    gradients = [p.grad for p in run.objective.parameters() if p.grad is not None]
    norm = get_total_norm(gradients)
    if run.config.train.grad_clip is not None:
        clip_grads_with_norm_(run.objective.parameters(), run.config.train.grad_clip, norm)
    flag = distributed.all_reduce(torch.full((), float(stop), device=run.device), "max")
    extra = [sum(output.diagnostics[name] for output in outputs) for name in outputs[0].diagnostics]
    read = torch.cat([means, torch.stack([norm, flag, *extra]).float()]).tolist()  # type: ignore[list-item]
    values = dict(zip([*names, "grad_norm", "stop", *outputs[0].diagnostics], read))
    for name, value in values.items():
        if not math.isfinite(value):
            what = "the gradient" if name == "grad_norm" else f"the term {name}"
            raise NonFiniteLoss(
                f"step {run.step + 1}: {what} is {value}; nothing was updated, the last checkpoint is"
                " good: lower optim.lr, set train.grad_clip or train.precision=fp32 in a new run"
            )
    return values
