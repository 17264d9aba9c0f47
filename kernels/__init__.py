"""Token log-probs, which every stage needs, GRPO-S's objective on them, and its scaled group advantages.

What each file holds: logprob.py and advantage.py the functions the project calls; reference.py the row and group computations they stand
on, in a few lines of torch; triton_kernels.py the same as Triton kernels. README.md says what they cost.
"""

import os


def backend(x):
    """The module that computes for tensor x: Triton kernels for CUDA tensors (but float64), torch for the rest; DRIRL_KERNELS=triton or torch forces one."""
    choice = os.environ.get("DRIRL_KERNELS") or (
        "triton" if x.is_cuda and x.dtype.itemsize < 8 else "torch"
    )
    if choice == "triton":
        from kernels import triton_kernels

        return triton_kernels
    if choice == "torch":
        from kernels import reference

        return reference
    raise ValueError(f"DRIRL_KERNELS={choice}: want triton or torch")


from kernels.advantage import group_advantage  # noqa: E402
from kernels.logprob import grpo_loss, token_logprobs  # noqa: E402
from kernels.reference import Objective, clipped_objective, kl_k3  # noqa: E402

__all__ = [
    "Objective",
    "backend",
    "clipped_objective",
    "group_advantage",
    "grpo_loss",
    "kl_k3",
    "token_logprobs",
]
