"""Token log-probs and scaled group advantages: the two computations that every stage shares."""
from kernels.advantage import group_advantage
from kernels.logprob import token_logprobs

__all__ = ["group_advantage", "token_logprobs"]
