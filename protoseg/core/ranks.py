"""What joins the ranks of a distributed run, without torch.distributed."""

from collections.abc import Callable

from torch import Tensor

AllReduce = Callable[[Tensor, str], Tensor]  # (tensor, "sum" | "max") → over all ranks, on every rank
AllGather = Callable[[Tensor], Tensor]  # rows of this rank → of all ranks, in their order


def reduced(tensor: Tensor, all_reduce: AllReduce | None, how: str = "sum") -> Tensor:
    """The sum or "max" over ranks; None: there is one."""
    return tensor if all_reduce is None else all_reduce(tensor, how)
