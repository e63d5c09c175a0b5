"""A whole training step: ours with each classifier, Hugging Face's SegFormer, HRNet; shares; profiles."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks import _programs as programs
from benchmarks._programs import Case
from gpu_checks.ceilings import milliseconds, setup, sync
from gpu_checks.job import Job
from torch import nn
from torch.autograd import DeviceType

from protoseg.config import config_from
from protoseg.core.draws import draw_pixels
from protoseg.core.losses import downsample_labels, upsampled_cross_entropy
from protoseg.data.datasets import dataset_spec
from protoseg.data.loader import Batch
from protoseg.training.objective import Labels
from protoseg.training.step import Run, build_run, train_step

MODES = ("linear", "prototypes", "prototypes+contrast")
WIDTH = {"mit_b0": 256, "mit_b4": 768}
NUM_IMAGES = 2000
REPEATS = 2  # steps that are profiled


def make_run(
    job: Job, backbone: str, mode: str, device: torch.device, precision: str = "bf16", batch_size: int = 8
) -> Run:
    """An ADE20K run (150 classes), or for HRNet a Cityscapes one (19), from the package's own parts."""
    hrnet = backbone.startswith("hrnet")
    images = 2 if job.tiny else batch_size
    small = {"dim": 16} if job.tiny else {}
    if hrnet:
        decode_head: dict[str, Any] = {"name": "hrnet", "dropout": 0}
    else:
        decode_head = {"name": "mlp", "dim": WIDTH[backbone], **small}
    contrast: dict[str, Any] = {"mode": "memory" if mode.endswith("contrast") else "none"}
    if job.tiny:
        contrast |= {"dim": 8, "anchors_per_class": 2, "pool_size": 300, "positives": 4, "negatives": 4}
        contrast |= {"cap_mb": 8}
    config = config_from(
        {
            "data": {"name": "cityscapes" if hrnet else "ade20k", "batch_size": images},
            "classifier": "linear" if mode == "linear" else "prototypes",
            "backbone": {"name": backbone, "drop_path": 0.0 if hrnet else programs.DROP_PATH},
            "decode_head": decode_head,
            "contrast": contrast,
            "optim": {"name": "adamw", "lr": 6e-5},
            "train": {"precision": precision},
        },
        "gpu_check",
    )
    spec = dataset_spec(config.data)
    return build_run(config, spec.classes, spec.palette, NUM_IMAGES, device)


def make_batch(job: Job, size: tuple[int, int] = (512, 512), images: int = 8, classes: int = 150) -> Batch:
    """What every program is given: images and labels on the host."""
    size, images = ((64, 64), 2) if job.tiny else (size, images)
    return programs.make_batch(Case("segformer_b0", classes, size, images, device=job.device))


def step_milliseconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median over groups of steps, by the clock between synchronisations, as long as `seconds` allow."""
    group, least = (3, 3) if device.type == "cuda" else (1, 1)
    for _ in range(group):
        work()
    sync(device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < 30):
        start = time.perf_counter()
        for _ in range(group):
            work()
        sync(device)
        times.append((time.perf_counter() - start) / group)
    return 1e3 * statistics.median(times)


def peak_gb(device: torch.device) -> float | None:
    """Of the allocator since its last reset; not known on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Forget what earlier models needed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def steps(job: Job) -> None:
    """SegFormer-B0 and B4 at 512², batch 8, bf16: ours in three modes, Hugging Face's beside them."""
    device = setup(job)
    batch = make_batch(job)
    measured = 0.0 if job.tiny else 2.0
    for backbone in ("mit_b0",) if job.tiny else ("mit_b0", "mit_b4"):
        base: dict[str, float] = {}
        for mode in (*MODES, "Hugging Face"):
            if job.left() < 6 and not job.tiny:
                job.record(left_out=f"{backbone} {mode} and what follows: no time left")
                return
            reset_peak(device)
            work = (
                hugging_face_step(job, backbone, batch)
                if mode == "Hugging Face"
                else our_step(job, backbone, mode, batch, device)
            )
            ms, gb = step_milliseconds(work, device, measured), peak_gb(device)
            images = len(batch.image)
            base.setdefault("ms", ms)
            base.setdefault("gb", gb or 0.0)
            job.row(
                "step", backbone=backbone, mode=mode, batch=images, ms=ms, peak_gb=gb,
                images_per_second=1e3 * images / ms, time_against_linear=ms / base["ms"],
                memory_against_linear=gb / base["gb"] if gb else None,
            )  # fmt: skip
            del work
        shares(job, backbone, base["ms"], batch, device)


