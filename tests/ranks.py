"""Several ranks in one process: threads that meet in their collectives."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
                results[rank] = work(
                    rank, lambda t: all_gather(rank, t), lambda t, op="sum": all_reduce(rank, t, op)
                )
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
