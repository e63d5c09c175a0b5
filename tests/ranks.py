"""Several ranks: threads that meet in their collectives, or processes."""

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from protoseg.runtime import distributed


class Ranks:
    """`run(f)` calls f(rank, all_gather, all_reduce) in one thread per rank; results in rank order."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=30)
        self.box: list[Tensor] = [torch.empty(0)] * world

    def _exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.box[rank] = tensor.detach().clone()
        self.barrier.wait()
        parts = list(self.box)
        self.barrier.wait()
        return parts

    def run(self, work: Callable[..., Any]) -> list[Any]:
        results: list[Any] = [None] * self.world
        errors: list[BaseException] = []

        def all_gather(rank: int, tensor: Tensor) -> Tensor:
            return torch.cat(self._exchange(rank, tensor))

        def all_reduce(rank: int, tensor: Tensor, op: str = "sum") -> Tensor:
            stacked = torch.stack(self._exchange(rank, tensor))
            return tensor.copy_(stacked.sum(0) if op == "sum" else stacked.amax(0))

        def body(rank: int) -> None:
            try:
                results[rank] = work(rank, partial(all_gather, rank), partial(all_reduce, rank))
            except BaseException as error:  # handed to the caller's thread below
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


def one_and_two_processes(work: Callable[[int, int, Path], None], out: Path) -> Path:
    """Run work(rank, world, out) alone, then in two processes of a gloo group; returns `out`."""
    _process(0, work, 1, 0, out)
    mp.spawn(_process, (work, 2, 29500 + os.getpid() % 400, out), nprocs=2)
    return out


def _process(rank: int, work: Callable[[int, int, Path], None], world: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        distributed.setup()
    work(rank, world, out)
    distributed.shutdown()