def our_step(
    job: Job, backbone: str, mode: str, batch: Batch, device: torch.device, images: int = 8
) -> Callable[[], object]:
    """One call is one step of the trainer on the same batch, the copy to the device included."""
    run = make_run(job, backbone, mode, device, batch_size=images)
    return lambda: train_step(run, batch)


def hugging_face_step(job: Job, backbone: str, batch: Batch) -> Callable[[], object]:
    """The same with transformers' SegFormer and its own loss, bf16 autocast, AdamW."""
    images, _, height, width = batch.image.shape
    model = backbone.replace("mit", "segformer")
    case = Case(model, 150, (height, width), images, "bf16", device=job.device)
    return programs.hugging_face()(case).step


def compiled_steps(job: Job) -> None:
    """SegFormer-B0's steps with train.compile, and with CUDA graphs too; beside them the eager ones again."""
    device = setup(job)
    batch = make_batch(job)
    for mode, kind in (
        ("prototypes", "eager"), ("prototypes", "default"), ("linear", "eager"), ("linear", "default"),
        ("prototypes", "reduce-overhead"),
    ):  # fmt: skip
        reset_peak(device)
        torch._dynamo.reset()
        run = make_run(job, "mit_b0", mode, device)
        if kind != "eager":
            options: dict[str, Any] = {"backend": "aot_eager"} if job.tiny else {"mode": kind}
            run.parallel = torch.compile(run.objective, **options)  # type: ignore[assignment]
        start = time.perf_counter()
        train_step(run, batch)
        first = time.perf_counter() - start
        ms = step_milliseconds(partial(train_step, run, batch), device, 0.0 if job.tiny else 1.5)
        job.row("step", mode=mode, compiled=kind, ms=ms, first_seconds=first, peak_gb=peak_gb(device))


