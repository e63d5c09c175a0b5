"""The few collectives the project uses; every one is the identity in a single process."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from protoseg.runtime.errors import UserError

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def setup() -> torch.device:
    """Join the process group if `torchrun` started us; returns the device of this rank."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun: process {local_rank} has no GPU, this machine has {torch.cuda.device_count()};"
            " lower --nproc-per-node"
        )
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, for every command alike, here and nowhere else
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return device


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """Sum or maximum over ranks, in place; `op` is "sum" or "max". No gradient passes through."""
    if world_size() > 1:
        dist.all_reduce(tensor, _OPS[op])
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate the ranks' tensors, all of one shape, along axis 0 in rank order. No gradient."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_states(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every rank's small state dict (random generators), on every rank."""
    if world_size() == 1:
        return [state]
    states: list[dict[str, Tensor]] = [{} for _ in range(world_size())]
    dist.all_gather_object(states, state)
    return states


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()
