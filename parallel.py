"""Several processes, one a GPU, on one disk: torchrun --nproc_per_node=N -- drirl.py grpo ...

Every process draws the same batch of prompts and takes its share of them. Rewards and similarities of all prompts are then gathered, so that
categories, advantages and the choice of groups are those of one process; gradients are summed, as the loss is divided by the number of all
sequences. With one process nothing is gathered, summed or sharded.
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


def gather(mine: Tensor, n: int) -> Tensor:
    """(n, k) of all processes, whose rows rank, rank + world, ... are `mine`."""
    out = mine.new_zeros(n, *mine.shape[1:])
    out[rank() :: world()] = mine
    return add(out)


def add(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """The sum (or other reduction) of every process's x, in place."""
    if world() > 1:
        y = x.cuda() if dist.get_backend() == "nccl" else x  # nccl knows no CPU tensors
        dist.all_reduce(y, op)
        x.copy_(y)
    return x


def most(n: int) -> int:
    """The largest n of all processes."""
    return int(add(torch.tensor(n), dist.ReduceOp.MAX))


def shard(model) -> None:
    """FSDP2: a process keeps its part of each block's parameters, gradients and moments, and borrows the rest while the block runs. The
    embeddings, the sampler and the reference policy stay whole."""
    from torch.distributed.fsdp import fully_shard  # a second of importing

    for block in model.layers if world() > 1 else ():
        fully_shard(block, reshard_after_forward=True)
        block.set_gradient_divide_factor(1.0)  # sum gradients, as add does for what isn't sharded
        block.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def is_sharded(x: Tensor) -> bool:
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if is_sharded(x) else x


def clip_gradients(parameters: list, limit: float) -> float:
    """Sums the processes' gradients and scales them to a norm of at most `limit`; returns the norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    mine = [
        g.to_local() for g in grads if is_sharded(g)
    ]  # summed in the backward pass; each process has another part
    common = [add(g) for g in grads if not is_sharded(g)]  # the same everywhere
    squares = [
        sum((g.square().sum() for g in part), (mine + common)[0].new_zeros(()))
        for part in (mine, common)
    ]
    norm = (add(squares[0]) + squares[1]).sqrt()
    for g in mine + common:
        g.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()