def shares(job: Job, backbone: str, linear_ms: float, batch: Batch, device: torch.device) -> None:
    """Each part after the decode head alone at the step's sizes, forward and backward: ms and share."""
    run = make_run(job, backbone, "prototypes+contrast", device)
    head, contrast = run.model.prototypes, run.contrast
    assert head is not None
    assert contrast is not None
    labels, index = batch.label.to(device).long(), batch.index.to(device)
    side = run.model.feature_size(labels)
    features = torch.randn(len(labels), head.dim, *side, device=device)
    features = features.to(torch.bfloat16).requires_grad_()
    small = downsample_labels(labels, side)
    head.prepare_(features.detach(), small)
    scale = run.objective.loss_scales([Labels(labels, small)]).small
    classifier = nn.Conv2d(head.dim, 150, 1).to(device)
    logits = torch.randn(len(labels), 150, *side, device=device, requires_grad=True)

    drawn = draw_pixels(index, small[0].numel(), small[0].numel() // 8, 0, 0)  # PPC's default share

    def prototypes() -> None:
        features.grad = None
        out = head.training_step(features, small, scale, drawn)
        (out.logits.mean() + 0.01 * out.ppc + 0.01 * out.ppd).backward()
        head.update_(out)

    def linear() -> None:
        features.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            classifier(features).mean().backward()

    def loss() -> None:
        logits.grad = None
        upsampled_cross_entropy(logits, labels, ignore_index=255).backward()

    def pixel_contrast() -> None:
        features.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            found = contrast(features, small, small, index, 5)
        found.loss.backward()
        contrast.enqueue_(found.projected, small, index, 5)

    parts = (("linear classifier", linear), ("prototype head", prototypes), ("cross-entropy", loss))
    for name, work in (*parts, ("contrast", pixel_contrast)):
        ms = milliseconds(work, device, 2 if job.tiny else 10)
        job.row("shares", backbone=backbone, part=name, ms=ms, of_linear_step=ms / linear_ms)


def hrnet(job: Job) -> None:
    """HRNet-W48 at 512×1024, 19 classes: linear and prototypes; fewer images where memory ends."""
    device = setup(job)
    images = 2 if job.tiny else 8
    size, name = ((64, 64), "hrnet_w18") if job.tiny else ((512, 1024), "hrnet_w48")
    for mode in ("linear", "prototypes"):
        ms = None
        while ms is None:
            reset_peak(device)
            batch = make_batch(job, size, images, 19)
            work = our_step(job, name, mode, batch, device, images)
            try:
                ms = step_milliseconds(work, device, 0.0 if job.tiny else 2.0)
            except torch.cuda.OutOfMemoryError:
                if images == 1:
                    raise
                images //= 2
            del work  # out of memory or not: the next one needs the room
        job.row("step", backbone=name, mode=mode, batch=images, size=f"{size[0]}×{size[1]}", ms=ms,
                images_per_second=1e3 * images / ms, peak_gb=peak_gb(device))  # fmt: skip


def profiles(job: Job) -> None:
    """The fifteen most expensive kernels of the head's step, of the clustering, and of whole steps."""
    device = setup(job)
    batch = make_batch(job)
    cases: list[tuple[str, Callable[[], Callable[[], object]]]] = [
        ("head, N 32,768, C 150", lambda: _head_step(job, device)),
        ("SegFormer-B0, prototypes", lambda: our_step(job, "mit_b0", "prototypes", batch, device)),
        ("SegFormer-B0, contrast", lambda: our_step(job, "mit_b0", "prototypes+contrast", batch, device)),
        ("SegFormer-B0, linear", lambda: our_step(job, "mit_b0", "linear", batch, device)),
        ("SegFormer-B0, Hugging Face", lambda: hugging_face_step(job, "mit_b0", batch)),
    ]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    tables: dict[str, str] = {}
    for name, build in cases[:1] if job.tiny else cases:
        work = build()
        for _ in range(REPEATS):
            work()
        sync(device)
        with torch.profiler.profile(activities=activities) as profile:
            start = time.perf_counter()
            for _ in range(REPEATS):
                work()
            sync(device)
            wall = 1e3 * (time.perf_counter() - start) / REPEATS
        events = profile.key_averages()
        by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
        on_host = [event for event in events if event.device_type == DeviceType.CPU]
        kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
        busy = sum(getattr(event, by) for event in kernels or on_host) / REPEATS / 1e3
        found = {"operators": _dearest(on_host, by, busy)}
        if kernels:
            found["kernels"] = _dearest(kernels, by, busy)
        tables[name] = "\n".join(f"{kind}, ms, share, calls per step\n{text}" for kind, text in found.items())
        job.record(tables=tables)
        # Below 100 % the device waits for the host's launches.
        launches = sum(event.count for event in kernels) / REPEATS
        job.row("busy", case=name, wall_ms=wall, device_ms=busy, busy_share=busy / wall, launches=launches)


def _dearest(events: list[Any], by: str, total_ms: float) -> str:
    """Fifteen lines: milliseconds of a step, share of all, how often, name."""
    lines = []
    for event in sorted(events, key=lambda event: -getattr(event, by))[:15]:
        ms = getattr(event, by) / REPEATS / 1e3
        lines.append(f"{ms:9.3f} {ms / total_ms:6.1%} {event.count / REPEATS:7.0f}  {event.key[:120]}")
    return "\n".join(lines)


def _head_step(job: Job, device: torch.device) -> Callable[[], object]:
    from protoseg.core.prototypes import PrototypeHead

    dim, classes, side = (8, 5, 8) if job.tiny else (256, 150, 128)
    head = PrototypeHead(dim, classes, 10, start="random").to(device)
    features = torch.randn(2, dim, side, side, device=device, requires_grad=True)
    labels = torch.randint(0, classes, (2, side, side), device=device)

    def work() -> None:
        features.grad = None
        out = head.training_step(features, labels)
        (out.logits.mean() + 0.01 * out.ppc + 0.01 * out.ppd).backward()
        head.update_(out)

    return work
