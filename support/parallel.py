"""Several processes, one a GPU, on one disk: torchrun --nproc_per_node=N -- drirl.py grpo ...

All draw the same prompts; each takes its share and gathers the others' rewards and similarities.
So difficulty and advantages are those of one process. Gradients are summed.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: str) -> None:
    """Joins the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share() -> slice:
    """The rows of a list that are this process's."""
    return slice(rank(), None, world())


def add(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """The sum (or other reduction) of every process's x, in place."""
    if world() > 1:
        y = x.cuda() if dist.get_backend() == "nccl" else x  # nccl knows no CPU tensors
        dist.all_reduce(y, op)
        x.copy_(y)
    return x


def most(n: int) -> int:
    return int(add(torch.tensor(n), dist.ReduceOp.MAX))


def shard(model) -> None:
    """FSDP2: a process keeps its part of each block, and borrows the rest while the block runs."""
    from torch.distributed.fsdp import fully_shard  # a second of importing

    for block in model.layers if world() > 1 else ():
        fully_shard(block, reshard_after_forward=True)
        block.set_gradient_divide_factor(1.0)  # sums gradients, as `add` does
        block.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def is_sharded(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if is_sharded(x) else x


def clip_gradients(parameters: list, limit: float) -> float:
    """Sums the processes' gradients, a missing one as zeros; cuts their norm, which it returns."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # here no row reached it
    local = [p.grad.to_local() for p in parameters if is_sharded(p)]  # a part, summed already
    common = [add(p.grad) for p in parameters if not is_sharded(p)]  # the same everywhere
    squares = [sum(g.square().sum() for g in grads) for grads in (local, common)]
    norm = (add(torch.as_tensor(squares[0])) + squares[1]).sqrt()
    for g in local + common:
        g.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()
