"""Two processes on one GPU, joined by gloo, as a stand-in for ranks: the same prototypes everywhere."""

import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_checks.ceilings import setup
from gpu_checks.job import Failed, Job
from gpu_checks.training_cost import make_batch, make_run

from protoseg.core.prototypes import PrototypeHead
from protoseg.data.loader import Batch
from protoseg.runtime import distributed
from protoseg.training.step import train_step

STEPS = 6


def two_processes(job: Job) -> None:
    """Head and contrast alone against one process; then the trainer with DDP: equal on both ranks."""
    context = get_context("fork")
    processes = [context.Process(target=_guarded, args=(job, rank, 2)) for rank in range(2)]
    processes.append(context.Process(target=_guarded, args=(job, 0, 1)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(job.left(), 1))
    found = {}
    for world, rank in ((2, 0), (2, 1), (1, 0)):
        path = _file(job, world, rank)
        if not path.is_file():
            log = path.with_suffix(".error")
            raise Failed(log.read_text()[-1500:] if log.is_file() else f"rank {rank} of {world} did not end")
        found[world, rank] = torch.load(path, weights_only=True)
    differing = [n for n, value in found[2, 0].items() if not torch.equal(value, found[2, 1][n])]
    one = (found[1, 0]["alone"] - found[2, 0]["alone"]).abs().max().item()
    job.record(tensors=len(found[2, 0]), differ_between_ranks=differing[:20], largest_difference_from_one=one)
    print(f"  two processes: {len(differing)} of {len(found[2, 0])} tensors differ; from one {one:.2g}")
    if differing:
        raise Failed(f"ranks differ in {len(differing)} tensors: {', '.join(differing[:8])}")
    if not one < 1e-4:
        raise Failed(f"prototypes differ by {one:.3g} from those of one process")


def _file(job: Job, world: int, rank: int) -> Path:
    return job.folder / f"{world}-{rank}.pt"


def _guarded(job: Job, rank: int, world: int) -> None:
    import traceback

    try:
        _rank(job, rank, world)
    except BaseException:
        _file(job, world, rank).with_suffix(".error").write_text(traceback.format_exc())
    os._exit(0)  # a rank whose partner died would wait for it in its clean-up


def _rank(job: Job, rank: int, world: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name need not resolve
    device = setup(job)
    torch.set_float32_matmul_precision("highest")
    if world > 1:
        meeting = f"file://{job.folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    state: dict[str, Any] = {"alone": _head(device, rank, world)}
    if world > 1:
        batch = make_batch(job, (128, 128), 4)
        run = make_run(job, "mit_b0", "prototypes+contrast", device, batch_size=4)
        images = len(batch.image) // world
        part = Batch(*(each[rank * images : (rank + 1) * images] for each in batch))
        for _ in range(STEPS):
            train_step(run, part)
        assert run.contrast is not None
        states = {"model": run.model.state_dict(), "contrast": run.contrast.state_dict()}
        for kind, tensors in states.items():
            # BatchNorm is joined over ranks on GPUs only.
            own = ("running_mean", "running_var") if device.type == "cpu" else ()
            state |= {f"{kind}.{n}": t.cpu() for n, t in tensors.items() if not n.endswith(own or ("-",))}
    torch.save(state, _file(job, world, rank))


def _head(device: torch.device, rank: int, world: int) -> torch.Tensor:
    """Prototypes after some steps on this rank's half of the same features."""
    torch.manual_seed(0)
    head = PrototypeHead(32, 7, 4, momentum=0.9, all_reduce=distributed.all_reduce).to(device)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(4, 32, 24, 24, generator=generator)
        labels = torch.randint(0, 7, (4, 24, 24), generator=generator)
        part = slice(rank * 4 // world, (rank + 1) * 4 // world)
        features, labels = features[part].to(device), labels[part].to(device)
        if step == 0:
            head.prepare_(features, labels)
        head.update_(head.training_step(features, labels))
    return head.prototypes.cpu()
